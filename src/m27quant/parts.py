"""The ends of runs that do less than all: a calibration for others to pack by, or a part of the layers.

Both stay unfinished runs of their folder: their journals are what they have made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m27quant.calib.layer_ranges import LayerRanges
from m27quant.calib.ranges_file import NAME, Calibrated, write_calibrated
from m27quant.checkpoint.durable import sha256_of
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.workspace import Workspace
from m27quant.finish import shown_recipe
from m27quant.prepare import Options, Prepared


def finish_calibration(
    prepared: Prepared, workspace: Workspace, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Write OUT/calibration.json from the journal; returns what to tell of it."""
    done = workspace.journal.all("unit")
    by_layer = {e["name"]: e["ranges"] for e in done if "ranges" in e}
    path = workspace.out / NAME
    found = Calibrated(
        fingerprint=dict(fingerprint),
        settings=shown_recipe(prepared)["calibration"],
        lengths=tuple(prepared.sequences.lengths),
        dropped=tuple(sorted({row for e in done for row in e["dropped"]})),
        notices=tuple(prepared.data_notices),
        layers=tuple(LayerRanges(**by_layer[u.name]) for u in prepared.plan.units if u.layer is not None),
    )
    write_calibrated(path, found)
    if workspace.journal.find("calibrated") is None:
        workspace.journal.append("calibrated", sha256=sha256_of(path))
    for left in workspace.work.glob("hidden-*"):  # the last layer's input, which nothing needs any more
        left.unlink()
    return {"calibration": str(path), "num_tokens": sum(found.lengths), "num_layers": len(found.layers)}


def finish_part(
    prepared: Prepared, model: str, options: Options, workspace: Workspace, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Record that this part is whole, and what `assemble` needs to read the same source again."""
    journal = workspace.journal
    units = [entry["name"] for entry in journal.all("unit")]
    if journal.find("part") is None:
        journal.append(
            "part",
            fingerprint=dict(fingerprint),
            model=_anywhere(model),
            recipe=_anywhere(options.recipe),
            revision=options.revision,
            max_shard_size=options.max_shard_size,
            ranges=_anywhere(str(options.ranges)),
            device=options.device,
        )
    size = sum(f["size"] for e in journal.all("unit") for f in e["files"])
    return {"part": str(workspace.out), "units": units, "size": size}


def _anywhere(name: str) -> str:
    """A path that is right from any folder; what is no path is left."""
    return name if existing(name) is None else str(Path(name).absolute())
