"""One text through a loaded model, beside whatever else it does: logits, hidden states, what experts see.

Shapes: T tokens, V vocabulary, K taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.model import Model, Observe, Rows


@torch.inference_mode()
def logits_of(model: Model, ids: Sequence[int], observe: Observe | None = None) -> Tensor:
    """F32 [T, V] behind each of the ids; `observe` as in `Model.forward`."""
    rows, cache = _one_sequence(model, ids, 0)
    return model.logits(model.forward(rows, cache, observe=observe))


@torch.inference_mode()
def hidden_states_of(model: Model, ids: Sequence[int], states: Sequence[int]) -> Tensor:
    """[T, K*D] at each of the ids: these hidden states side by side, in this order."""
    rows, cache = _one_sequence(model, ids, len(states))
    model.forward(rows, cache, states)
    assert cache.taps is not None
    return cache.taps[: len(ids)].flatten(1)


def _one_sequence(model: Model, ids: Sequence[int], num_taps: int) -> tuple[Rows, KvCache]:
    """All of a text in one forward pass, with a cache of its own in the model's dtype."""
    config, device, size = model.config, model.device, len(ids)
    shape = CacheShape(
        num_layers=config.num_hidden_layers, num_kv_heads=model.num_kv_heads, head_dim=config.head_dim,
        dtype=model.dtype, block_size=size, num_taps=num_taps, hidden_size=config.hidden_size,
        taps_dtype=model.dtype,
    )  # fmt: skip
    positions = torch.arange(size, device=device)
    return Rows(
        ids_T=torch.tensor(list(ids), device=device),
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
