"""Train a DFlash or EAGLE3 drafter on what its target wrote: prepare -> for each step: learn -> write the drafter.

The states are the target's own, frozen; one batch of them is in memory at a time.  A run that is killed goes on from
its last state with `resume=True` and ends with the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.workspace import check_same
from m27quant.drafters.distributed import by_first
from m27quant.drafters.options import TrainOptions
from m27quant.drafters.prepare import Prepared, prepare
from m27quant.drafters.run import Run
from m27quant.drafters.state import TrainingFolder
from m27quant.errors import UsageError, escape
from m27quant.progress import ProgressCallback, ignore
from m27quant.runtime.device import pick_device
from m27quant.runtime.host_memory import limit_caches
from m27quant.runtime.parallel import join, leave, local_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished training."""

    out: Path
    kind: str
    steps: int
    loss: float
    """Mean of the last 100 steps."""
    accuracy: tuple[float, ...]
    """Of their positions: how often the first choice is the token that follows."""
    heldout: dict[str, Any] | None
    """The last evaluation: val_loss, accuracy, c_k, tau, m_accept, blocks."""
    parameters: int
    tensor_bytes: int
    elapsed_s: float
    """Of this process."""
    was_complete: bool = False
    """True when `resume` found nothing left to do."""


def train_drafter(
    kind: str,
    target: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    command: str | None = None,
    check: bool = True,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = log.info,
    **changes: Any,
) -> TrainResult:
    """Train a drafter for TARGET on DATA and write it to OUT.

    Under torchrun every rank takes its part of each batch; the first one writes.

    Args:
        kind: "dflash" or "eagle3".
        target: local folder or Hub id of an FP8, BF16 or NVFP4 checkpoint.
        data: data folders of `drafter generate-data`, or JSON-lines files.
        out: folder to create.
        options: see `TrainOptions`.
        command: what the model card is to say the drafter was made with.
        check: compare an NVFP4 target with verify's rules first.
        progress: called with snapshots of the work.
        stop: called at every step; raises `Interrupted` to end the run resumably.
        say: told what was decided.
        **changes: fields of `TrainOptions` by name, instead of or on top of `options`.

    Raises:
        TrainingError: the loss or the gradient is not finite; the last state is kept.
        M27Error: see m27quant.errors; nothing that looks like a drafter is left behind.
    """
    options = replace(options or TrainOptions(), **changes)
    started, out = time.monotonic(), Path(out)
    limit_caches()
    paths = [str(path) for path in ([data] if isinstance(data, str | Path) else data)]
    _check_paths(out, [str(target), *paths])
    device = pick_device(local_device(options.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives ask for the current one
    folder = TrainingFolder(out)
    ranks = join(device)
    try:
        by_first(ranks, lambda: folder.check(resume=options.resume, overwrite=options.overwrite))
        plan = prepare(kind, str(target), paths, options, ranks.size, say)
        if (done := by_first(ranks, lambda: _finished(folder, plan, options))) is not None:
            return _result(out, done, started, was_complete=True)
        run = Run(plan, options, folder, ranks, device, check, progress, stop, say)
        by_first(
            ranks,
            lambda: folder.open(
                plan.fingerprint, resume=options.resume, overwrite=options.overwrite,
                force_unlock=options.force_unlock,
            ),
        )  # fmt: skip
        return _result(out, run.to_the_end(command), started)
    finally:
        folder.close()
        leave()


def _check_paths(out: Path, inputs: Sequence[str]) -> None:
    for text in inputs:
        path = existing(text)
        if path is not None and path.resolve() in (out.resolve(), *out.resolve().parents):
            raise UsageError(f"{escape(out)} lies in the input {escape(path)}", hint="choose another OUT")


def _finished(folder: TrainingFolder, plan: Prepared, options: TrainOptions) -> dict[str, Any] | None:
    """What a resume finds where nothing is left to do."""
    record = folder.record() if options.resume else None
    if record is None:
        return None
    check_same(record["fingerprint"], plan.fingerprint)  # before the target is loaded
    return dict(record["result"]) if folder.is_finished() else None


def _result(out: Path, found: dict[str, Any], started: float, *, was_complete: bool = False) -> TrainResult:
    known = found | {"accuracy": tuple(found["accuracy"])}
    elapsed = time.monotonic() - started
    return TrainResult(out=out, elapsed_s=elapsed, was_complete=was_complete, **known)
