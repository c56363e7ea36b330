"""The drafter that a user names: `ngram`, or a folder with DFlash or EAGLE3 weights; its taps measured if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import UsageError
from m27quant.runtime.model import Model
from m27quant.runtime.probe import PROBE, hidden_states_of, logits_of
from m27quant.runtime.speculative.load import DrafterOptions, LoadedDrafter, load_drafter
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter
from m27quant.runtime.speculative.taps import TapChoice, measure_taps

NGRAM = "ngram"
PROBE_TOKENS = 400
"""The most that taps are measured on."""


def make_named(
    name: str | Path,
    options: DrafterOptions,
    tokenizer_folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Callable[[Model], Drafter]:
    """What makes the drafter once the target is loaded.

    Args:
        name: `ngram`, or a folder.
        options: what the user set.
        tokenizer_folder: the target's, for measuring taps.
        say: takes one line about each thing that was decided, the taps in any case.

    Raises (when it is called):
        CheckpointError: a drafter that is unreadable, unsupported, or not for this target.
        UsageError: options that this drafter does not have.
    """

    def make(model: Model) -> Drafter:
        if str(name) == NGRAM:
            return _ngram(options, say)

        def read(chosen: DrafterOptions) -> LoadedDrafter:
            return load_drafter(
                Path(name),
                model.config,
                model.embedding,
                model.head,
                chosen,
                dtype=model.dtype,
                device=model.device,
            )

        loaded = read(options)
        if options.tap_offset == "auto":
            choice = _measured(loaded, model, tokenizer_folder)
            if choice.hidden_states != loaded.drafter.taps:
                loaded = read(replace(options, tap_offset=1 if choice.offset else 0))
            say(choice.statement)
        for note in loaded.notes[1 if options.tap_offset == "auto" else 0 :]:
            say(note)
        return loaded.drafter

    return make


def _ngram(options: DrafterOptions, say: Callable[[str], None]) -> NgramDrafter:
    for field in ("num_steps", "eagle_topk", "tap_offset", "rope_theta"):
        if getattr(options, field) is not None:
            raise UsageError(f"prompt lookup (--drafter {NGRAM}) has no {field}", hint="leave it out")
    drafter = NgramDrafter() if options.num_draft_tokens is None else NgramDrafter(options.num_draft_tokens)
    say(f"drafter: prompt lookup, up to {drafter.num_draft_tokens} tokens a step")
    return drafter


def _measured(loaded: LoadedDrafter, model: Model, folder: Path) -> TapChoice:
    ids = Tokenizer(folder).rendered(PROBE)[:PROBE_TOKENS]
    return measure_taps(
        loaded.drafter,
        loaded.taps,
        model.config.num_hidden_layers,
        ids,
        logits_of(model, ids).argmax(-1).tolist(),
        lambda states: hidden_states_of(model, ids, states),
    )
