"""Intervals that cover as often as they say, and p-values that are those of the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from m27quant.evaluation import statistics as S
from m27quant.evaluation.result import Estimate
from tests.tolerance import COVERAGE_OF_95


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64)


def coverage(num_windows: int, draws: torch.Tensor, truth: float) -> float:
    """How often the interval of a mean, from each row of draws [N, W], holds the truth."""
    bootstrap = S.Bootstrap(num_windows, seed=1, resamples=1000)
    found = [bootstrap.estimate(S.mean_of(row, ones(num_windows))) for row in draws]
    return sum(e.low <= truth <= e.high for e in found) / len(found)


@pytest.mark.parametrize("num_windows", [16, 64])
def test_intervals_cover_normal_means(num_windows: int) -> None:
    draws = torch.randn(400, num_windows, dtype=torch.float64) + 3
    low, high = COVERAGE_OF_95
    assert low <= coverage(num_windows, draws, 3.0) <= high


def test_intervals_cover_skewed_means_evenly() -> None:
    """KL divergences look like this: few windows hold most of the sum.  A symmetric interval would miss on one side."""
    draws = torch.randn(400, 48, dtype=torch.float64).exp()
    low, high = COVERAGE_OF_95
    assert low <= coverage(48, draws, math.exp(0.5)) <= high


def test_intervals_know_that_tokens_of_a_window_go_together() -> None:
    """Tokens all alike within their window say no more than one of them: the interval is that of W tokens."""
    each_W = torch.randn(50, dtype=torch.float64)
    bootstrap = S.Bootstrap(50)
    of_tokens = bootstrap.estimate(S.mean_of(each_W * 100, 100 * ones(50)))
    of_windows = bootstrap.estimate(S.mean_of(each_W, ones(50)))
    assert of_tokens.value == pytest.approx(of_windows.value)
    assert (of_tokens.low, of_tokens.high) == pytest.approx((of_windows.low, of_windows.high))
    expected = 2 * 2.009 * float(each_W.std()) / math.sqrt(50)  # Student's t of 49
    assert of_tokens.high - of_tokens.low == pytest.approx(expected, rel=0.15)


def test_one_window_that_holds_all_of_it() -> None:
    """The most skewed text there is: the interval reaches up to what the draws give, never below the figure."""
    sums_W = torch.zeros(6, dtype=torch.float64)
    sums_W[2] = 60
    found = S.Bootstrap(6).estimate(S.mean_of(sums_W, ones(6)))
    assert found.value == 10
    assert 0 <= found.low <= 10 < found.high <= 60


def test_figures_weigh_tokens_and_not_windows() -> None:
    bootstrap = S.Bootstrap(2)
    assert bootstrap.estimate(
        S.mean_of(torch.tensor([10.0, 2.0]).double(), torch.tensor([10, 1]).double())
    ).value == pytest.approx(12 / 11)
    decibels = S.decibels_of(torch.tensor([100.0, 300.0]).double(), torch.tensor([1.0, 3.0]).double())
    assert bootstrap.estimate(decibels) == Estimate(20.0, 20.0, 20.0)


def test_what_has_no_interval() -> None:
    alone = S.Bootstrap(1).estimate(S.mean_of(ones(1), ones(1)))
    assert alone.value == 1
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    missing = S.Bootstrap(3).estimate(S.mean_of(torch.tensor([1, math.nan, 2]).double(), ones(3)))
    assert math.isnan(missing.value)
    assert math.isnan(missing.low)
    same = S.Bootstrap(3).estimate(S.decibels_of(ones(3), 0 * ones(3)))
    assert same == Estimate(math.inf, math.inf, math.inf)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_quantiles_are_those_of_the_text_written_out(q: float) -> None:
    """Weights stand for windows that are repeated, or left out; the naive way sorts all their tokens."""
    lengths = torch.tensor([50, 3, 120, 77])
    windows_T = torch.repeat_interleave(torch.arange(4), lengths)
    values_T = torch.randn(250, dtype=torch.float64).exp()
    values_T[windows_T == 1] = 100  # a window that holds the largest values, drawn often or never
    weights_RW = torch.tensor([[1, 1, 1, 1], [0, 4, 0, 0], [2, 0, 1, 1], [0, 3, 0, 1], [1, 0, 3, 0]]).double()
    found = S.quantile_of(values_T, windows_T, q)(weights_RW)
    for weights, value in zip(weights_RW, found, strict=True):
        written_out = torch.cat([values_T[windows_T == w].repeat(int(n)) for w, n in enumerate(weights)])
        at = math.ceil(q * len(written_out)) - 1
        assert float(value) == float(written_out.sort().values[at])


def exact_p(differences: list[float]) -> float:
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


def test_p_is_exact_for_few_windows() -> None:
    assert S.sign_flip_p(torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1]).double()) == 2 / 32  # all of one sign
    assert S.sign_flip_p(torch.tensor([-1.0, -2.0]).double()) == 2 / 4
    assert S.sign_flip_p(torch.tensor([4.0]).double()) == 1
    assert S.sign_flip_p(torch.zeros(6).double()) == 1
    mixed = [0.375, -0.125, 0.75, 0.25, -0.5, 1.0, 0.125, 0.125, -0.25]
    assert S.sign_flip_p(torch.tensor(mixed).double()) == exact_p(mixed)
    assert math.isnan(S.sign_flip_p(torch.tensor([1.0, math.nan]).double()))


def test_drawn_signs_come_near_all_of_them() -> None:
    few = (torch.randn(14) + 0.4).double()
    exact, drawn = exact_p(few.tolist()), S.sign_flip_p(few)
    error = math.sqrt(exact * (1 - exact) / S.MAX_FLIPS)
    assert abs(drawn - exact) < 4 * error
    assert drawn != exact, "2^14 ways are more than are tried"
    assert S.sign_flip_p((torch.rand(100) + 1).double()) == 1 / (1 + S.MAX_FLIPS)


def test_equal_models_are_told_apart_no_more_often_than_promised() -> None:
    p = [S.sign_flip_p(torch.randn(10).double()) for _ in range(400)]
    assert 0.02 < sum(value <= 0.05 for value in p) / 400 < 0.09


def test_holm() -> None:
    assert S.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert S.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    corrected = S.holm([0.02, math.nan])
    assert corrected[0] == pytest.approx(0.04)
    assert math.isnan(corrected[1])
    assert S.holm([]) == []
