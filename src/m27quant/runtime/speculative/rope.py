"""Rotary embedding of drafters: over the whole head, plain, linear or YaRN.

Shapes: T tokens, C head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m27quant.checkpoint.drafter_config import table
from m27quant.errors import CheckpointError, escape

DEFAULT_THETA = 10000.0
"""transformers' for a config that states none; neither the target's nor vLLM's 1e6 is put in its place."""
HINT = "take config.json from where the weights come from, or pass --drafter-rope-theta"


@dataclass(frozen=True, slots=True)
class Rope:
    """How far each pair of dimensions turns from one position to the next."""

    inv_freq: Tensor
    """F32 [C / 2]."""
    factor: float
    """What cos and sin are multiplied with (YaRN's attention factor)."""
    theta: float
    stated: bool
    """Whether `theta` was stated, by config.json or the caller."""

    def table(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, C]; dimension i is paired with i + C / 2."""
        angles = positions_T.float()[:, None] * self.inv_freq.to(positions_T.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


def read_rope(sizes: dict[str, Any], head_dim: int, theta: float | None = None) -> Rope:
    """From the object that holds the sizes; `theta` overrides what it states.

    Both ways of stating are read: `rope_theta` with `rope_scaling`, and `rope_parameters` (transformers 5).

    Raises:
        CheckpointError: a kind that is not supported, or numbers that make no rotation.
    """
    parameters = table(sizes, "rope_scaling") | table(sizes, "rope_parameters")
    stated = parameters.get("rope_theta", sizes.get("rope_theta"))
    base = theta if theta is not None else DEFAULT_THETA if stated is None else _number("rope_theta", stated)
    if base <= 1:
        raise CheckpointError(f"drafter: rope_theta is {base:g}, expected more than 1", hint=HINT)
    if head_dim % 2:
        raise CheckpointError(f"drafter: head_dim is {head_dim}, expected an even number", hint=HINT)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("drafter: partial_rotary_factor is not supported, expected: 1.0", hint=HINT)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "yarn"):
        raise CheckpointError(
            f"drafter: rope_type '{escape(kind)}' is not supported; known: default, linear, yarn", hint=HINT
        )
    wavelengths = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # over 2 pi
    inv_freq = 1.0 / wavelengths
    factor = 1.0
    if kind == "linear":
        inv_freq = inv_freq / _positive(parameters, "factor")
    elif kind == "yarn":
        inv_freq, factor = _yarn(wavelengths, parameters, sizes, base)
    return Rope(inv_freq, factor, base, theta is not None or stated is not None)


def _yarn(
    wavelengths: Tensor, parameters: dict[str, Any], sizes: dict[str, Any], base: float
) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071) as transformers computes it: slow pairs are stretched, fast ones stay."""
    original = _positive(parameters, "original_max_position_embeddings")
    if parameters.get("factor") is None:
        scale = _positive(sizes, "max_position_embeddings") / original
    else:
        scale = _positive(parameters, "factor")
    dim = 2 * len(wavelengths)

    def pair(rotations: float) -> float:
        """The pair that turns this often over the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = pair(_number("beta_fast", parameters.get("beta_fast") or 32))
    high = pair(_number("beta_slow", parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = torch.arange(len(wavelengths), dtype=torch.float32)
    kept = 1 - ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    mixed = 1.0 / (scale * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return mixed, _attention_factor(parameters, scale)


def _attention_factor(parameters: dict[str, Any], scale: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _positive(parameters, "attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if one and all_dim:
        return mscale(_number("mscale", one)) / mscale(_number("mscale_all_dim", all_dim))
    return mscale(1.0)


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"drafter: {key} is {escape(value)}, expected a positive number", hint=HINT)
    return float(value)


def _positive(place: dict[str, Any], key: str) -> float:
    return _number(key, place.get(key))
