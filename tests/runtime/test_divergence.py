"""Scores of next-token distributions, by hand where they can be, by torch's own functions elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from m27quant.runtime import divergence
from m27quant.runtime.divergence import sqnr_db, squares, token_scores
from m27quant.runtime.streamed import Head


def head(weight: torch.Tensor) -> Head:
    return Head(torch.ones(weight.shape[1]), weight, 1e-6, torch.float32)


def rows_of(count: int, hidden: int = 12) -> torch.Tensor:
    return torch.randn(count, hidden)


def test_scores_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = head(torch.randn(40, 12)), head(torch.randn(40, 12))
    x, y, targets = rows_of(9), rows_of(9), torch.randint(40, (9,))
    targets[4] = -1
    monkeypatch.setattr(divergence, "LOGIT_ELEMENTS", 4 * 40)
    reference, scores = token_scores((theirs, ours), (x, y), targets, num_likeliest=5)
    log_p, log_q = theirs(x).double().log_softmax(-1), ours(y).double().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(scores.kl, kl)
    losses = F.cross_entropy(ours(y).double(), targets, reduction="none", ignore_index=-1)
    torch.testing.assert_close(scores.nll, losses)
    assert torch.equal(scores.top1, (log_p.argmax(-1) == log_q.argmax(-1)).double())
    for p, q, share in zip(log_p.topk(5).indices, log_q.topk(5).indices, scores.top_n, strict=True):
        assert float(share) == len({*p.tolist()} & {*q.tolist()}) / 5
    assert bool((reference.kl == 0).all())
    assert bool((reference.top1 == 1).all())


def test_a_vocabulary_smaller_than_the_list() -> None:
    both = head(torch.randn(3, 12)), head(torch.randn(3, 12))
    scores = token_scores(both, (rows_of(4), rows_of(4)), torch.zeros(4, dtype=torch.int64))[1]
    assert scores.top_n.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_and_kept_to_its_token(bad: float) -> None:
    """-inf alone would give a distribution, and a KL divergence that looks like any other."""
    weight = torch.randn(6, 12)
    broken = weight.clone()
    broken[3] = 0
    broken[3, 0] = bad
    x = rows_of(3)
    x[1, 0] = 0  # infinity times 0 is NaN
    x[2] = 0
    scores = token_scores((head(weight), head(broken)), (x, x), torch.tensor([1, 2, -1]))[1]
    assert not scores.finite.any()
    for figure in (scores.kl, scores.top1, scores.top_n):
        assert bool(figure.isnan().all())
    assert scores.nll.isnan().tolist() == [True, True, False]
    whole = token_scores((head(weight), head(weight)), (x, x), torch.tensor([1, 2, -1]))[1]
    assert bool(whole.finite.all())
    assert bool((whole.kl == 0).all())


def test_decibels() -> None:
    a = torch.tensor([3.0, 4.0])
    assert squares([(a, a), (a, a + torch.tensor([0.5, 0.0]))]) == (50.0, 0.25)
    assert sqnr_db(100.0, 1.0) == 20
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == sqnr_db(1.0, math.nan) == -math.inf
