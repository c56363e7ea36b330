"""The drafter that a user names: `ngram`, or a folder with DFlash or EAGLE3 weights; its taps measured if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import UsageError
from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.model import Model, Rows
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
        loaded = load_drafter(
            Path(name),
            model.config,
            model.embedding,
            model.head,
            options,
            dtype=model.dtype,
            device=model.device,
        )
        if options.tap_offset == "auto":
            choice = _measured(loaded, model, tokenizer_folder)
            chosen = replace(options, tap_offset=1 if choice.offset else 0)
            loaded = load_drafter(
                Path(name),
                model.config,
                model.embedding,
                model.head,
                chosen,
                dtype=model.dtype,
                device=model.device,
            )
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
        _choices(model, ids),
        lambda states: _hidden_states(model, ids, states),
    )


@torch.inference_mode()
def _choices(model: Model, ids: list[int]) -> list[int]:
    """The target's likeliest token behind each of the ids."""
    rows, cache = _one_sequence(model, ids, 0)
    chosen: list[int] = model.logits(model.forward(rows, cache)).argmax(-1).tolist()
    return chosen


@torch.inference_mode()
def _hidden_states(model: Model, ids: list[int], states: tuple[int, ...]) -> Tensor:
    """[T, K*D] at each of the ids."""
    rows, cache = _one_sequence(model, ids, len(states))
    model.forward(rows, cache, states)
    assert cache.taps is not None
    return cache.taps[: len(ids)].flatten(1)


def _one_sequence(model: Model, ids: list[int], num_taps: int) -> tuple[Rows, KvCache]:
    """All of a text in one forward pass, with a cache of its own in the model's dtype."""
    config, device, size = model.config, model.device, len(ids)
    shape = CacheShape(
        num_layers=config.num_hidden_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        dtype=model.dtype, block_size=size, num_taps=num_taps, hidden_size=config.hidden_size,
        taps_dtype=model.dtype,
    )  # fmt: skip
    positions = torch.arange(size, device=device)
    return Rows(
        ids_T=torch.tensor(ids, device=device),
        positions_T=positions,
        slots_T=positions,
        block_table_SB=torch.zeros(1, 1, dtype=torch.int32, device=device),
        sequence_T=torch.zeros(size, dtype=torch.int32, device=device),
        context_T=(positions + 1).to(torch.int32),
        tail_TX=None,
    ), KvCache(shape, 1, device)


PROBE = '''"""Reading settings from a file, with defaults and clear errors."""

import json
import os
from pathlib import Path


class SettingsError(Exception):
    """Raised when a settings file cannot be used."""


def read_settings(path, defaults=None):
    """Return a dictionary of settings.

    The file must hold a JSON object.  Keys that are missing are taken from
    `defaults`, and unknown keys are refused so that a typing mistake is noticed.
    """
    settings = dict(defaults or {})
    if not os.path.exists(path):
        return settings
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise TypeError("expected an object, got %s" % type(data).__name__)
    for key, value in data.items():
        if key not in settings:
            raise SettingsError(f"unknown setting: {key!r}")
        settings[key] = value
    return settings


def write_settings(path, settings):
    """Write the settings so that a reader never sees half a file."""
    temporary = Path(path).with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2, sort_keys=True)
        file.write("\\n")
    os.replace(temporary, path)
'''
