"""Everything that can be checked and decided before a quantization writes its first byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import m27quant
from m27quant.calib.data import Sequences, assumed_sequences, is_local, load_sequences, parse_dataset
from m27quant.calib.input_ranges import InputRange
from m27quant.calib.memory import MemoryPlan, plan_memory
from m27quant.calib.ranges_file import Calibrated, read_calibrated
from m27quant.checkpoint import sidecars
from m27quant.checkpoint.assumed import AssumedSource
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.workspace import differences
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.layer_statistics import statistics_bytes
from m27quant.plan import Plan, check_paths, make_plan
from m27quant.recipes import Recipe, load_recipe
from m27quant.recipes.algorithm import FULL_COVERAGE_METHODS
from m27quant.runtime.device import pick_device
from m27quant.runtime.host_memory import default_budget

DEFAULT_RECIPE = "nvfp4_experts_only-fp8_kv"
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to quantize; the command's options have the same names."""

    recipe: str = DEFAULT_RECIPE
    dataset: str | Sequence[str] = ()
    """Hub data sets or local files (one, or several) instead of the recipe's."""
    num_samples: int | None = None
    seq_len: int | None = None
    moe_calib: Literal["full", "natural"] | None = None
    device: str = "auto"
    max_memory: int | None = None
    """Bytes of resident memory (and of accelerator memory) not to exceed; None takes 80% of what is free."""
    max_shard_size: int = DEFAULT_SHARD_BYTES
    resume: bool = False
    overwrite: bool = False
    force_unlock: bool = False
    revision: str | None = None
    offline: bool = False
    token: str | None = None
    seed: int = 0
    calibrate_only: bool = False
    """Stop after the calibration, with its ranges in OUT/calibration.json."""
    ranges: str | None = None
    """Pack by this calibration.json instead of calibrating; data and their options are those it was made with."""
    layers: tuple[int, int | None] | None = None
    """With `ranges`: only layers [first, end), as a part for `assemble_checkpoint`; None is the last layer's end."""
    input_scale_headroom: float = 1.0
    """What the experts' input ranges are multiplied by."""
    input_scale_percentile: float = 100.0
    """Which percentile of the largest values of blocks of 16 an input range is; 100 is the largest of all."""

    @property
    def input_range(self) -> InputRange:
        """Both of them; `UsageError` where one is out of bounds."""
        return InputRange(self.input_scale_headroom, self.input_scale_percentile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything checked and decided; nothing written yet."""

    source: Source
    recipe: Recipe
    plan: Plan
    sequences: Sequences
    memory: MemoryPlan
    budget: int
    device: torch.device
    documents: dict[str, bytes]
    """Tokenizer and the like, as they will lie in OUT."""
    notices: list[str]
    data_notices: list[str]
    """Those of `notices` that are about the calibration data."""
    calibrated: Calibrated | None = None
    """What `ranges` holds."""

    @property
    def hidden_bytes(self) -> int:
        return self.sequences.num_tokens * self.source.config.hidden_size * 2

    def task(self, options: Options) -> dict[str, Any]:
        """What else must be the same for a run that does less than all."""
        asked: dict[str, Any] = {"calibrate_only": True} if options.calibrate_only else {}
        if self.calibrated is not None:
            asked |= {"ranges": self.calibrated.sha256, "layers": options.layers}
        return asked

    def fingerprint(self, options: Options) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        identity = json.dumps(self.source.identity(), sort_keys=True)
        canonical = self.recipe.canonical()
        asked = {} if options.input_range.is_maximum else {"input_range": asdict(options.input_range)}
        return asked | {
            "source": _digest(identity),
            "source_commit": self.source.location.commit,
            "recipe": _digest(json.dumps([canonical["quant_cfg"], canonical["algorithm"]], sort_keys=True)),
            "moe_calib": self.plan.resolved.moe_calib,
            "tokens": self.sequences.digest,
            "max_shard_size": options.max_shard_size,
            "m27quant": m27quant.__version__,
            "torch": torch.__version__,
            "device": _device_class(self.device),
        }


def prepare(
    model: str, out: Path, options: Options, say: Callable[[str], None], *, fetch: bool = True
) -> Prepared:
    """Read and check everything that can be known before the work: source, recipe, data, memory, disk.

    With `fetch` false, weights and calibration data that are on the Hub are assumed instead of fetched.
    """
    calibrated = _calibrated(options)
    recipe = _recipe(options, calibrated)
    _refuse_lost_statistics(recipe, options)
    device = pick_device(options.device)
    location = locate(
        model, revision=options.revision, offline=options.offline, token=options.token, weights=fetch
    )
    say(f"source: {location.describe()}")
    check_paths(location.folder, out)
    assumed = not fetch and location.repo_id and not any(location.folder.glob("*.safetensors"))
    source = AssumedSource(location) if assumed else Source(location)
    try:
        prepared = _decide(source, recipe, device, options, fetch, calibrated)
        if calibrated is not None:
            _check_calibrated(calibrated, prepared, options)
    except BaseException:
        source.close()
        raise
    for notice in prepared.notices:
        say(f"notice: {notice}")
    return prepared


def _calibrated(options: Options) -> Calibrated | None:
    if options.ranges is None:
        if options.layers is not None:
            raise UsageError(
                "--layers without --ranges: a layer's ranges need all layers before it",
                hint="calibrate once with --calibrate-only, then pass its calibration.json as --ranges",
            )
        return None
    given = {
        "--calibrate-only": options.calibrate_only,
        "--dataset": options.dataset,
        "--num-samples": options.num_samples,
        "--seq-len": options.seq_len,
        "--moe-calib": options.moe_calib,
        "--seed": options.seed,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} beside --ranges", hint="the ranges' own data and settings are used")
    return read_calibrated(Path(options.ranges))


def _refuse_lost_statistics(recipe: Recipe, options: Options) -> None:
    """Raise `UsageError` where a calibration and the packing by it are to be two runs, but maxima are not enough."""
    in_two_runs = options.calibrate_only or options.ranges is not None
    if not options.input_range.is_maximum and in_two_runs:
        raise UsageError(
            "--input-scale-headroom and --input-scale-percentile need calibration and packing in one run",
            hint="leave out --calibrate-only and --ranges",
        )
    if recipe.quantize.algorithm.method in FULL_COVERAGE_METHODS and in_two_runs:
        raise UsageError(
            f"recipe '{escape(recipe.name)}' packs by second moments, which calibration.json does not hold",
            hint="calibrate and pack in one run, on several ranks where it should be faster",
        )


def _check_calibrated(calibrated: Calibrated, prepared: Prepared, options: Options) -> None:
    """The ranges must be of this model, recipe, versions and kind of device.

    Raises:
        UsageError: they are not; lists every difference.
        CheckpointError: they lack layers or experts.
    """
    if lines := differences(calibrated.fingerprint, prepared.fingerprint(options), "there", "here"):
        raise UsageError(
            f"--ranges {escape(options.ranges)}: made with other inputs: {lines}",
            hint="repeat the calibration's model, recipe and options, or calibrate again",
        )
    c = prepared.source.config
    sizes = {len(r) for x in calibrated.layers for r in (x.w2_input_amax, x.routed_tokens, x.seen_tokens)}
    if (
        len(calibrated.layers) != c.num_hidden_layers
        or sizes != {c.num_local_experts}
        or not calibrated.lengths
    ):
        raise CheckpointError(
            f"{escape(options.ranges)}: lacks layers or experts of this model", hint="calibrate again"
        )


def _decide(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    options: Options,
    fetch: bool,
    calibrated: Calibrated | None,
) -> Prepared:
    notices = [*source.warnings, *check_layout(source), *recipe.notices]
    plan = make_plan(source, recipe, options.max_shard_size)
    documents, about_files = sidecars.collect(source.folder, source.raw_config)
    if calibrated is None:
        sequences, about_data = _sequences(source, recipe, options, fetch)
    else:
        digest = str(calibrated.fingerprint.get("tokens"))
        sequences = Sequences(torch.empty(0, dtype=torch.int64), calibrated.lengths, digest, ())
        about_data = list(calibrated.notices)
    budget = options.max_memory or default_budget()
    memory = plan_memory(
        source.config,
        num_tokens=sequences.num_tokens,
        longest=max(sequences.lengths),
        device=device,
        budget=budget,
        beside=statistics_bytes(plan.resolved.algorithm, options.input_range, source.config, device),
    )
    return Prepared(
        source=source,
        recipe=recipe,
        plan=plan,
        sequences=sequences,
        memory=memory,
        budget=budget,
        device=device,
        documents=documents,
        notices=[*notices, *about_files, *about_data],
        data_notices=about_data,
        calibrated=calibrated,
    )


def _sequences(source: Source, recipe: Recipe, options: Options, fetch: bool) -> tuple[Sequences, list[str]]:
    plan = recipe.calibration
    if not fetch and not is_local(plan):
        assumed = assumed_sequences(plan)
        return assumed, [
            f"calibration data are not fetched; {plan.num_samples:,} rows of {plan.seq_len} tokens are assumed"
        ]
    return load_sequences(
        plan,
        source.folder,
        vocab_size=source.config.vocab_size,
        max_length=source.config.max_position_embeddings,
        seed=options.seed,
        offline=options.offline,
        token=options.token,
    )


def _recipe(options: Options, calibrated: Calibrated | None) -> Recipe:
    if calibrated is not None:
        return load_recipe(options.recipe).with_calibration(**calibrated.settings)
    wanted = [options.dataset] if isinstance(options.dataset, str) else options.dataset
    datasets = tuple(parse_dataset(d) for d in wanted) or None
    return load_recipe(options.recipe).with_calibration(
        datasets=datasets,
        num_samples=options.num_samples,
        seq_len=options.seq_len,
        moe_calib=options.moe_calib,
    )


def _device_class(device: torch.device) -> str:
    """What may change the last bit of a product: the CPU, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
