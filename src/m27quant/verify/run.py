"""`verify_checkpoint`: all checks of a level over one folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from m27quant.checkpoint.hub import Location
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.progress import ProgressCallback
from m27quant.progress import ignore as nobody
from m27quant.verify.chat import check_chat_template
from m27quant.verify.checks import CHECKS
from m27quant.verify.collect import Findings
from m27quant.verify.configs import check_configs, read_configs
from m27quant.verify.container import read_container
from m27quant.verify.drafter import check_drafter
from m27quant.verify.engines import ENGINES, Engine, check_engines
from m27quant.verify.findings import Finding, Severity, VerifyResult
from m27quant.verify.findings import select as keep
from m27quant.verify.inventory import check_inventory
from m27quant.verify.locate import find_checkpoint
from m27quant.verify.serving import STRICT, Serving, check_serving, tensor_parallel_sizes
from m27quant.verify.types import check_types
from m27quant.verify.view import View

if TYPE_CHECKING:
    from m27quant.verify.full import SourceModel
    from m27quant.verify.logits import LogitsOptions
    from m27quant.verify.outputs import OutputsOptions

Level = Literal["quick", "default", "full"]
NEEDS_SCALES = {f"M27-S{number:03d}" for number in range(1, 22) if number != 17}
"""What headers cannot tell."""
OF_WEIGHTS, FIRST_OF_SOURCE = "M27-W", "M27-W010"
OF_SMALL_TENSORS = ("M27-W005", "M27-W007")
OF_SERVING, OF_DRAFTER, OF_LOGITS, OF_OUTPUTS = "M27-V", "M27-R", "M27-L", "M27-O"
OUTPUTS_OF_SOURCE = ("M27-O003", "M27-O006", "M27-O008")
OUTPUTS_OF_DRAFTER = ("M27-O010", "M27-O011", "M27-O012", "M27-O013")


def verify_checkpoint(
    checkpoint: str | os.PathLike[str] | Location,
    *,
    level: Level = "default",
    engine: Engine | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    source: SourceModel | str | None = None,
    progress: ProgressCallback = nobody,
    serving: Serving | None = None,
    drafter: str | os.PathLike[str] | None = None,
    logits: LogitsOptions | None = None,
    outputs: OutputsOptions | None = None,
) -> VerifyResult:
    """Check a folder that should hold MiniMax-M2.x in experts-only NVFP4.

    Args:
        checkpoint: the folder, or a Hub id (`org/name[@revision]`), or what `find_checkpoint` found.
        level: "quick" reads headers, index and configs; "default" also every scale; "full" all weights.
        engine: report only what concerns this engine; all where None.
        select: codes, or their beginnings, to report; all where empty.
        ignore: codes, or their beginnings, not to report.
        source: at level "full", the FP8 or BF16 model that every tensor is compared with: a folder or a Hub id.
        progress: called with snapshots of levels "default" and "full".
        serving: also whether it can be served in this way; nothing of it where None.
        drafter: folder of a DFlash or EAGLE3 drafter that is also checked against this target.
        logits: also how far its next-token probabilities are from the source's on a text; not where None.
        outputs: also run it, with `drafter` and beside `source` where they are given; not where None.

    Raises:
        UsageError: an unknown level, engine or code; a source at another level than full.
        CheckpointError: not a checkpoint of this model at all; all lesser faults are findings.
        EnvironmentFault: a file that exists and cannot be read, a Hub that cannot be reached.
    """
    select, ignore = _codes(select), _codes(ignore)
    _one_of("level", level, get_args(Level))
    if source is not None and level != "full" and logits is None and outputs is None:
        raise UsageError(
            "a source is compared with all weights", hint="take level full with it, or logits, or outputs"
        )
    if logits is not None and source is None:
        raise UsageError("logits are compared with the source's, which is not given")
    if engine is not None:
        _one_of("engine", engine, ENGINES)
    if not isinstance(checkpoint, Location):
        checkpoint = find_checkpoint(os.fspath(checkpoint), headers_only=level == "quick")
    found = Findings()
    view = read_container(checkpoint.folder, found)
    read_configs(view, found)
    check_inventory(view, found)
    check_types(view, found)
    check_engines(view, found, ENGINES if engine is None else (engine,))
    check_configs(view, found)
    check_chat_template(view, found)
    if level != "quick":
        from m27quant.verify.scales import check_scales  # numpy: not for headers alone

        check_scales(view, found, progress if level == "default" else nobody)
        from m27quant.verify.small import check_small

        check_small(view, found, finite=level != "full")
    more: dict[str, Any] = {}
    if level == "full":
        from m27quant.verify.full import check_full  # the kernels, and torch

        more |= check_full(view, found, _source_model(source), progress)
    if logits is not None:
        more["logits"] = _logits(view, found, source, logits, progress)
    facts = _facts(view) | more
    if serving:
        for name, of_engine in check_serving(
            view, found, serving, ENGINES if engine is None else (engine,)
        ).items():
            facts[f"serving_{name}"] = of_engine
    if drafter is not None and view.config is not None:
        facts["drafter"] = check_drafter(Path(drafter), view.config, found, values=level != "quick")
    if outputs is not None:
        facts["outputs"] = _outputs(view, found, source, drafter, outputs, progress)
    run = [code for code in CHECKS if level != "quick" or code not in NEEDS_SCALES]
    run = [code for code in run if not code.startswith(OF_WEIGHTS) or _reads_weights(code, level, source)]
    if not serving:
        run = [code for code in run if not code.startswith(OF_SERVING)]
    if drafter is None:
        run = [code for code in run if not code.startswith(OF_DRAFTER)]
    if "kl_mean" not in more.get("logits", {}):
        run = [code for code in run if not code.startswith(OF_LOGITS)]
    if "layers" not in facts.get("outputs", {}):
        run = [code for code in run if not code.startswith(OF_OUTPUTS)]
    if source is None:
        run = [code for code in run if code not in OUTPUTS_OF_SOURCE]
    if drafter is None:
        run = [code for code in run if code not in OUTPUTS_OF_DRAFTER]
    return VerifyResult(
        checkpoint=_name(checkpoint),
        level=level,
        findings=tuple(_chosen(found, engine, select, ignore)),
        facts=facts,
        checks_run=tuple(code for code in run if _concerns(code, engine) and _wanted(code, select, ignore)),
    )


def _name(location: Location) -> str:
    """A folder as it was typed; a Hub id with the commit that it stood for."""
    if location.repo_id is None:
        return escape(location.folder, 4096)
    return f"{location.repo_id}@{location.commit}"


def _source_model(source: SourceModel | str | None) -> SourceModel | None:
    from m27quant.verify.full import SourceModel

    return SourceModel(model=source) if isinstance(source, str) else source


def _logits(
    view: View,
    found: Findings,
    source: SourceModel | str | None,
    options: LogitsOptions,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """The figures, or why there are none: what cannot be computed was found by other checks before."""
    from m27quant.verify.logits import compare_with_source  # the runtime, and torch

    model = _source_model(source)
    assert model is not None
    with model.open() as opened:
        try:
            return compare_with_source(view.folder, opened, options, found, progress=progress)
        except CheckpointError as fault:
            if not any(f.severity is Severity.ERROR for f in found.finish()):
                raise
            return {"not_computed": fault.message}


def _outputs(
    view: View,
    found: Findings,
    source: SourceModel | str | None,
    drafter: str | os.PathLike[str] | None,
    options: OutputsOptions,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """The figures, or why the checkpoint could not be run: what other checks found before."""
    from m27quant.verify.outputs import check_outputs  # the runtime, and torch

    model = _source_model(source)
    name = None if drafter is None else os.fspath(drafter)
    with nullcontext() if model is None else model.open() as opened:
        try:
            return check_outputs(view.folder, opened, name, options, found, progress=progress)
        except CheckpointError as fault:
            if not any(f.severity is Severity.ERROR for f in found.finish()):
                raise
            return {"not_run": fault.message}


def _chosen(
    found: Findings, engine: Engine | None, only: tuple[str, ...], ignore: tuple[str, ...]
) -> list[Finding]:
    return [f for f in keep(found.finish(), only=only, ignore=ignore) if _concerns(f.check.code, engine)]


def _reads_weights(code: str, level: Level, source: object) -> bool:
    """Whether a check of weights applies at this level; from W010 on it compares with a source."""
    if level == "default":
        return code in OF_SMALL_TENSORS
    return level == "full" and (source is not None or code < FIRST_OF_SOURCE)


def _wanted(code: str, only: tuple[str, ...], ignore: tuple[str, ...]) -> bool:
    """As `select` has it for findings."""
    return (not only or code.startswith(only)) and not (ignore and code.startswith(ignore))


def _concerns(code: str, engine: Engine | None) -> bool:
    engines = CHECKS[code].engines
    return engine is None or not engines or engine in engines


def _codes(codes: Iterable[str]) -> tuple[str, ...]:
    chosen = tuple(codes)
    for code in chosen:
        if not code or not any(known.startswith(code) for known in CHECKS):
            raise UsageError(
                f"unknown check '{escape(code)}'",
                hint="codes look like M27-T001; a beginning means all of it",
            )
    return chosen


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown {what} '{escape(value)}'", hint=f"one of: {', '.join(known)}")


def _facts(view: View) -> dict[str, Any]:
    """What the checkpoint is."""
    stored: Counter[str] = Counter()
    for info in view.tensors.values():
        stored[info.dtype] += info.nbytes
    facts: dict[str, Any] = {
        "num_tensors": len(view.tensors),
        "num_shards": len(view.shard_sizes),
        "total_bytes": sum(view.shard_sizes.values()),
        "bytes_by_dtype": dict(sorted(stored.items())),
        "quant_algo": _text((view.section or view.hf_quant or {}).get("quant_algo")),
        "kv_cache": "fp8" if view.kv_declared else "bf16",
        "kv_scales": sum(n.endswith((".k_scale", ".v_scale")) for n in view.tensors),
    }
    if (c := view.config) is not None:
        facts |= {
            "num_hidden_layers": c.num_hidden_layers,
            "num_local_experts": c.num_local_experts,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "vocab_size": c.vocab_size,
            "tensor_parallel_sizes": tensor_parallel_sizes(c),
            "tensor_parallel_unpadded": tensor_parallel_sizes(c, STRICT),
        }
    return facts


def _text(value: object) -> str | None:
    return None if value is None else escape(value)
