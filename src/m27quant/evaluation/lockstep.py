"""The pass over the text: reference and candidates go side by side, layer by layer, and are compared behind each one.

In memory at a time: hidden states of all tokens of every candidate in every precision and of the reference (4 bytes
a token and hidden dimension each), three times as much of the candidate that is computed, and one expert; so that it
works where no model fits.  The reference is computed once for all candidates, weights of a candidate's expert are
read once for all its precisions.

Shapes: T tokens, D hidden, W windows, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from m27quant.evaluation.models import Model, speaking_of
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.divergence import TokenScores, joined, token_scores
from m27quant.runtime.streamed import Batch, Head, StreamedModel, make_batches

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class RowSums:
    """What was measured of one candidate in one precision; all on the CPU."""

    scores: TokenScores
    same_experts_LW: torch.Tensor
    """F64: tokens of a window that the layer's router sends where the reference's does."""
    noise_LW: torch.Tensor
    """F64: squares of what the hidden states behind a layer differ by from the reference's."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of all models."""

    lengths_W: torch.Tensor
    """int64: tokens of each window."""
    reference: TokenScores
    signal_LW: torch.Tensor
    """F64: squares of the reference's hidden states behind each layer."""
    rows: list[RowSums]
    """One for each candidate and each of its precisions, in order."""


@torch.inference_mode()
def measure(
    reference: Model,
    candidates: Sequence[Model],
    windows: Sequence[torch.Tensor],
    *,
    device: torch.device,
    num_likeliest: int = 8,
    batch_tokens: int = BATCH_TOKENS,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
) -> Measured:
    """Run all models over the windows (int64 [length] each), in F32.

    Raises:
        CheckpointError: damaged weights or scales; the message names the checkpoint.
    """
    groups = [_Group(model, windows, device, batch_tokens) for model in (reference, *candidates)]
    first, others = groups[0].models[0], [model for group in groups[1:] for model in group.models]
    num_layers, num_experts = first.config.num_hidden_layers, first.config.num_local_experts
    signal_LW, same_RLW, noise_RLW = [], [[] for _ in others], [[] for _ in others]  # type: ignore[var-annotated]
    for layer in range(num_layers):
        for at, group in enumerate(groups):
            for expert in group.layer(layer):
                stop()
                done = (layer + (at + expert / num_experts) / len(groups)) / (num_layers + 1)
                progress(Progress(stage="evaluate", fraction=done, layer=layer, num_layers=num_layers))
        signal_LW.append(_per_window(first, lambda theirs, _: theirs.x.double().square().sum(-1)))
        for row, ours in enumerate(others):
            same_RLW[row].append(_per_window(first, _same_experts, ours))
            noise_RLW[row].append(_per_window(first, _noise, ours))

    def tell(share: float) -> None:  # logits take about as long as a layer
        stop()
        progress(Progress(stage="logits", fraction=(num_layers + share) / (num_layers + 1)))

    scores = _scores([first, *others], _heads(groups), windows, num_likeliest, tell)
    tell(1.0)
    rows = [
        RowSums(own, torch.stack(same), torch.stack(noise))
        for own, same, noise in zip(scores[1:], same_RLW, noise_RLW, strict=True)
    ]
    lengths_W = torch.tensor([len(ids) for ids in windows])
    return Measured(lengths_W, scores[0], torch.stack(signal_LW), rows)


class _Group:
    """One checkpoint in all its precisions."""

    def __init__(
        self, model: Model, windows: Sequence[torch.Tensor], device: torch.device, batch_tokens: int
    ) -> None:
        self.name = model.name
        with speaking_of(self.name):
            self.models = [
                StreamedModel(
                    model.source, make_batches(windows, batch_tokens), precision=precision, device=device
                )
                for precision in model.precisions
            ]

    def layer(self, index: int) -> Iterator[int]:
        """One layer of each; gives the number of every expert before it is its turn."""
        with speaking_of(self.name):
            for model in self.models:
                model.attention(index)
            for expert in range(self.models[0].config.num_local_experts):
                yield expert
                self._expert(index, expert)
            for model in self.models:
                model.finish_layer()

    def _expert(self, layer: int, index: int) -> None:
        """Not read where no token is routed to it."""
        used = [m for m in self.models if any(len(batch.to(index).rows) for batch in m.batches)]
        if used:
            weights = used[0].expert_weights(layer, index)
            for model in used:
                model.expert(index, model.with_inputs(layer, index, weights))

    def head(self) -> Head:
        """The final norm and the head, the same in every precision."""
        with speaking_of(self.name):
            return self.models[0].head()


def _heads(groups: Sequence[_Group]) -> list[Head]:
    """One for each model; weights that equal the reference's, as they do in most checkpoints, are kept once."""
    first = groups[0].head()
    heads = []
    for group in groups:
        own = first if group is groups[0] else group.head()
        if torch.equal(own.weight, first.weight):
            own = replace(own, weight=first.weight)
        heads += [own] * len(group.models)
    return heads


def _scores(
    models: Sequence[StreamedModel],
    heads: Sequence[Head],
    windows: Sequence[torch.Tensor],
    num_likeliest: int,
    tell: Callable[[float], None],
) -> list[TokenScores]:
    """Of each model; no token is predicted across the border of windows."""
    targets_T = torch.cat([torch.cat((ids[1:], ids.new_tensor([-1]))) for ids in windows])
    parts, begin = [], 0
    for batches in zip(*(model.batches for model in models), strict=True):
        tell(begin / len(targets_T))
        end = begin + len(batches[0].ids)
        x = [batch.x for batch in batches]
        parts.append(token_scores(heads, x, targets_T[begin:end], num_likeliest=num_likeliest))
        begin = end
    return [joined(of_one) for of_one in zip(*parts, strict=True)]


def _per_window(
    first: StreamedModel, of_tokens: Callable[[Batch, Batch], torch.Tensor], ours: StreamedModel | None = None
) -> torch.Tensor:
    """F64 [W]: a figure of each token [T], summed over each window."""
    sums = []
    for theirs, mine in zip(first.batches, (ours or first).batches, strict=True):
        parts = torch.split(of_tokens(theirs, mine).double(), list(theirs.lengths))
        sums.append(torch.stack([part.sum() for part in parts]).cpu())
    return torch.cat(sums)


def _same_experts(theirs: Batch, mine: Batch) -> torch.Tensor:
    return (_experts(theirs) == _experts(mine)).all(-1)


def _experts(batch: Batch) -> torch.Tensor:
    """The set of experts of each token, int64 [T, K] in ascending order."""
    assert batch.routing is not None, "a layer lies behind"
    return batch.routing.experts.sort(-1).values


def _noise(theirs: Batch, mine: Batch) -> torch.Tensor:
    return (theirs.x.double() - mine.x.double()).square().sum(-1)
