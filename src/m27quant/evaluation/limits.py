"""What an evaluation may find at most, for CI."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m27quant.errors import UsageError, escape
from m27quant.evaluation.result import CandidateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Figures are compared with them as they are; None: no limit."""

    max_kl: float | None = None
    """Of the mean KL divergence, in nats."""
    min_top1: float | None = None
    """Of top-1 agreement, from 0 to 1."""
    max_ppl_ratio: float | None = None
    """Of the perplexity's ratio to the reference's."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no figure could be compared with."""
        for name, top in (("max_kl", math.inf), ("min_top1", 1.0), ("max_ppl_ratio", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= top:
                most = " to 1" if top == 1 else " on"
                raise UsageError(f"{name} must be a number from 0{most}, got {value:g}")


def failures(rows: Sequence[CandidateResult], limits: Limits, num_tokens: int) -> Iterator[str]:
    """What is beyond a limit, and what is not a number, which is a failure without any limit."""
    for row in rows:
        label = escape(row.label)
        if row.non_finite:
            yield f"{label}: {row.non_finite:,} of {num_tokens:,} tokens get NaN or infinite logits"
            continue
        for what, found, limit, above in (
            ("mean KL divergence", row.kl_mean.value, limits.max_kl, True),
            ("top-1 agreement", row.top1.value, limits.min_top1, False),
            ("perplexity ratio", row.perplexity_ratio.value, limits.max_ppl_ratio, True),
        ):
            if limit is not None and not (found <= limit if above else found >= limit):
                yield f"{label}: {what} is {found:.4g}, the limit {limit:g}"
