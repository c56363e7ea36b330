"""The teacher-forced proxy of the L3H5 card: how far drafts run along a given text before the first wrong one.

Blocks begin behind every `stride`-th token of what is to be learned, whether or not the block before was right.  A
block's leading run are its right first choices before the first wrong one; m_accept is their mean, without bonus token,
and C_k the share of blocks whose first k are right.  The loss is the mean of -log q(token) in nats over all places of
all blocks whose token the drafter's vocabulary has, what came before being given.

Shapes: b blocks, K places of one, D hidden, W draft vocabulary, F tapped features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.drafters.samples import Sample
from m27quant.kernels.linear import linear
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.proposal import DraftRequest

Trained = DFlashDrafter | Eagle3Drafter
HEAD_VALUES = 2**26
"""Logits that are computed at a time."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """Blocks of held-out text."""

    runs: tuple[AcceptanceStats, ...]
    """The leading runs of each text; of all together, `stats`."""
    losses: tuple[float, ...]
    """At each place the mean of -log q, in nats."""
    covered: float
    """Share of the text's tokens that the draft vocabulary has."""
    val_loss: float
    """Of all places together."""
    stride: int

    @property
    def stats(self) -> AcceptanceStats:
        return total(self.runs)

    @property
    def blocks(self) -> int:
        return self.stats.num_steps


@dataclass(slots=True)
class _Sums:
    """Over blocks: [K] each."""

    losses: Tensor
    counts: Tensor
    tokens: int = 0


def teacher_forced(
    drafter: Trained, samples: Sequence[Sample], taps: Sequence[Tensor], stride: int
) -> tuple[list[AcceptanceStats], Tensor, Tensor, int]:
    """(leading runs of each sample, sums of -log q [K], how many were summed [K], tokens in all)."""
    K = drafter.max_depth
    texts = [sample.ids for sample in samples]
    anchors = [block_anchors(sample, K, stride) for sample in samples]
    known = [0] * len(texts)
    runs: list[list[int]] = [[] for _ in texts]
    sums = _Sums(torch.zeros(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64))
    for index in range(len(texts)):
        drafter.forget(-1 - index)
    for turn in range(max(map(len, anchors), default=0)):
        asked = [index for index in range(len(texts)) if turn < len(anchors[index])]
        requests, following = [], []
        for index in asked:
            end = anchors[index][turn] + 1
            requests.append(
                DraftRequest(-1 - index, texts[index][:end], taps[index][known[index] : end - 1], K)
            )
            following.append(texts[index][end : end + K])
            known[index] = end - 1
        hits_bK = _score(drafter, drafter.forced_hidden(requests, following), following, sums)
        for index, run in zip(asked, hits_bK.cumprod(-1).sum(-1).tolist(), strict=True):
            runs[index].append(run)
    for index in range(len(texts)):
        drafter.forget(-1 - index)
    return [AcceptanceStats.of_steps(run) for run in runs], sums.losses, sums.counts, sums.tokens


def block_anchors(sample: Sample, K: int, stride: int) -> list[int]:
    """Positions of last given tokens: every stride-th token of each learned stretch that K more of it follow."""
    return [
        at for begin, end in sample.learned for at in range(max(begin, 1), end - K, stride)
    ]  # position 0 has no committed position before it, and so no taps


def _score(drafter: Trained, hidden_bKD: Tensor, following: Sequence[Sequence[int]], sums: _Sums) -> Tensor:
    """int64 [b, K]: 1 where the first choice is the text's token; losses go to the sums."""
    shared = drafter.weights.shared
    scale = drafter.settings.logit_scale if isinstance(drafter, Eagle3Drafter) else 1.0
    text_bK = torch.tensor([list(tokens) for tokens in following], device=hidden_bKD.device)
    num_places = text_bK.shape[1]
    rows_bK = _head_rows(shared.draft_to_target, text_bK, len(shared.head))
    hits = []
    at_once = max(1, HEAD_VALUES // (num_places * len(shared.head)))
    for part in torch.split(torch.arange(len(text_bK)), at_once):
        logits = linear(hidden_bKD[part].flatten(0, 1), shared.head).float() * scale
        rows = rows_bK[part].flatten()
        loss = -logits.log_softmax(-1).gather(1, rows.clamp(min=0)[:, None])[:, 0]
        has = rows >= 0
        sums.losses += (loss * has).view(len(part), -1).sum(0).double().cpu()
        sums.counts += has.view(len(part), -1).sum(0).double().cpu()
        sums.tokens += len(rows)
        hits.append(shared.tokens(logits.argmax(-1)).view(len(part), -1) == text_bK[part])
    return torch.cat(hits).long()


def _head_rows(draft_to_target: Tensor | None, tokens: Tensor, size: int) -> Tensor:
    """The head's row of each token; -1 where it has none."""
    if draft_to_target is None:
        return torch.where(tokens < size, tokens, -1)
    order = draft_to_target.argsort()
    at = torch.searchsorted(draft_to_target[order], tokens).clamp(max=size - 1)
    rows = order[at]
    return torch.where(draft_to_target[rows] == tokens, rows, -1)


def pooled(parts: Sequence[tuple[list[AcceptanceStats], Tensor, Tensor, int]], stride: int) -> Proxy | None:
    """All groups of samples together; None where no block fits into the text."""
    runs = [stats for found, *_ in parts for stats in found]
    if not total(runs).num_steps:
        return None
    losses, counts = (torch.stack([part[i] for part in parts]).sum(0) for i in (1, 2))  # type: ignore[misc]
    tokens = sum(part[3] for part in parts)
    return Proxy(
        runs=tuple(runs),
        losses=tuple((losses / counts.clamp(min=1)).tolist()),
        covered=float(counts.sum()) / tokens,
        val_loss=float(losses.sum() / counts.sum().clamp(min=1)),
        stride=stride,
    )
