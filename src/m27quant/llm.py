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
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.runtime.load import MakeDrafter, load_llm
from m27quant.runtime.options import RunOptions
from m27quant.runtime.speculative.choose import NGRAM, make_named
from m27quant.runtime.speculative.load import DrafterOptions
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
    drafter: str | Path | Drafter | MakeDrafter | None = None,
    drafter_options: DrafterOptions | None = None,
    check: bool = True,
    alone: bool = False,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **changes: Any,
) -> LLM:
    """Load a checkpoint for generation.

    Args:
        checkpoint: a folder or a Hub id: NVFP4, or an FP8 or BF16 MiniMax-M2.x.
        options: how to run it.
        drafter: a folder with a DFlash or EAGLE3 drafter, `ngram` for prompt lookup, a drafter, or a function that
            makes one from the loaded model.
        drafter_options: for a drafter that is named.
        check: compare it with verify's rules first, every scale included; headers are compared in any case.
        alone: under torchrun too this process holds the whole model, not its rank's share of it.
        revision: of a Hub id.
        offline: take from the Hub's cache only.
        token: for the Hub.
        say: takes one line about each thing that was decided.
        progress: called with layers loaded and layers in all.
        changes: fields of `options` to replace.

    Raises:
        CheckpointError: `verify` finds errors, which are named; or a weight cannot be computed with.
        EnvironmentFault: no such device, or the model does not fit; says what is needed.
        UsageError: options that do not go with the checkpoint.
    """
    options = replace(options or RunOptions(), **changes)
    location = locate(str(checkpoint), revision=revision, offline=offline, token=token)
    if location.repo_id is not None:
        say(location.describe())
    with open_checkpoint(location) as source:
        _refuse_faulty(source, check, say)
        hub = {"offline": offline, "token": token}
        make = _maker(drafter, drafter_options, source.folder, say, hub)
        return load_llm(source, options, make_drafter=make, alone=alone, say=say, progress=progress)


def _maker(
    drafter: str | Path | Drafter | MakeDrafter | None,
    options: DrafterOptions | None,
    folder: Path,
    say: Callable[[str], None],
    hub: dict[str, Any],
) -> MakeDrafter | None:
    if isinstance(drafter, str | Path):
        where = drafter if str(drafter) == NGRAM else locate(str(drafter), **hub).folder
        return make_named(where, options or DrafterOptions(), folder, say)
    if options is not None:
        raise UsageError("drafter_options are for a drafter that is named", hint="set them on the drafter")
    if drafter is None or callable(drafter):
        return drafter
    return lambda model: drafter


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
