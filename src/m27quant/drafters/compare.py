"""Whether two acceptance lengths differ: paired by text, as texts differ far more than targets do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m27quant.drafters.metrics import AcceptanceStats

RESAMPLES = 4000
TAIL = 0.025


@dataclass(frozen=True, slots=True)
class Difference:
    """Of tau, or of m_accept, which differ by the same."""

    value: float
    """Here minus there, of all texts together."""
    standard_error: float
    """Paired, by the bootstrap over texts."""
    low: float
    high: float
    """95 % of the resampled differences lie between them."""


def paired_difference(
    here: Sequence[AcceptanceStats], there: Sequence[AcceptanceStats], seed: int = 0
) -> Difference:
    """The difference of the mean drafts accepted, ratio of sums, on the same texts or behind the same prompts.

    Texts are drawn with replacement, the same ones for both sides.
    """
    if len(here) != len(there):
        raise ValueError(f"{len(here)} texts here, {len(there)} there: nothing to pair")
    counts = torch.tensor(
        [
            [a.num_accepted, a.num_steps, b.num_accepted, b.num_steps]
            for a, b in zip(here, there, strict=True)
        ],
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator)
    differences = _difference(counts[drawn].sum(1))
    low, high = torch.quantile(differences, torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
    return Difference(float(_difference(counts.sum(0))), float(differences.std()), low, high)


def _difference(sums: torch.Tensor) -> torch.Tensor:
    a, steps_a, b, steps_b = sums.unbind(-1)
    return a / steps_a.clamp(min=1) - b / steps_b.clamp(min=1)
