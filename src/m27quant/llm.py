"""`load`: a checkpoint is checked by verify's rules, then loaded to be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.quantized import QuantizedSource, open_checkpoint
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, escape
from m27quant.runtime.load import MakeDrafter, load_llm
from m27quant.runtime.options import RunOptions
from m27quant.verify.findings import Severity
from m27quant.verify.run import verify_checkpoint

if TYPE_CHECKING:
    from m27quant.runtime.api import LLM
    from m27quant.runtime.speculative.proposal import Drafter

SHOWN = 5


def load(
    checkpoint: str | Path,
    options: RunOptions | None = None,
    *,
    drafter: Drafter | MakeDrafter | None = None,
    check: bool = True,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **changes: Any,
) -> LLM:
    """Load a checkpoint for generation.

    Args:
        checkpoint: a folder or a Hub id: NVFP4, or an FP8 or BF16 MiniMax-M2.x.
        options: how to run it.
        drafter: proposes tokens; or a function that makes it from the loaded model.
        check: compare it with verify's rules first, every scale included; headers are compared in any case.
        say: takes one line about each thing that was decided.
        progress: called with layers loaded and layers in all.
        changes: fields of `options` to replace.

    Raises:
        CheckpointError: `verify` finds errors, which are named; or a weight cannot be computed with.
        EnvironmentFault: no such device, or the model does not fit; says what is needed.
        UsageError: options that do not go with the checkpoint.
    """
    options = replace(options or RunOptions(), **changes)
    location = locate(str(checkpoint))
    with open_checkpoint(location) as source:
        _refuse_faulty(source, check, say)
        make = drafter if callable(drafter) or drafter is None else lambda model: drafter
        return load_llm(source, options, make_drafter=make, say=say, progress=progress)


def _refuse_faulty(source: Source, check: bool, say: Callable[[str], None]) -> None:
    """The layout always; an NVFP4 checkpoint also by verify's rules, unless it was done already."""
    if not isinstance(source, QuantizedSource):
        for notice in (*check_layout(source), *source.warnings):
            say(notice)
        return
    if check:
        found = verify_checkpoint(source.folder).findings
        errors = [f for f in found if f.severity is Severity.ERROR]
        if errors:
            shown = "; ".join(f"{f.check.code} {f.message}" for f in errors[:SHOWN])
            more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
            raise CheckpointError(
                f"{escape(source.folder)}: the checkpoint has errors: {shown}{more}",
                hint=f"m27quant verify {escape(source.folder)} tells all of them and how to mend them",
            )
    source.check_layout(input_scales=False)
