"""Both kinds of drafters as the trainer sees them: first weights, loss, what would be accepted, tables of the file.

Shapes: B sequences, T positions, A anchors, K slots of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.drafters.batch import Batch, LossReport, Parameters, Shared
from m27quant.drafters.dflash import DFlashSpec, block_hidden, dflash_loss, init_dflash, sample_anchors
from m27quant.drafters.eagle3 import (
    Eagle3Spec,
    Vocabulary,
    chain_hidden,
    draft_vocabulary,
    eagle3_loss,
    init_eagle3,
)
from m27quant.drafters.layers import LayerSpec
from m27quant.drafters.presets import Objective, Recipe, Shape
from m27quant.drafters.samples import Sample
from m27quant.runtime.speculative.eagle3 import DEFAULT_STEPS

ANCHORS_AT_ONCE = 24
"""Of a sequence, when every position is drafted from."""


def drafting_of(
    recipe: Recipe, samples: Sequence[Sample], shared: Shared, tokens_W: Tensor | None = None
) -> DFlashTraining | Eagle3Training:
    """The drafter that a recipe describes.

    EAGLE3's vocabulary are the tokens that the target wrote most often, where `tokens_W` does not say which.
    """
    shape, objective = recipe.shape, recipe.objective
    if shape.kind == "dflash":
        return DFlashTraining(shape, objective, shared)
    if tokens_W is None:
        counts = count_tokens(samples, shape.vocab_size)
        tokens_W = draft_vocabulary(counts, shape.draft_vocab_size).tokens_W
    tokens_W = tokens_W.to(shared.head_VD.device)
    return Eagle3Training(shape, objective, shared, Vocabulary(tokens_W, shape.vocab_size))


def count_tokens(samples: Sequence[Sample], vocab_size: int) -> Tensor:
    """int64 [V]: how often the target wrote each token."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sample in samples:
        tokens = torch.frombuffer(sample.tokens, dtype=torch.int32)
        for begin, end in sample.learned:
            counts += torch.bincount(tokens[begin:end], minlength=vocab_size)
    return counts


def _sizes(s: Shape) -> dict[str, Any]:
    """What both kinds' specifications have in common."""
    return {field.name: getattr(s, field.name) for field in fields(LayerSpec)}


def slot_weights(objective: Objective, count: int) -> Tensor:
    """F32 [count]: decay**(k-1), or exp(-(k-1)/gamma)."""
    k = torch.arange(count, dtype=torch.float32)
    if objective.loss_gamma is not None:
        return torch.exp(-k / objective.loss_gamma)
    return torch.tensor(objective.loss_decay or 1.0) ** k


@dataclass(frozen=True)
class DFlashTraining:
    """Blocks from sampled anchors."""

    shape: Shape
    objective: Objective
    shared: Shared
    name: str = "dflash"

    @property
    def spec(self) -> DFlashSpec:
        s = self.shape
        return DFlashSpec(block_size=s.block_size, mask_token_id=s.mask_token_id, **_sizes(s))

    def init(self, generator: torch.Generator) -> Parameters:
        return init_dflash(self.spec, generator)

    def loss(
        self, params: Parameters, batch: Batch, generators: Sequence[torch.Generator], step: int
    ) -> LossReport:
        """Blocks of one of the training's sizes, in turn."""
        block = self.objective.block_sizes[step % len(self.objective.block_sizes)]
        anchors = sample_anchors(batch, self.objective.anchors_per_seq, generators)
        weights = slot_weights(self.objective, block - 1)
        return dflash_loss(
            params, self.spec, batch, anchors, self.shared, slot_weights_K1=weights, soft=self.objective.soft
        )

    @torch.no_grad()
    def accepted(self, params: Parameters, batch: Batch) -> Tensor:
        """int64 [B, T]: how many drafts from each position on are the text; -1 where not all of them lie in it."""
        (B, T), K = batch.ids_BT.shape, self.shape.block_size
        result = torch.full((B, T), -1, dtype=torch.int64)
        learned = batch.learned_BT().any(0).nonzero()[:, 0]
        first = max(1, int(learned.min())) if len(learned) else T
        if first + K > T:
            return result
        slots = torch.arange(1, K, device=batch.ids_BT.device)
        for part in torch.split(torch.arange(first, T - K + 1, device=slots.device), ANCHORS_AT_ONCE):
            anchors = part.expand(B, -1)
            hidden = block_hidden(params, self.spec, batch, anchors, self.shared, K)[:, :, 1:]
            drafts = F.linear(hidden, self.shared.head_VD).argmax(-1)
            text = batch.ids_BT[
                torch.arange(B, device=slots.device)[:, None, None], anchors[..., None] + slots
            ]
            result[:, part.cpu()] = (drafts == text).long().cumprod(-1).sum(-1).cpu()
        ends = torch.arange(T) + K <= batch.lengths_B.cpu()[:, None]
        return result.masked_fill(~ends, -1)

    def tables(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Eagle3Training:
    """Chains of drafts, by the training-time test."""

    shape: Shape
    objective: Objective
    shared: Shared
    vocabulary: Vocabulary
    name: str = "eagle3"

    @property
    def spec(self) -> Eagle3Spec:
        return Eagle3Spec(draft_vocab_size=self.shape.draft_vocab_size, **_sizes(self.shape))

    def init(self, generator: torch.Generator) -> Parameters:
        head_WD = self.shared.head_VD[self.vocabulary.tokens_W]
        return init_eagle3(self.spec, generator, head_WD.cpu())

    def loss(
        self, params: Parameters, batch: Batch, generators: Sequence[torch.Generator], step: int
    ) -> LossReport:
        """Every position of what the target wrote."""
        o = self.objective
        return eagle3_loss(
            params, self.spec, batch, self.shared, self.vocabulary, num_steps=o.num_steps,
            decay=1.0 if o.loss_decay is None else o.loss_decay, soft=o.soft,
        )  # fmt: skip

    @torch.no_grad()
    def accepted(self, params: Parameters, batch: Batch) -> Tensor:
        """int64 [B, T]: how many drafts of a chain behind each position are the text; -1 where it ends before."""
        (B, T), steps = batch.ids_BT.shape, DEFAULT_STEPS
        result = torch.full((B, T), -1, dtype=torch.int64)
        learned = batch.learned_BT().any(0).nonzero()[:, 0]
        first = max(0, int(learned.min()) - 1) if len(learned) else T
        last = T - 1 - steps  # slots before it predict text at every step
        if first >= last:
            return result
        whole = torch.ones(B, last - first, dtype=torch.bool, device=batch.ids_BT.device)
        count = torch.zeros_like(whole, dtype=torch.int64)
        for j, hidden in enumerate(chain_hidden(params, self.spec, batch, self.shared, first, steps)):
            rows = F.linear(hidden[:, : last - first], params["lm_head.weight"]).argmax(-1)
            whole &= self.vocabulary.tokens_W[rows] == batch.ids_BT[:, first + 2 + j : last + 2 + j]
            count += whole
        result[:, first + 1 : last + 1] = count.cpu()
        ends = torch.arange(T) + steps < batch.lengths_B.cpu()[:, None]
        return result.masked_fill(~ends, -1)

    def tables(self) -> dict[str, Tensor]:
        return {name: table.cpu() for name, table in self.vocabulary.tables().items()}
