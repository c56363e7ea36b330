"""A layer's routed experts as they are kept in memory: packed NVFP4, or plain matrices of an FP8 or BF16 model.

Shapes: T tokens, N of them for one expert, K experts per token, D hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels import nvfp4_moe
from m27quant.kernels.linear import linear
from m27quant.runtime.layer import Routing, assignments

SILU_ELEMENTS = 16384
"""How many values are passed to silu at a time where its result must not depend on their number."""


class Experts(Protocol):
    """The experts that one rank holds."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def __call__(self, h_TD: Tensor, routing: Routing, *, invariant: bool) -> Tensor:
        """The weighted sum over every token's experts, [T, D] in h's dtype; experts not held here count 0."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """NVFP4, W4A4 or W4A16."""

    weights: nvfp4_moe.ExpertWeights

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def __call__(self, h_TD: Tensor, routing: Routing, *, invariant: bool) -> Tensor:
        return nvfp4_moe.moe(h_TD, self.weights, routing.experts, routing.weights, invariant=invariant)


@dataclass(frozen=True, slots=True)
class PlainExperts:
    """BF16 or F32: w1 and w3 [I, D], w2 [D, I] of experts `first` and following, of `num_experts`."""

    matrices: list[tuple[Tensor, Tensor, Tensor]]
    """(w1, w2, w3) of each."""
    first: int
    num_experts: int

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for matrices in self.matrices for w in matrices)

    def __call__(self, h_TD: Tensor, routing: Routing, *, invariant: bool) -> Tensor:
        T, K = routing.experts.shape
        out = torch.zeros(T * K, h_TD.shape[1], device=h_TD.device, dtype=h_TD.dtype)
        slots = Routing(routing.experts.reshape(-1, 1), routing.weights.reshape(-1, 1))
        routed = assignments(slots, self.num_experts)
        for index, (w1, w2, w3) in enumerate(self.matrices, self.first):
            if len(rows := routed[index].rows):
                h_ND = h_TD[rows // K]
                gate = linear(h_ND, w1, invariant=invariant)
                act = _silu(gate, invariant) * linear(h_ND, w3, invariant=invariant)
                out[rows] = linear(act, w2, invariant=invariant)
        y_TD = torch.zeros(h_TD.shape, device=h_TD.device)
        for slot in range(K):  # in F32, in slot order, as nvfp4_moe does
            y_TD += routing.weights[:, slot, None] * out.view(T, K, -1)[:, slot]
        return y_TD.to(h_TD.dtype)


def _silu(x: Tensor, invariant: bool) -> Tensor:
    """silu; torch's own takes another exp for what does not fill a vector, or where threads divide the work."""
    if not invariant or x.device.type != "cpu":
        return F.silu(x)
    flat = torch.zeros(-(-x.numel() // SILU_ELEMENTS) * SILU_ELEMENTS, dtype=x.dtype)
    flat[: x.numel()] = x.flatten()
    for piece in torch.split(flat, SILU_ELEMENTS):
        F.silu(piece, inplace=True)
    return flat[: x.numel()].view(x.shape)
