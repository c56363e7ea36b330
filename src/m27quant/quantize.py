"""Quantize a MiniMax-M2.x checkpoint: the whole road, top to bottom.

prepare -> for each layer: calibrate, pack, make durable -> commit.  One layer (one group of experts, with a small
memory budget) is in memory at a time.  A run that is killed anywhere continues with `resume=True` and ends with
the same bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m27quant.calib.layerwise import Dropped
from m27quant.calib.ranges_file import Calibrated
from m27quant.checkpoint.journal import Journal
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.workspace import Workspace, check_same, differences
from m27quant.copy_job import run_embed, run_head
from m27quant.distributed.ranks import ALONE, Ranks
from m27quant.errors import UsageError
from m27quant.finish import build_result, output_names
from m27quant.job import Job
from m27quant.layer_job import pack_layer, run_layer
from m27quant.parts import finish_calibration, finish_part
from m27quant.plan import HEAD, Unit, check_paths
from m27quant.prepare import Options, Prepared, prepare
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runlog import RunLog
from m27quant.runtime.device import device_fault
from m27quant.runtime.host_memory import limit_caches, peak_rss_bytes, rss_bytes
from m27quant.shares import share_of
from m27quant.standing import check_done_units, check_room, state, units_to_do

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
    ranks: Ranks = ALONE,
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
        ranks: the processes that call this together, with the same arguments and a file system that all see; the
            bytes are those of one process alone.
        **changes: fields of `Options` by name, instead of or on top of `options`.

    Raises:
        M27Error: see m27quant.errors; nothing that looks like a checkpoint is left behind.
    """
    options = replace(options or Options(), **changes)
    started = time.monotonic()

    def look() -> None:
        ranks.check()  # first: a launcher sends signals to all where one has died
        stop()

    try:
        work = _lead if ranks.is_first else _follow
        report, was_complete = work(model, Path(out), options, progress, look, say, ranks)
    except BaseException as fault:
        named = device_fault(fault)
        ranks.fail(named or fault)
        if named is not None:
            raise named from fault
        raise
    return QuantizeResult(
        out=Path(out),
        report=report,
        elapsed_s=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        was_complete=was_complete,
    )


Outcome = tuple[dict[str, Any], bool]
"""The report, and whether there was nothing left to do."""


def _lead(
    model: str,
    out: Path,
    options: Options,
    progress: ProgressCallback,
    stop: Callable[[], None],
    say: Callable[[str], None],
    ranks: Ranks,
) -> Outcome:
    """The first rank, or the only one: holds the lock, keeps the journal, commits."""
    workspace = Workspace(out)
    if (folder := existing(model)) is not None:
        check_paths(folder, out)
    workspace.check(resume=options.resume, overwrite=options.overwrite)  # before anything long
    prepared = prepare(model, out, options, say)
    with prepared.source:
        fingerprint = prepared.fingerprint(options)
        units_to_do(prepared.plan, options)
        if options.resume and workspace.is_complete():
            report, was_complete = _already_complete(workspace, fingerprint), True
            ranks.share("begin", {"fingerprint": fingerprint, "is_complete": True}, stop)
        else:
            workspace.open(
                fingerprint | prepared.task(options),
                resume=options.resume,
                overwrite=options.overwrite,
                force_unlock=options.force_unlock,
            )
            try:
                workspace.refuse_collisions(output_names(prepared, options))
                with torch.inference_mode(), RunLog(workspace.private / "run.log") as run_log:
                    report = _run(
                        prepared, model, options, workspace, fingerprint, progress, stop, run_log, ranks
                    )
            except BaseException:
                workspace.abandon()
                raise
            finally:
                workspace.close()
            was_complete = False
    ranks.share("end", report, stop)
    return report, was_complete


def _follow(
    model: str,
    out: Path,
    options: Options,
    progress: ProgressCallback,
    stop: Callable[[], None],
    say: Callable[[str], None],
    ranks: Ranks,
) -> Outcome:
    """Any other rank: does its share of every unit, and writes nothing of its own."""
    begun = ranks.share("begin", None, stop)  # what the first has fetched from the Hub is there now
    if not begun["is_complete"]:
        prepared = prepare(model, out, options, say)
        with prepared.source, torch.inference_mode():
            own = prepared.fingerprint(options)
            if lines := differences(begun["fingerprint"], own, "on rank 0", "here"):
                raise UsageError(
                    f"not the inputs of rank 0: {lines}",
                    hint="all ranks need the same files, versions and kind of device",
                )
            job = _job(prepared, options, Workspace(out).work, begun, progress, stop, ranks)
            for unit in units_to_do(prepared.plan, options):
                if unit.name not in begun["done"]:
                    begun["hidden"] = _run_unit(job, unit, begun["hidden"], None, prepared.calibrated)
    return ranks.share("end", None, stop), begun["is_complete"]


def _run(
    prepared: Prepared,
    model: str,
    options: Options,
    workspace: Workspace,
    fingerprint: Mapping[str, Any],
    progress: ProgressCallback,
    stop: Callable[[], None],
    run_log: RunLog,
    ranks: Ranks,
) -> dict[str, Any]:
    journal = workspace.journal
    begun = {"fingerprint": fingerprint, "is_complete": False, **state(journal, prepared.memory)}
    job = _job(prepared, options, workspace.work, begun, progress, stop, ranks)
    run_log.write(
        "begin",
        fingerprint=dict(fingerprint),
        memory=str(job.memory),
        resumed=bool(begun["done"]),
        ranks=ranks.size,
    )
    if journal.find("commit") is None:
        check_done_units(workspace)
        check_room(prepared, options, workspace, job)
        ranks.share("begin", begun, stop)
        hidden = begun["hidden"]
        for unit in units_to_do(prepared.plan, options):
            if unit.name not in begun["done"]:
                started = time.monotonic()
                hidden = _run_unit(job, unit, hidden, journal, prepared.calibrated)
                run_log.write(
                    "unit", name=unit.name, seconds=time.monotonic() - started, rss_bytes=rss_bytes()
                )
    else:
        ranks.share("begin", begun, stop)
    if options.calibrate_only:
        return finish_calibration(prepared, workspace, fingerprint)
    if options.layers is not None:
        return finish_part(prepared, model, options, workspace, fingerprint)
    progress(Progress(stage="commit", fraction=1.0))
    done = {entry["name"]: entry for entry in journal.all("unit")}
    report, shards, documents = build_result(prepared, done, sorted(job.dropped.sequences), fingerprint)
    workspace.commit(shards, documents)
    run_log.write("done", peak_rss_bytes=peak_rss_bytes())
    return report


def _job(
    prepared: Prepared,
    options: Options,
    work: Path,
    begun: Mapping[str, Any],
    progress: ProgressCallback,
    stop: Callable[[], None],
    ranks: Ranks,
) -> Job:
    """The shared state of all units, with this rank's chunks."""
    limit_caches()
    if prepared.device.type == "cuda":
        torch.cuda.set_device(prepared.device)
    lengths, calibrated = prepared.sequences.lengths, prepared.calibrated
    mine, memory = share_of(prepared, options, ranks, begun["chunk_tokens"])
    return Job(
        source=prepared.source,
        plan=prepared.plan,
        sequences=prepared.sequences,
        chunks=mine,
        memory=memory,
        device=prepared.device,
        work=work,
        ranks=ranks,
        dropped=Dropped(len(lengths), {*begun["dropped"], *(calibrated.dropped if calibrated else ())}),
        input_range=options.input_range,
        packs=not options.calibrate_only,
        progress=progress,
        stop=stop,
    )


def _run_unit(
    job: Job, unit: Unit, hidden: str | None, journal: Journal | None, calibrated: Calibrated | None
) -> str | None:
    """Do one unit with all ranks; the first records it, and drops the hidden states that it was made from.

    Returns the name of the newest hidden states.
    """
    if unit.layer is None:
        only_copied = unit.name == HEAD or calibrated is not None
        entry = run_head(job, unit) if only_copied else run_embed(job, unit)
    elif calibrated is not None:
        entry = pack_layer(job, unit, calibrated.layers[unit.layer])
    else:
        assert hidden is not None
        last = unit.layer + 1 == job.source.config.num_hidden_layers
        entry = run_layer(job, unit, job.work / hidden, last=last)
    job.source.recheck_all()  # what was read must be what was checked
    for dropped in job.ranks.gather("unit done", sorted(job.dropped.sequences), job.stop):
        job.dropped.update(dropped)
    if journal is not None:
        if "hidden" in entry:
            entry["files"] = [*entry["files"], entry["hidden"]]
        journal.append("unit", name=unit.name, dropped=sorted(job.dropped.sequences), **entry)
    newest: str | None = job.ranks.share("unit recorded", entry.get("hidden", {}).get("name"), job.stop)
    if journal is not None and newest is not None and hidden is not None:
        (job.work / hidden).unlink(missing_ok=True)
    return newest or hidden


def _already_complete(workspace: Workspace, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """`resume` on a finished output: check that it is the one that was asked for; returns its report."""
    check_same(workspace.finished_fingerprint(), json.loads(json.dumps(fingerprint)))
    workspace.discard_leftovers()
    return workspace.finished_report()
