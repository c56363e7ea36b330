"""Quantize a MiniMax-M2.x checkpoint: the whole road, top to bottom.

source -> plan -> for each layer: calibrate, pack, make durable -> commit.  One layer (one group of experts, with a
small memory budget) is in memory at a time.  A run that is killed anywhere continues with `resume=True` and ends
with the same bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import m27quant
from m27quant.calib.activations import plan_chunks
from m27quant.calib.data import Sequences, load_sequences, parse_dataset
from m27quant.calib.layerwise import Dropped
from m27quant.calib.memory import MemoryPlan, default_budget, plan_memory, rss_bytes
from m27quant.checkpoint import sidecars
from m27quant.checkpoint.card import render_card
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.quant_config import hf_quant_config, output_config, quantization_config
from m27quant.checkpoint.source import INDEX, Source
from m27quant.checkpoint.workspace import CONFIG, REPORT, Workspace, check_same
from m27quant.errors import CheckpointError, EnvironmentFault, escape
from m27quant.layer_job import Job, run_embed, run_head, run_layer
from m27quant.plan import HEAD, Plan, Unit, check_disk, check_paths, disk_needed, make_plan
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.recipes import Recipe, load_recipe
from m27quant.report.quantization import build_report
from m27quant.runlog import RunLog

log = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """A finished quantization."""

    out: Path
    report: dict[str, Any]
    """The content of quantization_report.json."""
    elapsed_s: float
    peak_rss_bytes: int
    was_complete: bool = False
    """True when `resume` found nothing left to do."""


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

    @property
    def hidden_bytes(self) -> int:
        return self.sequences.num_tokens * self.source.config.hidden_size * 2

    def fingerprint(self, options: Options) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        identity = json.dumps(self.source.identity(), sort_keys=True)
        canonical = self.recipe.canonical()
        return {
            "source": digest(identity),
            "source_commit": self.source.location.commit,
            "recipe": digest(json.dumps([canonical["quant_cfg"], canonical["algorithm"]], sort_keys=True)),
            "moe_calib": self.plan.resolved.moe_calib,
            "tokens": self.sequences.digest,
            "max_shard_size": options.max_shard_size,
            "m27quant": m27quant.__version__,
            "torch": torch.__version__,
            "device": device_class(self.device),
        }


def quantize_checkpoint(
    model: str, out: str | Path, options: Options | None = None, *, progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None, say: Callable[[str], None] = log.info, **changes: Any,
) -> QuantizeResult:  # fmt: skip
    """Quantize MODEL to OUT.

    Args:
        model: local folder or Hub id (`org/name[@revision]`).
        out: folder to create.
        options: see `Options`.
        progress: called with snapshots of the work.
        stop: called often; raises `Interrupted` to end the run resumably.
        say: told where the source was found, what is noteworthy.
        **changes: fields of `Options` by name, instead of or on top of `options`.

    Raises:
        M27Error: see m27quant.errors; nothing that looks like a checkpoint is left behind.
    """
    options = replace(options or Options(), **changes)
    started = time.monotonic()
    out = Path(out)
    prepared = prepare(model, out, options, say)
    with prepared.source:
        workspace = Workspace(out)
        fingerprint = prepared.fingerprint(options)
        if options.resume and workspace.is_complete():
            return _already_complete(workspace, fingerprint, started)
        workspace.open(fingerprint, resume=options.resume, overwrite=options.overwrite, force_unlock=options.force_unlock)
        try:
            with torch.inference_mode(), RunLog(workspace.private / "run.log") as run_log:
                report = _run(prepared, options, workspace, fingerprint, progress, stop, run_log)
        except BaseException:
            workspace.abandon()
            raise
        finally:
            workspace.close()
    return QuantizeResult(out=out, report=report, elapsed_s=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes())


def prepare(model: str, out: Path, options: Options, say: Callable[[str], None]) -> Prepared:
    """Read and check everything that can be known before the work: source, recipe, data, memory, disk."""
    recipe = _recipe(options)
    device = pick_device(options.device)
    location = locate(model, revision=options.revision, offline=options.offline, token=options.token)
    say(f"source: {location.describe()}")
    check_paths(location.folder, out)
    source = Source(location)
    try:
        notices = [*source.warnings, *check_layout(source), *recipe.notices]
        plan = make_plan(source, recipe, options.max_shard_size)
        documents, more = sidecars.collect(source.folder, source.raw_config)
        sequences, from_data = load_sequences(
            recipe.calibration, source.folder, vocab_size=source.config.vocab_size,
            max_length=source.config.max_position_embeddings, seed=options.seed, offline=options.offline,
            token=options.token,
        )  # fmt: skip
        budget = options.max_memory or default_budget()
        memory = plan_memory(
            source.config, num_tokens=sequences.num_tokens, longest=max(sequences.lengths), device=device, budget=budget
        )
        for notice in (notices := [*notices, *more, *from_data]):
            say(f"notice: {notice}")
    except BaseException:
        source.close()
        raise
    return Prepared(
        source=source, recipe=recipe, plan=plan, sequences=sequences, memory=memory, budget=budget, device=device,
        documents=documents, notices=notices,
    )  # fmt: skip


def _recipe(options: Options) -> Recipe:
    wanted = [options.dataset] if isinstance(options.dataset, str) else options.dataset
    datasets = tuple(parse_dataset(d) for d in wanted) or None
    return load_recipe(options.recipe).with_calibration(
        datasets=datasets, num_samples=options.num_samples, seq_len=options.seq_len, moe_calib=options.moe_calib
    )


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one.

    Raises:
        EnvironmentFault: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(f"no device {name}: this machine has {count} CUDA GPUs", hint="use --device cpu")
        device = torch.device("cuda", device.index or 0)
    return device


def device_class(device: torch.device) -> str:
    """What may change the last bit of a product: the CPU, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# -- the road --------------------------------------------------------------------------------------


def _run(
    prepared: Prepared, options: Options, workspace: Workspace, fingerprint: Mapping[str, Any],
    progress: ProgressCallback, stop: Callable[[], None], run_log: RunLog,
) -> dict[str, Any]:  # fmt: skip
    job = _job(prepared, workspace, progress, stop)
    run_log.write("begin", fingerprint=dict(fingerprint), memory=str(job.memory), resumed=bool(_units(workspace)))
    if workspace.journal.find("commit") is None:
        _check_done_units(workspace)
        done = _units(workspace)
        left = prepared.plan.shard_bytes - sum(f["size"] for e in done for f in e["files"])
        check_disk(workspace.out, disk_needed(prepared.plan, job.sequences.num_tokens * job.source.config.hidden_size * 2,
                   rows_in_memory=job.memory.rows_in_memory) - prepared.plan.shard_bytes + left)  # fmt: skip
        for unit in prepared.plan.units:
            if workspace.journal.find("unit", name=unit.name) is None:
                started = time.monotonic()
                _run_unit(job, unit)
                run_log.write("unit", name=unit.name, seconds=time.monotonic() - started, rss_bytes=rss_bytes())
    progress(Progress(stage="commit", fraction=1.0))
    report, shards, documents = _result(prepared, workspace, fingerprint, job)
    workspace.commit(shards, documents)
    run_log.write("done", peak_rss_bytes=peak_rss_bytes())
    return report


def _job(prepared: Prepared, workspace: Workspace, progress: ProgressCallback, stop: Callable[[], None]) -> Job:
    """The shared state of all units; a resumed run keeps the first run's chunks, whatever its own budget is."""
    memory = prepared.memory
    settings = workspace.journal.find("settings")
    if settings is None:
        workspace.journal.append("settings", chunk_tokens=memory.chunk_tokens)
    elif settings["chunk_tokens"] != memory.chunk_tokens:
        memory = plan_memory(
            prepared.source.config, num_tokens=prepared.sequences.num_tokens, longest=max(prepared.sequences.lengths),
            device=prepared.device, budget=prepared.budget, chunk_tokens=settings["chunk_tokens"],
        )  # fmt: skip
    dropped = Dropped(len(prepared.sequences.lengths))
    for entry in _units(workspace):
        dropped.sequences |= set(entry.get("dropped", []))
    return Job(
        source=prepared.source, plan=prepared.plan, sequences=prepared.sequences,
        chunks=plan_chunks(prepared.sequences.lengths, memory.chunk_tokens), memory=memory, device=prepared.device,
        workspace=workspace, dropped=dropped, progress=progress, stop=stop,
    )  # fmt: skip


def _units(workspace: Workspace) -> list[dict[str, Any]]:
    return [e for e in workspace.journal.entries if e["step"] == "unit"]


def _check_done_units(workspace: Workspace) -> None:
    """After a crash: what the journal vouches for must really be there."""
    entries = _units(workspace)
    needed = _newest_with_hidden(entries)  # older hidden states are gone on purpose
    for entry in entries:
        files = [f for f in entry["files"] if entry is needed or not f["name"].startswith("hidden-")]
        if not workspace.intact({"files": files}):
            raise CheckpointError(
                f"{escape(workspace.out)}: files of step '{entry['name']}' are missing or damaged since they were written",
                hint="the disk may be failing; start again with --overwrite",
            )


def _newest_with_hidden(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((e for e in reversed(entries) if "hidden" in e), None)


def _run_unit(job: Job, unit: Unit) -> None:
    """Do one unit, record it, and drop the hidden states that it was made from."""
    before = _newest_with_hidden(_units(job.workspace))
    hidden = before["hidden"]["name"] if before else None
    if unit.layer is not None:
        assert hidden is not None
        last = unit.layer + 1 == job.source.config.num_hidden_layers
        entry = run_layer(job, unit, job.work / hidden, last=last)
    else:
        entry = run_head(job, unit) if unit.name == HEAD else run_embed(job, unit)
    if "hidden" in entry:
        entry["files"] = [*entry["files"], entry["hidden"]]
    job.workspace.journal.append("unit", name=unit.name, dropped=sorted(job.dropped.sequences), **entry)
    if "hidden" in entry and hidden is not None:
        (job.work / hidden).unlink(missing_ok=True)


# -- the result ------------------------------------------------------------------------------------


def _result(
    prepared: Prepared, workspace: Workspace, fingerprint: Mapping[str, Any], job: Job
) -> tuple[dict[str, Any], dict[str, str], dict[str, bytes]]:
    """(report, work file -> final shard name, small files)."""
    source, plan = prepared.source, prepared.plan
    written = [f for e in _units(workspace) for f in e["files"] if not f["name"].startswith("hidden-")]
    finals = plan.shard_names()
    shards = {f["name"]: final for f, final in zip(written, finals, strict=True)}
    documents = dict(prepared.documents)
    section = quantization_config(plan.exclude, plan.resolved.kv_cache)
    keep_code = sidecars.has_remote_code(documents)
    documents[CONFIG] = sidecars.to_json(output_config(source.raw_config, section, keep_auto_map=keep_code))
    documents["hf_quant_config.json"] = sidecars.to_json(hf_quant_config(plan.exclude, plan.resolved.kv_cache))
    documents[INDEX] = _index(plan, finals)
    location = source.location
    base_model = location.repo_id or source.folder.name
    report = build_report(
        version=m27quant.__version__, fingerprint=fingerprint,
        source={"name": base_model, "repo_id": location.repo_id, "commit": location.commit},
        recipe={"name": prepared.recipe.name, "kv_cache": plan.resolved.kv_cache, **prepared.recipe.canonical()},
        calibration=_calibration(prepared, job), records=[e["record"] for e in _units(workspace) if "record" in e],
        shards={final: {"size": f["size"], "sha256": f["sha256"]} for f, final in zip(written, finals, strict=True)},
        files=[*finals, *documents, REPORT, "README.md"],
        sizes={"source_bytes": source.total_bytes, "output_bytes": plan.tensor_bytes, "num_tensors": plan.num_tensors},
        notices=[*prepared.notices, *_findings(workspace, job)],
    )  # fmt: skip
    documents[REPORT] = sidecars.to_json(report)
    card = render_card(report, base_model=base_model, is_hub_model=location.repo_id is not None)
    documents["README.md"] = card.encode("utf-8", "backslashreplace")
    return report, shards, documents


def _calibration(prepared: Prepared, job: Job) -> dict[str, Any]:
    calibration = prepared.recipe.calibration
    return {
        "datasets": [Path(d.path).name if Path(d.path).is_file() else d.path for d in calibration.datasets],
        "num_samples": len(prepared.sequences.lengths),
        "num_tokens": prepared.sequences.num_tokens,
        "seq_len": calibration.seq_len,
        "moe_calib": prepared.plan.resolved.moe_calib,
        "tokens_sha256": prepared.sequences.digest,
        "dropped_rows": sorted(job.dropped.sequences),
    }


def _findings(workspace: Workspace, job: Job) -> list[str]:
    """What the work itself found noteworthy."""
    records = [e["record"] for e in _units(workspace) if "record" in e]
    zero = [name for r in records for name in r["zero_range"]]
    dead = [name for r in records for name in r["dead"]]
    found = []
    if job.dropped.sequences:
        found.append(f"{len(job.dropped.sequences)} calibration rows gave NaN or Inf and were dropped")
    if dead:
        found.append(f"{len(dead)} expert matrices are all zero ({dead[0]} ...)")
    if zero:
        found.append(f"{len(zero)} ranges were zero and take the widest of their kind in the layer ({zero[0]} ...)")
    return found


def _index(plan: Plan, finals: Sequence[str]) -> bytes:
    shards = [s for u in plan.units for s in u.shards]
    weight_map = {name: final for shard, final in zip(shards, finals, strict=True) for name in shard.offsets}
    index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _already_complete(workspace: Workspace, fingerprint: Mapping[str, Any], started: float) -> QuantizeResult:
    """`resume` on a finished output: check that it is the one that was asked for."""
    check_same(workspace.finished_fingerprint() or {}, json.loads(json.dumps(fingerprint)))
    if workspace.private.exists():
        workspace.discard_leftovers()
    report = json.loads((workspace.out / REPORT).read_bytes())
    elapsed = time.monotonic() - started
    return QuantizeResult(out=workspace.out, report=report, elapsed_s=elapsed, peak_rss_bytes=peak_rss_bytes(), was_complete=True)


def peak_rss_bytes() -> int:
    """Largest resident memory that this process has had."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()

