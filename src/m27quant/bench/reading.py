"""What one run over some requests gave: each answer, the time, and how drafts fared by whose count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from m27quant.drafters.metrics import AcceptanceStats

Source = Literal["runtime", "usage", "vllm usage", "counters", "sglang usage", "sglang average", "none"]
"""Where acceptance was read; docs/metrics.md says what each one counts."""

COUNTED: dict[Source, str] = {
    "runtime": "every verify step of these requests, by the runtime itself",
    "usage": "every verify step of these requests, from the answers' usage.m27quant",
    "vllm usage": "every verify step of these requests, from vLLM's metrics.speculative_decoding",
    "counters": "steps that drafted something, from spec_decode counters before and after; others' requests count too",
    "sglang usage": "accepted_prediction_tokens over completion_tokens less those and the first one of each answer",
    "sglang average": "SGLang's avg_spec_accept_length since the server started, the warm-up and others included",
    "none": "the server tells nothing of drafts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's outcome; seconds."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    """Why there is no answer."""
    ttft_s: float | None = None
    """From sending the request to its first token."""
    itl_s: float | None = None
    """From the first token to the last one, over all tokens but the first."""
    source: Source = "none"
    stats: AcceptanceStats | None = None
    accepted_tokens: int | None = None
    """Where a server counts accepted drafts and no steps."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How drafts fared, and who says so: counts of steps, or two sums, or only an average."""

    source: Source = "none"
    stats: AcceptanceStats | None = None
    sums: tuple[int, int] | None = None
    """Verify steps and drafts accepted in them."""
    average: float | None = None
    """tau as a server states it."""

    @property
    def tau(self) -> float | None:
        """Tokens of a step; None where no step was counted."""
        if self.stats is not None:
            return self.stats.tau if self.stats.num_steps else None
        if self.sums is not None and self.sums[0]:
            return 1 + self.sums[1] / self.sums[0]
        return self.average

    def __add__(self, other: Acceptance) -> Acceptance:
        """Both together; an average is always of everything so far."""
        if self.source != other.source:
            return other if self.source == "none" else self
        if self.stats is not None and other.stats is not None:
            return Acceptance(self.source, self.stats + other.stats)
        if self.sums is not None and other.sums is not None:
            return Acceptance(self.source, None, (self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]))
        return other


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One run over some requests."""

    answers: list[Answer]
    seconds: float
    acceptance: Acceptance = field(default_factory=Acceptance)
    notices: tuple[str, ...] = ()
    earlier: tuple[float, ...] = ()
    """Tokens/s of the turns before, where several were added up."""

    @property
    def rate(self) -> float:
        """Tokens/s."""
        tokens = sum(a.output_tokens for a in self.answers if a.error is None)
        return tokens / self.seconds if self.seconds else 0.0

    @property
    def turns(self) -> tuple[float, ...]:
        """Tokens/s of each turn."""
        return self.earlier or (self.rate,)

    def __add__(self, other: Reading) -> Reading:
        return Reading(
            answers=self.answers + other.answers,
            seconds=self.seconds + other.seconds,
            acceptance=self.acceptance + other.acceptance,
            notices=self.notices + other.notices,
            earlier=self.turns + other.turns,
        )
