"""What a request took, in the terms of papers and servers.

C_k is the share of steps in which the first k drafts were accepted, m_accept their sum over k: the mean number of
drafts accepted.  tau = 1 + m_accept: tokens per forward pass of the target.  A step counts whether or not anything
was drafted; the prompt's own forward pass, which gives the first token, is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from m27quant.runtime.sequence import Sequence, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """How drafts fared."""

    num_steps: int
    num_drafted: int
    num_accepted: int
    tau: float
    m_accept: float
    c_k: list[float]
    """For k = 1, 2, ... up to the most that were ever accepted."""
    conditional: list[float]
    """C_k / C_(k-1): of steps that accepted k - 1 drafts those that accepted another."""
    drafts_per_step: float


def acceptance(accepted: list[int], drafted: list[int]) -> Acceptance:
    """Figures of steps that accepted and drafted so many tokens each."""
    steps = len(accepted)
    c_k = [sum(a >= k for a in accepted) / steps for k in range(1, max(accepted, default=0) + 1)]
    mean = sum(accepted) / steps if steps else 0.0
    return Acceptance(
        num_steps=steps,
        num_drafted=sum(drafted),
        num_accepted=sum(accepted),
        tau=1 + mean,
        m_accept=mean,
        c_k=c_k,
        conditional=[c / before for before, c in zip([1.0, *c_k], c_k, strict=False)],
        drafts_per_step=sum(drafted) / steps if steps else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One request; seconds are those of whole steps that it was part of."""

    acceptance: Acceptance
    time_to_first_token_s: float | None
    total_s: float
    prefill_s: float
    draft_s: float
    verify_s: float
    tokens_per_s: float | None
    """Behind the first token."""
    num_reused_tokens: int
    num_preemptions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def request_stats(sequence: Sequence) -> RequestStats:
    """Figures of a finished request."""
    t = sequence.timing
    finished = t.finished if t.finished is not None else t.arrived
    behind = finished - t.first_token if t.first_token is not None else 0.0
    return RequestStats(
        acceptance=acceptance(t.accepted, t.drafted),
        time_to_first_token_s=None if t.first_token is None else t.first_token - t.arrived,
        total_s=finished - t.arrived,
        prefill_s=t.prefill_s,
        draft_s=t.draft_s,
        verify_s=t.verify_s,
        tokens_per_s=(sequence.num_output - 1) / behind if behind > 0 else None,
        num_reused_tokens=t.num_reused,
        num_preemptions=t.num_preemptions,
    )


def total_acceptance(timings: Iterable[Timing]) -> Acceptance:
    """All steps of several requests together: the ratio of sums, as servers report it."""
    timings = list(timings)
    return acceptance([a for t in timings for a in t.accepted], [d for t in timings for d in t.drafted])
