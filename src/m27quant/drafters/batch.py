"""What a training step of a drafter takes and gives.

Shapes: B sequences, T positions, D hidden, F tapped features, V vocabulary, P places (slots of a block or steps of a
chain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
"""Under the names of the drafter's checkpoint.  Their dtype is the compute dtype, their device where all happens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right to a common length; what stands in the padding never counts."""

    ids_BT: Tensor
    """int64."""
    lengths_B: Tensor
    """int64: positions that are none of the padding."""
    loss_mask_BT: Tensor
    """bool: whether the target wrote this token, so that it can be learned."""
    taps_BTF: Tensor
    """The target's tapped hidden states, zeros in the padding."""
    final_BTD: Tensor
    """The target's hidden states after its last norm: its logits are their product with the head."""

    def learned_BT(self) -> Tensor:
        """bool [B, T]: tokens that the target wrote, without the padding."""
        at = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return self.loss_mask_BT & (at < self.lengths_B[:, None])


@dataclass(frozen=True, slots=True)
class Shared:
    """What a drafter borrows from its target, in the compute dtype; never trained."""

    embed_VD: Tensor
    head_VD: Tensor


@dataclass(frozen=True, slots=True)
class LossReport:
    """One batch's loss.  All but `loss` are sums, which add up over ranks and accumulated batches."""

    loss: Tensor
    """Scalar, differentiable: a weighted mean."""
    weight: Tensor
    """Scalar: what its sum was divided by.  The loss of many batches is sum(loss * weight) / sum(weight)."""
    losses_P: Tensor
    """Sum of the unweighted losses at each place."""
    hits_P: Tensor
    """How often the first choice at this place is the token that follows, what came before being given."""
    chains_P: Tensor
    """How often it is so there and at all places before."""
    counts_P: Tensor
    """How many tokens were counted."""
    tries_P: Tensor
    """How many chains reach this place within what the target wrote, whether or not its token can be drafted."""

    @property
    def position_loss(self) -> Tensor:
        """F32 [P], 0 where nothing was counted."""
        return self.losses_P / self.counts_P.clamp(min=1)

    @property
    def accuracy(self) -> Tensor:
        """F32 [P]."""
        return self.hits_P / self.counts_P.clamp(min=1)

    @property
    def chain_rate(self) -> Tensor:
        """C_k, F32 [P]; their sum is m_accept."""
        return self.chains_P / self.tries_P.clamp(min=1)

    def __add__(self, other: LossReport) -> LossReport:
        weight = self.weight + other.weight
        mean = (self.loss * self.weight + other.loss * other.weight) / weight.clamp(min=1e-30)
        sums = ("losses_P", "hits_P", "chains_P", "counts_P", "tries_P")
        return LossReport(mean, weight, *(getattr(self, name) + getattr(other, name) for name in sums))


class Drafting(Protocol):
    """What a trainer asks of a kind of drafter."""

    @property
    def name(self) -> str:
        """The kind."""

    def init(self, generator: torch.Generator) -> Parameters:
        """F32 masters."""

    def loss(
        self, params: Parameters, batch: Batch, generators: Sequence[torch.Generator], step: int
    ) -> LossReport:
        """Of one batch; one CPU generator for each of its sequences."""

    def accepted(self, params: Parameters, batch: Batch) -> Tensor:
        """int64 [B, T]: how many drafts behind each position are the text that follows; -1 where it ends before."""

    def tables(self) -> dict[str, Tensor]:
        """What the drafter's file holds beside its parameters."""
