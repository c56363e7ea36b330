"""Which questions are asked, in which order and with which seeds: a pure function of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m27quant.bench.settings import Setting
from m27quant.bench.tasks import Conversation
from m27quant.errors import UsageError
from m27quant.runtime.generation import derived_seed

WARM_TOKENS = 64
"""Of an answer that is not measured."""
SEED_RANGE = 2**31
"""Servers take seeds below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is asked, and how often; the same for the runtime and for a server."""

    tasks: tuple[str, ...] = ("math500",)
    """Names of `TASKS`, NAME=FILE, or files."""
    concurrency: tuple[int, ...] = (1, 32)
    """Requests in flight at once; a column of the cards' table each."""
    num_prompts: tuple[int, ...] | None = None
    """One number, or one for each concurrency; None: 32, or 4 for each request in flight where that is more."""
    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    thinking: bool = True
    seed: int = 42
    repeat: int = 1
    """Rounds in which everything is measured; each second one in reverse order, the sums count."""
    settings: tuple[Setting, ...] = ()
    """Of the drafter, one after another; none: as it is configured."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming what cannot be."""
        for name, values in (("concurrency", self.concurrency), ("num_prompts", self.num_prompts or (1,))):
            if not values or min(values) < 1:
                raise UsageError(f"{name} needs whole numbers of at least 1, got {list(values)}")
        if len(set(self.concurrency)) != len(self.concurrency):
            raise UsageError(f"concurrency names a number twice: {list(self.concurrency)}")
        if self.num_prompts is not None and len(self.num_prompts) not in (1, len(self.concurrency)):
            raise UsageError(
                f"{len(self.num_prompts)} numbers of prompts for {len(self.concurrency)} concurrencies",
                hint="give one for all, or one for each",
            )
        for name in ("max_tokens", "repeat"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.tasks:
            raise UsageError("no task is named", hint="name one with --task")

    def count(self, concurrency: int) -> int:
        """Requests that are measured at this concurrency."""
        if self.num_prompts is None:
            return max(32, 4 * concurrency)
        if len(self.num_prompts) == 1:
            return self.num_prompts[0]
        return self.num_prompts[self.concurrency.index(concurrency)]


@dataclass(frozen=True, slots=True)
class Request:
    """One question."""

    index: int
    messages: Conversation
    seed: int
    max_tokens: int


def make_requests(
    conversations: Sequence[Conversation], options: BenchOptions, concurrency: int
) -> tuple[list[Request], list[Request]]:
    """What warms up, a short request for each in flight, and what is measured; rows are taken round and round."""

    def request(index: int, max_tokens: int) -> Request:
        seed = derived_seed(options.seed, index) % SEED_RANGE
        return Request(index, conversations[index % len(conversations)], seed, max_tokens)

    last, short = concurrency + options.count(concurrency), min(WARM_TOKENS, options.max_tokens)
    warm = [request(i, short) for i in range(concurrency)]
    return warm, [request(i, options.max_tokens) for i in range(concurrency, last)]
