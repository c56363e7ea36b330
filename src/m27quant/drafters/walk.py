"""What an engine would accept of a drafter, from texts that the target has finished: step by step, as it generates.

The tokens that an engine gives do not depend on the drafter, and what the drafter sees of committed positions does not
depend on how they were committed.  So the steps through a finished text are the steps of generating it, at the price of
one forward pass over the text; with invariant kernels to the last bit.

Shapes: T tokens of a text, F tapped features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from m27quant.drafters.metrics import AcceptanceStats
from m27quant.runtime.speculative.lengths import agreeing
from m27quant.runtime.speculative.proposal import Drafter, DraftRequest, Proposal


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what the target wrote behind it."""

    tokens: list[int]
    num_prompt: int
    max_length: int
    """Tokens at which it had to end: near it an engine asks for fewer drafts."""


@dataclass(slots=True)
class _Walker:
    """One text, and how far the steps have come."""

    text: Text
    taps: Tensor | None
    at: int
    """Committed tokens."""
    known: int = 0
    """Positions whose taps the drafter has."""
    accepted: list[int] = field(default_factory=list)
    num_drafted: int = 0

    @property
    def room(self) -> int:
        """Drafts that are of use."""
        return max(0, self.text.max_length - self.at - 1)

    def request(self, number: int, most: int) -> DraftRequest:
        fresh = None if self.taps is None else self.taps[self.known : self.at - 1]
        self.known = self.at - 1
        return DraftRequest(number, self.text.tokens[: self.at], fresh, min(most, self.room))

    def take(self, proposal: Proposal | None) -> None:
        """The step that this proposal makes."""
        count = 0 if proposal is None else agreeing(proposal, self.text.tokens, self.at)
        self.num_drafted += 0 if proposal is None else len(proposal.tokens)
        self.accepted.append(count)
        self.at += count + 1


def walk(drafter: Drafter, texts: Sequence[Text], taps: Sequence[Tensor | None]) -> list[AcceptanceStats]:
    """The steps of each text, all texts side by side.

    Args:
        drafter: without histories of sequences below 0, which are used and forgotten.
        texts: at least one token each behind the prompt, which the prompt's own forward pass gave.
        taps: [T, F] of each text, as the drafter wants them; None for one without taps.
    """
    walkers = [_Walker(text, t, text.num_prompt + 1) for text, t in zip(texts, taps, strict=True)]
    numbers = [-1 - index for index in range(len(walkers))]
    for number in numbers:
        drafter.forget(number)
    while running := [(n, w) for n, w in zip(numbers, walkers, strict=True) if w.at < len(w.text.tokens)]:
        asking = [(number, walker) for number, walker in running if walker.room]
        requests = [walker.request(number, drafter.num_draft_tokens) for number, walker in asking]
        found = dict(zip((n for n, _ in asking), drafter.propose(requests), strict=True)) if requests else {}
        for number, walker in running:
            walker.take(found.get(number))
    for number in numbers:
        drafter.forget(number)
    return [AcceptanceStats.of_steps(w.accepted, [w.num_drafted]) for w in walkers]


def repeated_share(texts: Sequence[Text], n: int = 8) -> float:
    """Share of the tokens behind the prompts that end an n-gram seen before in their text, mean over texts."""
    shares = []
    for text in texts:
        seen: set[tuple[int, ...]] = set()
        repeats = 0
        for end in range(n, len(text.tokens) + 1):
            ngram = tuple(text.tokens[end - n : end])
            repeats += end > text.num_prompt and ngram in seen
            seen.add(ngram)
        shares.append(repeats / (len(text.tokens) - text.num_prompt))
    return sum(shares) / len(shares)
