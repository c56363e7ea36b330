"""What a layer's calibration finds: exact maxima of BF16 values and counts of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class LayerRanges:
    """What one layer's calibration found: exact maxima of BF16 values, as floats."""

    k_amax: float = 0.0
    v_amax: float = 0.0
    w13_input_amax: float = 0.0
    """Over the MoE input of every token: w1's and w3's, the same for all experts."""
    w2_input_amax: list[float] = field(default_factory=list)
    routed_tokens: list[int] = field(default_factory=list)
    """Per expert the tokens that natural routing sends to it."""
    seen_tokens: list[int] = field(default_factory=list)
    """Per expert the tokens that its ranges were measured on."""
    non_finite_values: int = 0
    """Rows of an expert's activation that were NaN or Inf and were left out."""

    def add_kv(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Widen the ranges of keys and values; False, and nothing is done, where one is NaN or Inf."""
        k_amax, v_amax = amax(k), amax(v)
        finite = is_finite(k_amax) and is_finite(v_amax)
        if finite:
            self.k_amax, self.v_amax = max(self.k_amax, k_amax), max(self.v_amax, v_amax)
        return finite


def merged(parts: Sequence[LayerRanges]) -> LayerRanges:
    """What ranks have found over chunks of their own, as one: maxima and counts, which no order can change."""
    return LayerRanges(
        k_amax=max(p.k_amax for p in parts),
        v_amax=max(p.v_amax for p in parts),
        w13_input_amax=max(p.w13_input_amax for p in parts),
        w2_input_amax=[max(found) for found in zip(*(p.w2_input_amax for p in parts), strict=True)],
        routed_tokens=[sum(found) for found in zip(*(p.routed_tokens for p in parts), strict=True)],
        seen_tokens=[sum(found) for found in zip(*(p.seen_tokens for p in parts), strict=True)],
        non_finite_values=sum(p.non_finite_values for p in parts),
    )


def amax(x: torch.Tensor) -> float:
    """max |x|, exactly; NaN where x holds one, 0 where it is empty."""
    return float(amax_tensor(x)) if x.numel() else 0.0


def amax_tensor(x: torch.Tensor) -> torch.Tensor:
    """max |x| as a scalar tensor; `x` is not empty."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def is_finite(value: float) -> bool:
    """Whether it is neither NaN nor infinite."""
    return value - value == 0.0
