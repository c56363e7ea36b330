"""Where a run stands, by its journal: what is done, what is left, and what of it this run is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m27quant.calib.memory import MemoryPlan
from m27quant.checkpoint.journal import Journal
from m27quant.checkpoint.workspace import Workspace
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.finish import is_hidden
from m27quant.job import Job
from m27quant.layer_statistics import statistics_on_disk
from m27quant.plan import EMBED, HEAD, Plan, Unit, check_disk, disk_needed
from m27quant.prepare import Options, Prepared


def units_to_do(plan: Plan, options: Options) -> list[Unit]:
    """What `options` ask for, in the order in which it is done.

    What is only copied comes first: a damaged head is found before the long work, not after it.

    Raises:
        UsageError: layers that the model does not have.
    """
    units = sorted(plan.units, key=lambda u: (u.layer is not None, u.name != HEAD))
    if options.calibrate_only:
        return [u for u in units if u.name != HEAD]
    if options.layers is None:
        return units
    count = sum(u.layer is not None for u in units)
    first, end = options.layers[0], count if options.layers[1] is None else options.layers[1]
    if not 0 <= first < end <= count:
        raise UsageError(
            f"--layers {first}:{end}: the model has layers 0 to {count - 1}", hint=f"take a part of 0:{count}"
        )
    ends = {EMBED: first == 0, HEAD: end == count}
    return [u for u in units if (first <= u.layer < end if u.layer is not None else ends[u.name])]


def state(journal: Journal, memory: MemoryPlan) -> dict[str, Any]:
    """What all ranks must know to go on; a resumed run keeps the first run's chunks, whatever its own budget is."""
    settings = journal.find("settings")
    if settings is None:
        journal.append("settings", chunk_tokens=memory.chunk_tokens)
    entries = journal.all("unit")
    newest = newest_with_hidden(entries)
    return {
        "chunk_tokens": settings["chunk_tokens"] if settings else memory.chunk_tokens,
        "done": [entry["name"] for entry in entries],
        "dropped": sorted({row for entry in entries for row in entry.get("dropped", [])}),
        "hidden": newest["hidden"]["name"] if newest else None,
    }


def check_done_units(workspace: Workspace) -> None:
    """After a crash: what the journal vouches for must really be there."""
    entries = workspace.journal.all("unit")
    calibrated = workspace.journal.find("calibrated") is not None
    needed = None if calibrated else newest_with_hidden(entries)  # other hidden states are gone on purpose
    for entry in entries:
        files = [f for f in entry["files"] if entry is needed or not is_hidden(f)]
        if not workspace.intact({"files": files}):
            raise CheckpointError(
                f"{escape(workspace.out)}: files of step '{entry['name']}' are missing or damaged",
                hint="the disk may be failing; start again with --overwrite",
            )


def check_room(prepared: Prepared, options: Options, workspace: Workspace, job: Job) -> None:
    """Whether what is left to do fits on the disk."""
    done = workspace.journal.all("unit")
    written = sum(f["size"] for e in done for f in e["files"] if not is_hidden(f))
    needed = disk_needed(
        prepared.plan,
        prepared.hidden_bytes,
        rows_in_memory=job.memory.rows_in_memory,
        sums=statistics_on_disk(
            prepared.plan.resolved.algorithm, options.input_range, prepared.source.config, job.ranks.size
        ),
    )
    check_disk(workspace.out, needed - written)


def newest_with_hidden(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last step that made hidden states."""
    return next((e for e in reversed(entries) if "hidden" in e), None)
