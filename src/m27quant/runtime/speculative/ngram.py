"""Prompt lookup: what followed the last time that the text ended like this.  Needs no drafter (arXiv:2304.04487).

The longest suffix that occurred before is taken, and of its occurrences the latest.  Where the copy runs into the end
of the text it goes on with what it has copied, so that a text that repeats itself is continued for as long as asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from m27quant.errors import UsageError
from m27quant.runtime.speculative.proposal import NOTHING, DraftRequest, Proposal, chain


class NgramDrafter:
    """Copies from a sequence's own text."""

    taps: tuple[int, ...] = ()

    def __init__(self, num_draft_tokens: int = 8, *, max_ngram: int = 4, min_ngram: int = 1) -> None:
        """Make a drafter without texts.

        Args:
            num_draft_tokens: drafts a step.
            max_ngram: longest suffix that is looked up.
            min_ngram: shortest one.

        Raises:
            UsageError: sizes that allow nothing.
        """
        if num_draft_tokens < 1 or not 1 <= min_ngram <= max_ngram:
            raise UsageError(
                f"num_draft_tokens {num_draft_tokens}, n-grams of {min_ngram} to {max_ngram}: each must be at least 1, "
                "the longest no shorter than the shortest"
            )
        self.num_draft_tokens = self.max_depth = num_draft_tokens
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self._indices: dict[int, _Index] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        return [self._one(request) for request in requests]

    def forget(self, sequence: int) -> None:
        self._indices.pop(sequence, None)

    def _one(self, request: DraftRequest) -> Proposal:
        index = self._indices.setdefault(request.sequence, _Index(self.min_ngram, self.max_ngram))
        index.extend(request.tokens)
        count = min(self.num_draft_tokens, request.max_tokens)
        begin = index.find(request.tokens)
        if begin is None or count < 1:
            return NOTHING
        period = request.tokens[begin:]
        return chain([period[i % len(period)] for i in range(count)])


class _Index:
    """Where each n-gram of a growing text ended last, the text's own end left out."""

    def __init__(self, least: int, most: int) -> None:
        self.sizes = range(most, least - 1, -1)
        self.ends: dict[tuple[int, ...], int] = {}
        self.done = 0

    def extend(self, tokens: list[int]) -> None:
        """Take in all n-grams that end before the last token."""
        for end in range(self.done + 1, len(tokens)):
            for size in self.sizes:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.done = max(self.done, len(tokens) - 1)

    def find(self, tokens: list[int]) -> int | None:
        """Where the continuation of the longest known suffix begins."""
        for size in self.sizes:
            if size < len(tokens) and (end := self.ends.get(tuple(tokens[-size:]))) is not None:
                return end
        return None
