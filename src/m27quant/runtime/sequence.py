"""One request on its way: its tokens, its place in the cache, how it ends, what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from m27quant.runtime.detokenize import Detokenizer
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.sampling import Row

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: an end token or stop string; length: max_tokens, or the context is full; error: see the message."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, in nats, before penalties and temperature."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log probability), likeliest first."""


@dataclass(slots=True)
class Timing:
    """What a request took; seconds are those of whole steps that it was part of."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    """Of target forward passes that gave tokens."""
    accepted: list[int] = field(default_factory=list)
    """Drafts accepted in each step that gave tokens, the prompt's last one left out."""
    drafted: list[int] = field(default_factory=list)
    """Drafts proposed in each of those."""
    num_reused: int = 0
    """Tokens of the prompt that were in the cache already."""
    num_preemptions: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A request; the scheduler owns its blocks, the engine its tokens."""

    number: int
    tokens: list[int]
    """Prompt and output; only grows."""
    num_prompt: int
    params: SamplingParams
    """Complete."""
    seed: int
    stop_ids: frozenset[int]
    max_length: int
    """len(tokens) when it has to end."""
    text: Detokenizer | None
    timing: Timing
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they are known."""
    num_published: int = 0
    num_computed: int = 0
    """Positions whose keys and values are in the cache."""
    num_tapped: int = 0
    """Positions whose taps the drafter has got."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the last token has not been through the model."""
        return self.num_uncomputed == 1 and self.num_output > 0

    def row(self, ancestors: list[int]) -> Row:
        """What the choice behind some drafted ancestors depends on."""
        tokens = [*self.tokens, *ancestors] if ancestors else self.tokens
        return Row(self.params, self.seed, tokens, self.num_prompt, self.stop_ids)

    def append(self, token: int) -> None:
        """Take a new token; sets `finish_reason` where it is the last one."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        if self.text is not None and self.text.add(token):
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
