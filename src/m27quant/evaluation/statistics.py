"""How sure a figure is: bootstrap intervals and sign-flip tests over whole windows of text.

Tokens of one window are not independent of each other, windows nearly are: so windows are what is drawn again, and
what signs are flipped of.

Shapes: W windows, T tokens, R rows of weights, each of which says how often every window counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import torch

from m27quant.evaluation.result import Estimate

RESAMPLES = 2000
LEVEL = 0.95
MAX_FLIPS = 2**13
"""All ways to flip signs are tried where there are no more than this; else so many are drawn."""
ROW_ELEMENTS = 2**22
"""Of weights or signs that are in memory at a time."""

Statistic = Callable[[torch.Tensor], torch.Tensor]
"""Weights of windows [R, W] -> the figure [R] of a text in which each window stands as often as its weight says."""


def mean_of(sums_W: torch.Tensor, counts_W: torch.Tensor) -> Statistic:
    """Per token, of what was summed over each window."""
    return lambda weights_RW: (weights_RW @ sums_W) / (weights_RW @ counts_W)


def exp_of(inner: Statistic) -> Statistic:
    """e to the power of another figure: the perplexity of a mean."""
    return lambda weights_RW: inner(weights_RW).exp()


def decibels_of(signal_W: torch.Tensor, noise_W: torch.Tensor) -> Statistic:
    """10 log10 of signal to noise, in dB; inf where there is no noise."""
    return lambda weights_RW: 10 * torch.log10((weights_RW @ signal_W) / (weights_RW @ noise_W))


def quantile_of(values_T: torch.Tensor, windows_T: torch.Tensor, q: float) -> Statistic:
    """The smallest value that at least a share q of all tokens is not above; `windows_T` has each token's window."""
    values_T, order_T = values_T.sort(descending=True)
    windows_T = windows_T[order_T]
    lengths_W = torch.bincount(windows_T).double()

    def some(weights_RW: torch.Tensor) -> torch.Tensor:
        totals_R = (weights_RW @ lengths_W).round()
        above_R = totals_R - (q * totals_R).ceil()  # so many tokens may lie above it
        size = 4 * int(len(values_T) * (1 - q)) + 64
        while True:  # the largest values are enough, but for draws of windows that hold nearly all of them
            upto_RT = weights_RW[:, windows_T[:size]].cumsum(1)
            if size >= len(values_T) or bool((upto_RT[:, -1] > above_R).all()):
                break
            size *= 2
        at_R = torch.searchsorted(upto_RT, above_R[:, None], right=True)[:, 0]
        return values_T[at_R.clamp(max=len(values_T) - 1)]

    rows = max(1, ROW_ELEMENTS // len(values_T))
    return lambda weights_RW: torch.cat([some(part) for part in torch.split(weights_RW, rows)])


class Bootstrap:
    """Draws of windows with replacement, the same ones for every figure, and intervals from them.

    Intervals are bias-corrected and accelerated (BCa: B. Efron, Better Bootstrap Confidence Intervals, JASA 1987),
    since KL divergences are skewed, and widened for few windows by t instead of normal quantiles (T. Hesterberg,
    What Teachers Should Know About the Bootstrap, 2014, section 3.3).
    """

    def __init__(self, num_windows: int, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.num_windows = num_windows
        drawn_RW = torch.randint(
            num_windows, (resamples, num_windows), generator=torch.Generator().manual_seed(seed)
        )
        self.weights_RW = torch.zeros(resamples, num_windows, dtype=torch.float64)
        self.weights_RW.scatter_add_(1, drawn_RW, torch.ones_like(drawn_RW, dtype=torch.float64))

    def estimate(self, statistic: Statistic) -> Estimate:
        """The figure of the text as it is, and its interval; ends are NaN with one window, all is where it is NaN."""
        value = float(statistic(torch.ones(1, self.num_windows, dtype=torch.float64)))
        drawn_R = statistic(self.weights_RW).sort().values
        if math.isnan(value) or self.num_windows < 2 or bool(drawn_R.isnan().any()):
            return Estimate(value, math.nan, math.nan)
        if bool((drawn_R == value).all()):
            return Estimate(value, value, value)
        count = len(drawn_R)
        below = float((drawn_R < value).double().mean() + (drawn_R == value).double().mean() / 2)
        bias = NormalDist().inv_cdf(min(max(below, 1 / count), 1 - 1 / count))
        acceleration, z = self._acceleration(statistic), _z_of(self.num_windows)
        ends = []
        for side in (-z, z):
            slower = max(1 - acceleration * (bias + side), 1e-6)  # at 0 the end is the last draw of all
            share = NormalDist().cdf(bias + (bias + side) / slower)
            ends.append(float(drawn_R[min(max(math.ceil(share * count) - 1, 0), count - 1)]))
        return Estimate(value, min(ends), max(ends))

    def _acceleration(self, statistic: Statistic) -> float:
        """How fast the figure's spread grows with it, by leaving out one window at a time."""
        d_W = torch.cat([statistic(rows) for rows in self._leaving_one_out()])
        d_W = d_W.mean() - d_W
        spread = float(d_W.square().sum()) ** 1.5
        skew = float((d_W**3).sum()) / (6 * spread) if spread > 0 else 0.0
        return skew if math.isfinite(skew) else 0.0

    def _leaving_one_out(self) -> Iterator[torch.Tensor]:
        size = max(1, ROW_ELEMENTS // self.num_windows)
        for begin in range(0, self.num_windows, size):
            left_out = torch.arange(begin, min(begin + size, self.num_windows))
            rows_RW = torch.ones(len(left_out), self.num_windows, dtype=torch.float64)
            rows_RW[torch.arange(len(left_out)), left_out] = 0
            yield rows_RW


def _z_of(num_windows: int) -> float:
    """Normal quantile at which the interval's ends are taken: t's, times sqrt(n / (n - 1)).

    t by its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5), off by 1 % at n = 5; n is taken as 4 at least.
    """
    z, v = NormalDist().inv_cdf((1 + LEVEL) / 2), max(num_windows - 1, 3)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return t * math.sqrt((v + 1) / v)


def sign_flip_p(differences_W: torch.Tensor, seed: int = 0) -> float:
    """Two-sided p-value that the sum of paired differences is 0; NaN where one is NaN.

    Were two models alike, each window's difference could as well have had the other sign.  p is the share of ways to
    choose signs under which the sum is as far from 0 as it is: of all 2^W where they are no more than MAX_FLIPS, which
    is exact, else of random ones and the one that was observed (so never below 1 / (MAX_FLIPS + 1)).

    Args:
        differences_W: F64, summed over each window.
        seed: of the random signs.
    """
    if not bool(differences_W.isfinite().all()):
        return math.nan
    count = len(differences_W)
    observed = float(differences_W.sum().abs()) * (1 - 1e-12)  # sums in another order may round otherwise
    if 2**count <= MAX_FLIPS:
        signs_FW = 1 - 2 * (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).double()
        return float(((signs_FW @ differences_W).abs() >= observed).double().mean())
    generator, as_far, size = torch.Generator().manual_seed(seed), 0, max(1, ROW_ELEMENTS // count)
    for begin in range(0, MAX_FLIPS, size):
        shape = (min(size, MAX_FLIPS - begin), count)
        signs_FW = 1 - 2 * torch.randint(2, shape, generator=generator).double()
        as_far += int(((signs_FW @ differences_W).abs() >= observed).sum())
    return (1 + as_far) / (1 + MAX_FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value corrected for all being tried (S. Holm 1979); NaN stays NaN and counts as one that was tried."""
    corrected, least = list(p_values), 0.0
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, p * (len(p_values) - rank)))
        corrected[i] = least
    return corrected
