"""What `--logits` measured, in figures, and which of them are beyond their limits.

Shapes: T tokens.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from m27quant.checkpoint import names
from m27quant.verify.collect import Findings

# Limits, from tiny-m27 (its model card has the measured figures); a larger model loses less.
MAX_PERPLEXITY_RATIO = 1.05
MAX_KL_MEAN = 0.05
MIN_TOP1 = 0.85
MIN_EXPERT_SQNR_DB = 10.0


@dataclass(slots=True)
class Comparison:
    """What was measured; the source comes first."""

    kl: torch.Tensor
    """F64 [T]: KL divergence in nats of the checkpoint's distribution from the source's."""
    same_top1: torch.Tensor
    """Bool [T]: both hold the same token for the likeliest."""
    nll: tuple[torch.Tensor, torch.Tensor]
    """F64, for each token that is followed by one: its negative log-likelihood by each model."""
    layer_sqnr_db: list[float] = field(default_factory=list)
    """Of the hidden states behind each layer, all that comes before included."""
    expert_sqnr_db: dict[tuple[int, int], float] = field(default_factory=dict)
    """(layer, expert): of the expert alone, on the source's own tokens for it, if there are enough; inf if equal."""

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of source and checkpoint."""
        source, ours = (_exp(float(nll.mean())) for nll in self.nll)
        return source, ours


def figures(result: Comparison) -> dict[str, Any]:
    """The figures by name, rounded to what they are worth."""
    source, ours = result.perplexity
    layers = result.layer_sqnr_db
    worst = sorted(result.expert_sqnr_db.items(), key=lambda item: item[1])[:5]
    return {
        "kl_mean": _rounded(float(result.kl.mean())),
        "kl_p99": _rounded(_quantile(result.kl, 0.99)),
        "kl_max": _rounded(float(result.kl.max())),
        "top1_agreement": _rounded(float(result.same_top1.double().mean())),
        "perplexity_source": _rounded(source),
        "perplexity": _rounded(ours),
        "perplexity_ratio": _rounded(ours / source),
        "layer_sqnr_db": [round(v, 2) for v in layers],
        "worst_experts": [
            {"layer": layer, "expert": expert, "sqnr_db": round(v, 2)} for (layer, expert), v in worst
        ],
    }


def _quantile(values: torch.Tensor, q: float) -> float:
    """The smallest value that at least a share q is not above; torch's own has a limit of 2**24 values."""
    return float(values.sort().values[max(0, math.ceil(q * len(values)) - 1)])


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def report(result: Comparison, found: Findings) -> None:
    """Compare the figures with the limits."""
    source, ours = result.perplexity
    mean, agreement = float(result.kl.mean()), float(result.same_top1.double().mean())
    if not math.isfinite(mean) or not math.isfinite(ours / source):
        bad = int((~result.kl.isfinite()).sum())
        found.add("M27-L001", f"{bad:,} of {len(result.kl):,} tokens get NaN or infinite logits")
        return
    _limit(found, "M27-L002", "perplexity ratio", ours / source, MAX_PERPLEXITY_RATIO, above=True)
    _limit(found, "M27-L003", "mean KL divergence", mean, MAX_KL_MEAN, above=True)
    _limit(found, "M27-L004", "top-1 agreement", agreement, MIN_TOP1, above=False)
    for (layer, expert), value in result.expert_sqnr_db.items():
        if value < MIN_EXPERT_SQNR_DB:
            median = statistics.median(v for (at, _), v in result.expert_sqnr_db.items() if at == layer)
            name = names.expert(layer, expert, "w1").removesuffix(".w1")
            found.add(
                "M27-L005", f"'{name}' gives its tokens an SQNR of {value:.1f} dB; the layer's median is {median:.1f}",
                tensor=name, expected=f"at least {MIN_EXPERT_SQNR_DB:g} dB", found=f"{value:.2f} dB",
                badness=-value,
            )  # fmt: skip


def _limit(
    found: Findings,
    code: Literal["M27-L002", "M27-L003", "M27-L004"],
    what: str,
    value: float,
    limit: float,
    *,
    above: bool,
) -> None:
    if (value > limit) if above else (value < limit):
        side = "at most" if above else "at least"
        found.add(
            code,
            f"{what} is {value:.4g}, the limit {limit:g}",
            expected=f"{side} {limit:g}",
            found=f"{value:.6g}",
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
