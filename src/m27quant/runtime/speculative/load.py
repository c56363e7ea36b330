"""A drafter from its folder: which one it is, whether it fits the target, and its weights; strict, nothing is guessed.

DFlash comes in the layouts of z-lab, SpecForge, modelopt and speculators, EAGLE3 as `midlayer.*` and `layers.0.*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import (
    DrafterConfig,
    Taps,
    parse_drafter,
    read_taps,
)
from m27quant.checkpoint.drafter_weights import read_headers
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import check_link_stays_inside
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.runtime.speculative.config import Eagle3Settings, read_dflash, read_eagle3
from m27quant.runtime.speculative.decoder import Shared
from m27quant.runtime.speculative.dflash import DFlashDrafter, DFlashWeights
from m27quant.runtime.speculative.eagle3 import DEFAULT_STEPS, Eagle3Drafter, Eagle3Weights
from m27quant.runtime.speculative.taps import TapChoice, TapOffset, choose_taps
from m27quant.runtime.speculative.weights import HINT, DrafterTensors, shared_weights

TOLERATED = {"M27-R017", "M27-R019", "M27-R021", "M27-R022", "M27-R023"}
"""What concerns other engines, or is stated with the taps: it does not stop this one."""
DOUBTFUL_TAPS = {"M27-R016", "M27-R020"}
"""What is settled where the user says how taps are counted."""
MAX_PADDING = 63
"""Rows by which a vocabulary may be larger than the tokens in it: padding to a multiple of 64."""
QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """What a user can set; None is the drafter's own or the kind's default."""

    num_draft_tokens: int | None = None
    """DFlash: drafts a step.  EAGLE3: rows that are verified, the root included."""
    num_steps: int | None = None
    """EAGLE3: depth."""
    eagle_topk: int | None = None
    """EAGLE3: branches; 1 is a chain."""
    tap_offset: TapOffset | None = None
    """None: by the config's convention.  "auto" too, until `measure_taps` is asked."""
    rope_theta: float | None = None


@dataclass(frozen=True, slots=True)
class LoadedDrafter:
    """A drafter and what is to be said of it."""

    kind: Literal["dflash", "eagle3"]
    drafter: DFlashDrafter | Eagle3Drafter
    taps: Taps
    choice: TapChoice
    notes: tuple[str, ...]


class _Strict:
    """Faults of a config: errors stop, notes are kept."""

    def __init__(self, tolerated: set[str]) -> None:
        self.tolerated = tolerated
        self.notes: dict[str, str] = {}

    def add(self, code: str, message: str, /, *, expected: object = None, found: object = None) -> None:
        if code not in self.tolerated:
            wanted = "" if expected is None else f", expected: {escape(expected)}"
            raise CheckpointError(f"{message}{wanted}", hint=f"{HINT} (m27quant explain {code})")
        self.notes[code] = message

    def codes(self) -> set[str]:
        return set(self.notes)


def load_drafter(
    folder: Path,
    target: M2Config,
    embed_VD: Tensor,
    head_VD: Tensor,
    options: DrafterOptions | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> LoadedDrafter:
    """Read the drafter in `folder` for a target.

    Args:
        folder: config.json and safetensors.
        target: the target's config.
        embed_VD: its embedding, borrowed unless the drafter brings one.
        head_VD: its head, borrowed by drafters of the full vocabulary that bring none.
        options: what a user set.
        dtype: to compute with, BF16 or F32.
        device: to compute on.

    Raises:
        CheckpointError: unreadable, unsupported (by name), or not for this target (the field and both values).
        UsageError: options that this drafter does not have, or out of bounds.
        EnvironmentFault: files that cannot be read.
    """
    options = options or DrafterOptions()
    config, tensors, faults = read_drafter(folder, target, options)
    taps = read_taps(config, target.num_hidden_layers, faults)
    if taps is None:
        unclear = "drafter: no taps are stated, and the target is too small for the engines' defaults"
        raise CheckpointError(faults.notes.get("M27-R016", unclear), hint=HINT)
    offset = None if options.tap_offset == "auto" else options.tap_offset
    choice = choose_taps(taps, target.num_hidden_layers, offset)
    is_dflash = config.kind == "dflash"
    make = _dflash(config, target, options) if is_dflash else _eagle3(config, tensors, options)
    weights = DrafterTensors(config, tensors, len(choice.hidden_states), dtype, torch.device(device))
    drafter = make(weights, shared_weights(config, weights, target, embed_VD, head_VD), choice.hidden_states)
    notes = [choice.statement, *_notes(config, target, drafter, faults)]
    return LoadedDrafter(config.kind, drafter, taps, choice, tuple(notes))


def read_drafter(
    folder: Path, target: M2Config, options: DrafterOptions
) -> tuple[DrafterConfig, dict[str, TensorInfo], _Strict]:
    """Config and headers of a drafter that can be run and is for this target; errors as `load_drafter`."""
    if not folder.is_dir():
        raise CheckpointError(f"{escape(folder)}: no such folder", hint="name the drafter's folder")
    check_link_stays_inside(folder, folder / "config.json")
    raw = read_object(folder / "config.json")
    tensors = read_headers(folder)
    faults = _Strict(TOLERATED | (DOUBTFUL_TAPS if options.tap_offset is not None else set()))
    if "mask_hidden" in tensors:
        faults.add("M27-R003", "drafter: P-EAGLE (it has a tensor 'mask_hidden') is not supported")
    config = parse_drafter(raw, faults)
    assert config is not None  # any fault that ends in None has been raised
    _refuse_side_files(folder)
    _check_target(config, target, tensors)
    return config, tensors, faults


def _refuse_side_files(folder: Path) -> None:
    if (folder / "mask_embedding.pt").exists():
        raise CheckpointError(
            "drafter: mask_embedding.pt replaces the mask token's embedding and is a pickle, which is never loaded",
            hint="take a drafter whose mask token is a row of the target's embedding",
        )


def _check_target(c: DrafterConfig, target: M2Config, tensors: dict[str, TensorInfo]) -> None:
    """Sizes that must be the target's."""
    shares = c.kind == "dflash" or "embed_tokens.weight" not in tensors
    widths = {"target_hidden_size": c.target_hidden_size} | ({"hidden_size": c.hidden_size} if shares else {})
    for key, size in widths.items():
        if size != target.hidden_size:
            _differ(key, size, "hidden_size", target.hidden_size)
    if not target.vocab_size - MAX_PADDING <= c.vocab_size <= target.vocab_size:
        _differ("vocab_size", c.vocab_size, "vocab_size", target.vocab_size)
    if c.draft_vocab_size > c.vocab_size:
        _differ("draft_vocab_size", c.draft_vocab_size, "vocab_size", target.vocab_size)
    layers = c.raw.get("num_target_layers")
    if isinstance(layers, int) and not isinstance(layers, bool) and layers != target.num_hidden_layers:
        _differ("num_target_layers", layers, "num_hidden_layers", target.num_hidden_layers)
    for key in QUANTIZATION:
        if c.raw.get(key):
            raise CheckpointError(
                f"drafter: config.json has a {key}; drafters run in BF16 or F32",
                hint="store the drafter in BF16",
            )


def _differ(key: str, value: object, target_key: str, expected: object) -> None:
    raise CheckpointError(f"drafter: {key} is {value}, the target's {target_key} is {expected}", hint=HINT)


# -- the two kinds ---------------------------------------------------------------------------------

Make = Callable[[DrafterTensors, Shared, tuple[int, ...]], DFlashDrafter | Eagle3Drafter]
"""(tensors, what is shared, hidden states to tap) -> the drafter; its settings have been checked."""


def _dflash(c: DrafterConfig, target: M2Config, options: DrafterOptions) -> Make:
    for name, value in (("num_steps", options.num_steps), ("eagle_topk", options.eagle_topk)):
        if value not in (None, 1):
            raise UsageError(
                f"{name} is {value}; a DFlash drafter has one step and one branch", hint="leave it out"
            )
    settings = read_dflash(c, target.vocab_size, options.rope_theta)

    def make(w: DrafterTensors, shared: Shared, taps: tuple[int, ...]) -> DFlashDrafter:
        weights = DFlashWeights(
            fc=w["fc.weight"],
            hidden_norm=w["hidden_norm.weight"],
            norm=w["norm.weight"],
            layers=tuple(w.layer(n, True) for n in range(c.num_hidden_layers)),
            shared=shared,
        )
        return DFlashDrafter(
            settings, weights, taps, num_draft_tokens=options.num_draft_tokens, nbytes=w.nbytes
        )

    return make


def _eagle3(c: DrafterConfig, tensors: dict[str, TensorInfo], options: DrafterOptions) -> Make:
    renamed = any("midlayer." in info.name for info in tensors.values())
    settings = read_eagle3(c, set(tensors), renamed, options.rope_theta)

    def make(w: DrafterTensors, shared: Shared, taps: tuple[int, ...]) -> Eagle3Drafter:
        weights = Eagle3Weights(
            fc=w["fc.weight"],
            hidden_norm=w["layers.0.hidden_norm.weight"],
            norm=w["norm.weight"],
            layer=w.layer(0, False),
            shared=shared,
            fc_norm=tuple(w[f"fc_norm.{k}.weight"] for k in range(len(taps))) if settings.fc_norm else (),
            input_norm=w["input_norm.weight"] if settings.input_norm else None,
        )
        return Eagle3Drafter(
            settings,
            weights,
            taps,
            num_steps=DEFAULT_STEPS if options.num_steps is None else options.num_steps,
            topk=1 if options.eagle_topk is None else options.eagle_topk,
            num_draft_tokens=options.num_draft_tokens,
            nbytes=w.nbytes,
        )

    return make


def _notes(
    c: DrafterConfig, target: M2Config, drafter: DFlashDrafter | Eagle3Drafter, faults: _Strict
) -> list[str]:
    """What a user should know beside the taps."""
    notes = [faults.notes[code] for code in ("M27-R019", "M27-R020", "M27-R023") if code in faults.notes]
    rope = drafter.settings.sizes.rope
    if not rope.stated:
        notes.append(
            f"drafter: config.json states no rope_theta; taken: {rope.theta:g}, transformers' default"
        )
    if c.vocab_size < target.vocab_size:
        notes.append(
            f"drafter: vocab_size is {c.vocab_size}, the target's {target.vocab_size}: padding is left out"
        )
    settings = drafter.settings
    flagged = c.raw.get("norm_output") is True
    if isinstance(settings, Eagle3Settings) and flagged and not settings.norm_output:
        notes.append(
            "drafter: norm_output of a SpecForge file: the next step reads the hidden state before the norm"
        )
    return notes
