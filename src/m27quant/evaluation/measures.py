"""From what was summed over each window to figures with intervals, and to tests between rows.

Shapes: T tokens, W windows, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch

from m27quant.evaluation import statistics as S
from m27quant.evaluation.lockstep import Measured, RowSums
from m27quant.evaluation.models import Model
from m27quant.evaluation.result import METRICS, CandidateResult, Estimate, Metric, Pair
from m27quant.runtime.streamed import Precision

NOT_A_NUMBER = Estimate(math.nan, math.nan, math.nan)


class Measures:
    """Figures of one evaluation: every one is estimated from the same draws of windows."""

    def __init__(self, measured: Measured, seed: int) -> None:
        self.measured, self.seed = measured, seed
        self.lengths_W = measured.lengths_W.double()
        self.followed_W = self.lengths_W - 1
        """Tokens that another one follows in their window."""
        self.windows_T = torch.repeat_interleave(torch.arange(len(self.lengths_W)), measured.lengths_W)
        self.bootstrap = S.Bootstrap(len(self.lengths_W), seed)

    def reference_perplexity(self) -> Estimate:
        return self.bootstrap.estimate(
            S.exp_of(S.mean_of(self._sums(self.measured.reference.nll), self.followed_W))
        )

    def row(self, model: Model, precision: Precision, label: str, sums: RowSums) -> CandidateResult:
        """The figures of one candidate in one precision."""
        scores, estimate = sums.scores, self.bootstrap.estimate
        kl_p99 = NOT_A_NUMBER
        if not bool(scores.kl.isnan().any()):
            kl_p99 = estimate(S.quantile_of(scores.kl, self.windows_T, 0.99))
        nll_W, lost_W = self._sums(scores.nll), self._sums(scores.nll - self.measured.reference.nll)
        return CandidateResult(
            checkpoint=model.name,
            label=label,
            is_quantized=model.is_quantized,
            activations=precision.activations,
            kv_cache_dtype=precision.kv_cache,
            non_finite=int((~scores.finite).sum()),
            perplexity=estimate(S.exp_of(S.mean_of(nll_W, self.followed_W))),
            perplexity_ratio=estimate(S.exp_of(S.mean_of(lost_W, self.followed_W))),
            kl_mean=self._mean(scores.kl),
            kl_p99=kl_p99,
            kl_max=float(scores.kl.max()),
            top1=self._mean(scores.top1),
            top8=self._mean(scores.top_n),
            router=tuple(estimate(S.mean_of(same_W, self.lengths_W)) for same_W in sums.same_experts_LW),
            layer_sqnr_db=tuple(
                estimate(S.decibels_of(signal_W, noise_W))
                for signal_W, noise_W in zip(self.measured.signal_LW, sums.noise_LW, strict=True)
            ),
        )

    def pairs(self, rows: Sequence[CandidateResult]) -> tuple[Pair, ...]:
        """Each two rows of one mode or of one checkpoint, by each metric."""
        chosen = [
            (i, j)
            for i, j in combinations(range(len(rows)), 2)
            if (rows[i].checkpoint == rows[j].checkpoint) != (_precision(rows[i]) == _precision(rows[j]))
        ]
        found: list[Pair] = []
        for metric in METRICS:
            of_metric = [self._pair(rows, i, j, metric) for i, j in chosen]
            corrected = S.holm([pair.p for pair in of_metric])
            found += (replace(pair, p=p) for pair, p in zip(of_metric, corrected, strict=True))
        return tuple(found)

    def _pair(self, rows: Sequence[CandidateResult], i: int, j: int, metric: Metric) -> Pair:
        a_T, b_T = (_metric(self.measured.rows[row], metric) for row in (i, j))
        counts_W = self.followed_W if metric == "nll" else self.lengths_W
        difference_W = self._sums(a_T - b_T)
        mean = self.bootstrap.estimate(S.mean_of(difference_W, counts_W))
        p = S.sign_flip_p(difference_W, self.seed)
        return Pair(
            a=rows[i].label, b=rows[j].label, metric=metric,
            difference=mean.value, low=mean.low, high=mean.high, p=p,
        )  # fmt: skip

    def _mean(self, values_T: torch.Tensor) -> Estimate:
        return self.bootstrap.estimate(S.mean_of(self._sums(values_T), self.lengths_W))

    def _sums(self, values_T: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(self.lengths_W).index_add_(0, self.windows_T, values_T)


def _precision(row: CandidateResult) -> tuple[str, str]:
    return row.activations, row.kv_cache_dtype


def _metric(row: RowSums, metric: Metric) -> torch.Tensor:
    values_T: torch.Tensor = getattr(row.scores, "top_n" if metric == "top8" else metric)
    return values_T
