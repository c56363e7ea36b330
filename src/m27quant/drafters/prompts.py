"""Which prompts are answered: so many of several sources, in turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from m27quant.drafters.text_data import Source
from m27quant.runtime.generation import derived_seed

HEARD = 1024
"""Rows that are checked between two looks for a signal."""


class Prompts:
    """So many prompts of several sources in turns; each follows from the seed and its number."""

    def __init__(self, sources: Sequence[Source], num_samples: int, seed: int, *, again: bool) -> None:
        """Lay out which source gives which prompt.

        Args:
            sources: at least one.
            num_samples: prompts wanted.
            seed: of the pieces of text.
            again: rows may be prompts more than once, as their answers are drawn anew.
        """
        self.sources, self.seed = sources, seed
        limits = [None if again else source.limit for source in sources]
        turns = [_numbers(limit) for limit in limits]
        order = _in_turns([((i, n) for n in numbers) for i, numbers in enumerate(turns)])
        self.places = list(itertools.islice(order, num_samples))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> list[int]:
        source, number = self.places[index]
        return self.sources[source].prompt(number, random.Random(derived_seed(self.seed, index)))

    def check(self, stop: Callable[[], None] = lambda: None) -> None:
        """Read every row that is a prompt, so that a bad one is not met with after hours.

        Raises:
            CheckpointError: one that is none; file and line are named.
            UsageError: text without a tokenizer.
        """
        for source, number in dict.fromkeys(self.places):
            limit = self.sources[source].limit
            if limit is not None and number < limit:
                if number % HEARD == HEARD - 1:
                    stop()
                self.sources[source].prompt(number, random.Random(0))


def _numbers(limit: int | None) -> Iterator[int]:
    return itertools.count() if limit is None else iter(range(limit))


def _in_turns(sources: list[Iterator[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """One of each, again and again, until all have ended."""
    while sources:
        ended = []
        for source in sources:
            found = next(source, None)
            if found is None:
                ended.append(source)
            else:
                yield found
        sources = [source for source in sources if source not in ended]
