"""Quantize a MiniMax-M2.x checkpoint: the whole road, top to bottom.

prepare -> for each layer: calibrate, pack, make durable -> commit.  One layer (one group of experts, with a small
memory budget) is in memory at a time.  A run that is killed anywhere continues with `resume=True` and ends with
the same bytes.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m27quant.calib.activations import plan_chunks
from m27quant.calib.layerwise import Dropped
from m27quant.calib.memory import limit_caches, plan_memory
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.workspace import REPORT, Workspace, check_same
from m27quant.errors import CheckpointError, EnvironmentFault, escape
from m27quant.finish import build_result, is_hidden, output_names
from m27quant.layer_job import Job, run_embed, run_head, run_layer
from m27quant.plan import HEAD, Unit, check_disk, check_paths, disk_needed
from m27quant.prepare import Options, Prepared, prepare
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runlog import RunLog
from m27quant.runtime.host_memory import rss_bytes

log = logging.getLogger(__name__)


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


def quantize_checkpoint(
    model: str,
    out: str | Path,
    options: Options | None = None,
    *,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = log.info,
    **changes: Any,
) -> QuantizeResult:
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
    workspace = Workspace(out)
    if (folder := existing(model)) is not None:
        check_paths(folder, out)
    workspace.check(resume=options.resume, overwrite=options.overwrite)  # before anything long
    prepared = prepare(model, out, options, say)
    with prepared.source:
        fingerprint = prepared.fingerprint(options)
        if options.resume and workspace.is_complete():
            return _already_complete(workspace, fingerprint, started)
        workspace.open(
            fingerprint, resume=options.resume, overwrite=options.overwrite, force_unlock=options.force_unlock
        )
        try:
            workspace.refuse_collisions(output_names(prepared))
            with torch.inference_mode(), RunLog(workspace.private / "run.log") as run_log:
                report = _run(prepared, options, workspace, fingerprint, progress, stop, run_log)
        except BaseException as fault:
            workspace.abandon()
            if (named := _device_fault(fault)) is not None:
                raise named from fault
            raise
        finally:
            workspace.close()
    return QuantizeResult(
        out=out, report=report, elapsed_s=time.monotonic() - started, peak_rss_bytes=peak_rss_bytes()
    )


def _run(
    prepared: Prepared,
    options: Options,
    workspace: Workspace,
    fingerprint: Mapping[str, Any],
    progress: ProgressCallback,
    stop: Callable[[], None],
    run_log: RunLog,
) -> dict[str, Any]:
    limit_caches()
    job = _job(prepared, workspace, progress, stop)
    run_log.write(
        "begin",
        fingerprint=dict(fingerprint),
        memory=str(job.memory),
        resumed=bool(workspace.journal.all("unit")),
    )
    if workspace.journal.find("commit") is None:
        _check_done_units(workspace)
        done = workspace.journal.all("unit")
        left = prepared.plan.shard_bytes - sum(
            f["size"] for e in done for f in e["files"] if not is_hidden(f)
        )
        check_disk(
            workspace.out,
            disk_needed(
                prepared.plan,
                job.sequences.num_tokens * job.source.config.hidden_size * 2,
                rows_in_memory=job.memory.rows_in_memory,
            )
            - prepared.plan.shard_bytes
            + left,
        )
        # what is only copied comes first: a damaged head is found before the long work, not after it
        for unit in sorted(prepared.plan.units, key=lambda u: (u.layer is not None, u.name != HEAD)):
            if workspace.journal.find("unit", name=unit.name) is None:
                started = time.monotonic()
                _run_unit(job, unit)
                run_log.write(
                    "unit", name=unit.name, seconds=time.monotonic() - started, rss_bytes=rss_bytes()
                )
    progress(Progress(stage="commit", fraction=1.0))
    report, shards, documents = build_result(prepared, job, fingerprint)
    workspace.commit(shards, documents)
    run_log.write("done", peak_rss_bytes=peak_rss_bytes())
    return report


def _device_fault(fault: BaseException) -> EnvironmentFault | None:
    """What torch says of memory or of an accelerator that failed, as an error that can be resumed from."""
    first = escape(str(fault).partition("\n")[0])
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return EnvironmentFault(
            f"out of memory: {first}", hint="lower --max-memory, then run again with --resume"
        )
    if isinstance(fault, torch.AcceleratorError):
        return EnvironmentFault(
            f"the device failed: {first}", hint="when it is back (see `nvidia-smi`), run again with --resume"
        )
    return None


def _job(
    prepared: Prepared, workspace: Workspace, progress: ProgressCallback, stop: Callable[[], None]
) -> Job:
    """The shared state of all units; a resumed run keeps the first run's chunks, whatever its own budget is."""
    memory = prepared.memory
    settings = workspace.journal.find("settings")
    if settings is None:
        workspace.journal.append("settings", chunk_tokens=memory.chunk_tokens)
    elif settings["chunk_tokens"] != memory.chunk_tokens:
        memory = plan_memory(
            prepared.source.config,
            num_tokens=prepared.sequences.num_tokens,
            longest=max(prepared.sequences.lengths),
            device=prepared.device,
            budget=prepared.budget,
            chunk_tokens=settings["chunk_tokens"],
        )
    dropped = Dropped(len(prepared.sequences.lengths))
    for entry in workspace.journal.all("unit"):
        dropped.sequences |= set(entry.get("dropped", []))
    return Job(
        source=prepared.source,
        plan=prepared.plan,
        sequences=prepared.sequences,
        chunks=plan_chunks(prepared.sequences.lengths, memory.chunk_tokens),
        memory=memory,
        device=prepared.device,
        workspace=workspace,
        dropped=dropped,
        progress=progress,
        stop=stop,
    )


def _check_done_units(workspace: Workspace) -> None:
    """After a crash: what the journal vouches for must really be there."""
    entries = workspace.journal.all("unit")
    needed = _newest_with_hidden(entries)  # older hidden states are gone on purpose
    for entry in entries:
        files = [f for f in entry["files"] if entry is needed or not is_hidden(f)]
        if not workspace.intact({"files": files}):
            raise CheckpointError(
                f"{escape(workspace.out)}: files of step '{entry['name']}' are missing or damaged",
                hint="the disk may be failing; start again with --overwrite",
            )


def _newest_with_hidden(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((e for e in reversed(entries) if "hidden" in e), None)


def _run_unit(job: Job, unit: Unit) -> None:
    """Do one unit, record it, and drop the hidden states that it was made from."""
    before = _newest_with_hidden(job.workspace.journal.all("unit"))
    hidden = before["hidden"]["name"] if before else None
    if unit.layer is not None:
        assert hidden is not None
        last = unit.layer + 1 == job.source.config.num_hidden_layers
        entry = run_layer(job, unit, job.work / hidden, last=last)
    else:
        entry = run_head(job, unit) if unit.name == HEAD else run_embed(job, unit)
    job.source.recheck_all()  # what was read must be what was checked
    if "hidden" in entry:
        entry["files"] = [*entry["files"], entry["hidden"]]
    job.workspace.journal.append("unit", name=unit.name, dropped=sorted(job.dropped.sequences), **entry)
    if "hidden" in entry and hidden is not None:
        (job.work / hidden).unlink(missing_ok=True)


def _already_complete(workspace: Workspace, fingerprint: Mapping[str, Any], started: float) -> QuantizeResult:
    """`resume` on a finished output: check that it is the one that was asked for."""
    check_same(workspace.finished_fingerprint(), json.loads(json.dumps(fingerprint)))
    workspace.discard_leftovers()
    report = json.loads((workspace.out / REPORT).read_bytes())
    elapsed = time.monotonic() - started
    return QuantizeResult(
        out=workspace.out,
        report=report,
        elapsed_s=elapsed,
        peak_rss_bytes=peak_rss_bytes(),
        was_complete=True,
    )


def peak_rss_bytes() -> int:
    """Largest resident memory that this process has had."""
    with suppress(OSError):  # Linux; ru_maxrss would begin with the size of whoever started this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
