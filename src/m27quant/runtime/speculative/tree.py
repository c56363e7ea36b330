"""Growing and pruning a tree of drafts, as EAGLE-2 (arXiv:2406.16858) and SGLang's EAGLE worker do.

Level 1 holds the k likeliest tokens.  The k best nodes of a level, its frontier, each get their k likeliest children;
a node's score is the sum of log probabilities on its path.  Candidates are numbered in the order in which they arise:
k, then k * k a level, the children of one frontier node side by side.  Of all candidates the best are kept; as scores
only fall along a path, and of equal scores the lower number wins, the parents of those kept are among them.

Shapes: b sequences, F nodes of a frontier (k), V draft vocabulary, C candidates so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from m27quant.errors import UsageError
from m27quant.runtime.speculative.proposal import ROOT


def num_candidates(num_steps: int, topk: int) -> int:
    """Nodes that arise before pruning."""
    return topk + (num_steps - 1) * topk * topk


def check_shape(num_steps: int, topk: int, num_draft_tokens: int, vocab_size: int) -> None:
    """Refuse settings that make no tree; `num_draft_tokens` counts the root, as SGLang does.

    Raises:
        UsageError: numbers below their least, more drafts than candidates, more branches than tokens.
    """
    if topk > vocab_size:
        raise UsageError(f"eagle_topk is {topk}; the drafter knows {vocab_size} tokens")
    if num_steps < 1 or topk < 1 or num_draft_tokens < 2:
        raise UsageError(
            f"num_steps {num_steps}, eagle_topk {topk}, num_draft_tokens {num_draft_tokens}: expected at least 1, 1, 2"
        )
    most = num_candidates(num_steps, topk) + 1
    if num_draft_tokens > most:
        raise UsageError(
            f"num_draft_tokens is {num_draft_tokens}; {num_steps} steps of top-{topk} make at most {most}, "
            "the root included"
        )


def stable_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest along the last dimension, equal ones by index; NaN counts as -inf."""
    x = x.nan_to_num(nan=-torch.inf)
    least = x.topk(k, dim=-1).values[..., -1:]
    above, equal = x > least, x == least
    chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    places = torch.arange(x.shape[-1], 0, -1, device=x.device)
    indices = x.shape[-1] - (chosen * places).topk(k, dim=-1).values
    values, order = x.gather(-1, indices).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)


@dataclass(slots=True)
class Frontier:
    """The nodes that are expanded next."""

    numbers_bF: Tensor
    """Their candidate numbers."""
    scores_bF: Tensor
    rows_bF: Tensor
    """Rows of the head."""
    parents_bF: Tensor
    """Index into the frontier before, from which each one's hidden state comes."""


@dataclass(slots=True)
class Growth:
    """All candidates so far."""

    topk: int
    scores: list[Tensor] = field(default_factory=list)
    """Of each level: F32 [b, C of the level]."""
    rows: list[Tensor] = field(default_factory=list)
    parents: list[Tensor] = field(default_factory=list)
    """Candidate numbers, or ROOT."""

    def start(self, log_probs_bV: Tensor) -> Frontier:
        """Level 1, which is its own frontier."""
        scores, rows = stable_topk(log_probs_bV, self.topk)
        self._add(scores, rows, torch.full_like(rows, ROOT))
        numbers = torch.arange(self.topk, device=rows.device).expand_as(rows)
        return Frontier(numbers, scores, rows, torch.zeros_like(rows))

    def grow(self, frontier: Frontier, log_probs_bFV: Tensor) -> Frontier:
        """The children of a frontier, and the best of them."""
        k, done = self.topk, sum(level.shape[1] for level in self.scores)
        scores_bFk, rows_bFk = stable_topk(log_probs_bFV, k)
        scores = (scores_bFk + frontier.scores_bF[..., None]).flatten(1)
        rows = rows_bFk.flatten(1)
        self._add(scores, rows, frontier.numbers_bF.repeat_interleave(k, dim=1))
        best, chosen = scores.sort(dim=-1, descending=True, stable=True)
        chosen = chosen[:, :k]
        return Frontier(done + chosen, best[:, :k], rows.gather(1, chosen), chosen // k)

    def _add(self, scores: Tensor, rows: Tensor, parents: Tensor) -> None:
        self.scores.append(scores)
        self.rows.append(rows)
        self.parents.append(parents)

    def prune(self, count: int, limits: list[int]) -> list[tuple[list[int], list[int]]]:
        """The `count` best candidates of each sequence, in their order; its limit bounds both number and depth.

        Returns:
            For each sequence (rows of the head, parents), parents counted among those kept.
        """
        levels = list(zip(self.scores, self.rows, self.parents, strict=True))
        return [
            _keep([tuple(part[b] for part in level) for level in levels[:n]], min(count, n))
            for b, n in enumerate(limits)
        ]


def _keep(levels: list[tuple[Tensor, ...]], count: int) -> tuple[list[int], list[int]]:
    """The best of one sequence's (scores, rows, parents) by level."""
    if not levels:
        return [], []
    scores, rows, parents = (torch.cat(parts) for parts in zip(*levels, strict=True))
    best = sorted(scores.sort(descending=True, stable=True).indices[:count].tolist())
    places = {ROOT: ROOT}
    kept: list[tuple[int, int]] = []
    for number, parent in zip(best, parents[best].tolist(), strict=True):
        if parent in places:  # always, unless scores are NaN
            places[number] = len(kept)
            kept.append((number, places[parent]))
    return rows[[number for number, _ in kept]].tolist(), [parent for _, parent in kept]
