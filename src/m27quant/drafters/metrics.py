"""How many drafts are accepted, in every convention that cards and servers use; docs/metrics.md explains each.

A verify step is one forward pass of the target over the last committed token and the drafts behind it; it accepts
a >= 0 drafts and gives a + 1 tokens.  The prompt's own forward pass, which gives the first token, is no verify step.

    C_k = P(a >= k)      m_accept = E[a] = sum over k >= 1 of C_k      tau = 1 + m_accept
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from m27quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class AcceptanceStats:
    """Verify steps, counted by how many drafts each accepted; `a + b` are the steps of both."""

    histogram: tuple[int, ...] = ()
    """histogram[a]: steps that accepted exactly a drafts; the last entry is not 0."""
    num_drafted: int = 0
    """Tokens drafted in all steps."""

    @classmethod
    def of_steps(cls, accepted: Iterable[int], drafted: Iterable[int] = ()) -> AcceptanceStats:
        """From what each step accepted and drafted."""
        counts = Counter(accepted)
        if counts and min(counts) < 0:
            raise UsageError(f"a step accepts 0 drafts or more, not {min(counts)}")
        return cls(tuple(counts[a] for a in range(max(counts, default=-1) + 1)), sum(drafted))

    @classmethod
    def of_histogram(cls, histogram: Sequence[int], num_drafted: int = 0) -> AcceptanceStats:
        """From counts by drafts accepted, zeros at the end allowed."""
        size = max((a + 1 for a, count in enumerate(histogram) if count), default=0)
        return cls(tuple(histogram[:size]), num_drafted)

    @classmethod
    def of_positions(cls, num_steps: int, accepted: Sequence[int], num_drafted: int = 0) -> AcceptanceStats:
        """From how often the draft at each position was accepted, the form of vLLM's counters.

        Raises:
            UsageError: counts that no steps can have: they never rise from a position to the next.
        """
        counts = [num_steps, *accepted, 0]
        if any(after > before or after < 0 for before, after in pairwise(counts)):
            raise UsageError(f"accepted at positions {list(accepted)} cannot be of {num_steps} steps")
        return cls.of_histogram([before - after for before, after in pairwise(counts)], num_drafted)

    def __add__(self, other: AcceptanceStats) -> AcceptanceStats:
        long, short = sorted((self.histogram, other.histogram), key=len, reverse=True)
        padded = (*short, *(0 for _ in range(len(long) - len(short))))
        return AcceptanceStats(
            tuple(a + b for a, b in zip(long, padded, strict=True)), self.num_drafted + other.num_drafted
        )

    @property
    def num_steps(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        """Drafts accepted in all steps."""
        return sum(a * count for a, count in enumerate(self.histogram))

    @property
    def positions(self) -> list[int]:
        """For k = 1, 2, ...: steps whose k-th draft was accepted."""
        return [sum(self.histogram[k:]) for k in range(1, len(self.histogram))]

    @property
    def c_k(self) -> list[float]:
        """For k = 1, 2, ... up to the most that were ever accepted: share of steps that accepted k or more."""
        return [count / self.num_steps for count in self.positions]

    @property
    def conditional(self) -> list[float]:
        """C_k / C_(k-1): of steps that accepted k - 1 drafts those that accepted another."""
        return [c / before for before, c in zip([1.0, *self.c_k], self.c_k, strict=False)]

    @property
    def m_accept(self) -> float:
        """Mean number of drafts that a step accepts; 0 where there were no steps."""
        return self.num_accepted / self.num_steps if self.num_steps else 0.0

    @property
    def tau(self) -> float:
        """Mean number of tokens that a step gives: of all steps together, the ratio of sums."""
        return 1 + self.m_accept

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted of drafted tokens; None where nothing was drafted.  Falls as more is drafted, unlike tau."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def drafts_per_step(self) -> float:
        return self.num_drafted / self.num_steps if self.num_steps else 0.0

    def to_json(self) -> dict[str, Any]:
        """Counts and figures under the names of docs/metrics.md."""
        return {
            "verify_steps": self.num_steps,
            "drafted": self.num_drafted,
            "accepted": self.positions,
            "tau": self.tau,
            "m_accept": self.m_accept,
            "c_k": self.c_k,
            "conditional": self.conditional,
            "acceptance_rate": self.acceptance_rate,
            "drafts_per_step": self.drafts_per_step,
        }


def total(parts: Iterable[AcceptanceStats]) -> AcceptanceStats:
    """The steps of all parts together."""
    return sum(parts, AcceptanceStats())


def speedup(tau: float, decode_s: float, verify_s: float, draft_s: float) -> float:
    """How many times faster one sequence's tokens come: tau * t_decode / (t_verify + t_draft).

    Args:
        tau: tokens of a step.
        decode_s: seconds of a step without drafter, which gives one token.
        verify_s: seconds of the target's forward pass over all drafts.
        draft_s: seconds that drafting them takes.
    """
    return tau * decode_s / (verify_s + draft_s)


# How others count.  Each takes what they count, so that the difference between two figures can be computed.


def zlab_local(responses: Sequence[AcceptanceStats]) -> float:
    """z-lab's benchmark with transformers: the mean over responses of each one's tau, however long it is."""
    return fmean(stats.tau for stats in responses)


def sglang_accept_length(completion_tokens: int, verify_steps: int) -> float:
    """SGLang's `spec_accept_length` of a request: tokens of the answer over verify steps.

    The answer's first token comes from the prompt's forward pass, so that this is tau + 1 / verify_steps where the
    answer was not cut in the middle of a step.
    """
    return completion_tokens / verify_steps


def zlab_server(requests: Sequence[tuple[int, int]]) -> float:
    """z-lab's benchmark against SGLang, the figure of their cards: the mean over requests of `spec_accept_length`.

    Args:
        requests: (completion tokens, verify steps) of each.
    """
    return fmean(sglang_accept_length(tokens, steps) for tokens, steps in requests)


def specforge_accept_length(requests: Sequence[tuple[int, int]]) -> float:
    """SpecForge's benchmark: tokens of all answers over verify steps of all, SGLang's counts as a ratio of sums."""
    return sum(tokens for tokens, _ in requests) / sum(steps for _, steps in requests)


def sglang_server_accept_length(stats: AcceptanceStats) -> float:
    """SGLang's `avg_spec_accept_length` and its log's "accept len": tokens of verify steps, the bonus included."""
    return (stats.num_accepted + stats.num_steps) / stats.num_steps


def mirecx_m_accept(leading_hits: Sequence[int]) -> float:
    """The L3H5 card: the mean leading run of right drafts over blocks of held-out text, without bonus.

    Teacher-forced: each block begins behind a token of the text, whether or not the block before it was right.

    Args:
        leading_hits: for each block, drafts that are right before the first wrong one.
    """
    return fmean(leading_hits)


def vllm_mean_acceptance_length(num_drafts: int, num_accepted_tokens: int) -> float:
    """vLLM's log: 1 + accepted / drafts, where a draft is a step in which something was drafted."""
    return 1 + num_accepted_tokens / num_drafts


def vllm_per_position(num_drafts: int, accepted_per_pos: Sequence[int]) -> list[float]:
    """vLLM's per-position acceptance rate: C_k, over steps in which something was drafted."""
    return [count / num_drafts for count in accepted_per_pos]


def safeailab_accept_length(stats: AcceptanceStats) -> float:
    """SafeAILab's stored accept lengths, averaged: without the bonus token, so m_accept; add 1 for tau."""
    return stats.m_accept


def speculators_eal(c_k: Sequence[float]) -> float:
    """speculators' expected acceptance length: the sum of C_k, without the bonus token."""
    return sum(c_k)


def modelopt_acceptance_rate(num_tokens: int, num_steps: int) -> float:
    """modelopt's AR: tokens per step, the target's own included; of the same steps this is tau."""
    return num_tokens / num_steps
