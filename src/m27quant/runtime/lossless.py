"""The same requests with and without the drafter: equal token for token, or where they part, and how fast each was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from m27quant.runtime.api import LLM, GenerateResult, Prompt
from m27quant.runtime.generation import SamplingParams, derived_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token in which one request's two outputs differ."""

    index: int
    """Of the prompt."""
    position: int
    """In the output, from 0; the shorter output's length where one is a beginning of the other."""
    token: int | None
    """With the drafter; None where its output has ended."""
    plain_token: int | None
    """Without it."""
    margin: float | None
    """Between the two likeliest tokens there, in nats, computed once more without drafter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs of the same requests."""

    results: list[GenerateResult]
    """With the drafter, in the order of the prompts."""
    num_different: int
    first: Difference | None
    tokens_per_s: float
    """Output tokens over the time of the whole run, the prompts' own included."""
    plain_tokens_per_s: float

    @property
    def is_lossless(self) -> bool:
        return self.num_different == 0

    @property
    def speedup(self) -> float:
        """Above 1 the drafter pays."""
        return self.tokens_per_s / self.plain_tokens_per_s if self.plain_tokens_per_s else 0.0


def compare_with_plain(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    results: list[GenerateResult] | None = None,
) -> Comparison:
    """Answer `prompts` with the drafter, unless `results` are given, and again without it.

    Requests without a seed get one, so that both runs draw the same numbers.  Nothing of the first run's cache is
    used by the second.

    Args:
        llm: with a drafter.
        prompts: any number.
        params: one for each.
        results: of a run just made with the same prompts and params, all of which have seeds.
    """
    seeded = with_seeds(params, llm.options.seed)
    seconds = 0.0
    if results is None:
        results, seconds = _timed(llm, prompts, seeded)
    else:
        seconds = max((result.stats.total_s for result in results), default=0.0)
    with llm.without_drafter():
        plain, plain_seconds = _timed(llm, prompts, seeded)
        different = [
            pair for pair in zip(results, plain, strict=True) if pair[0].token_ids != pair[1].token_ids
        ]
        first = _difference(llm, prompts, seeded, *different[0]) if different else None
    return Comparison(
        results=results,
        num_different=len(different),
        first=first,
        tokens_per_s=_rate(results, seconds),
        plain_tokens_per_s=_rate(plain, plain_seconds),
    )


def with_seeds(params: Sequence[SamplingParams], seed: int) -> list[SamplingParams]:
    """Every request with a seed of its own: its number's, where it has none."""
    return [
        p if p.seed is not None else replace(p, seed=derived_seed(seed, index))
        for index, p in enumerate(params)
    ]


def _timed(
    llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> tuple[list[GenerateResult], float]:
    llm.drop_cache()
    started = time.perf_counter()
    results = llm.generate(list(prompts), params)
    return results, time.perf_counter() - started


def _rate(results: Sequence[GenerateResult], seconds: float) -> float:
    return sum(len(result.token_ids) for result in results) / seconds if seconds else 0.0


def _difference(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    found: GenerateResult,
    plain: GenerateResult,
) -> Difference:
    a, b = found.token_ids, plain.token_ids
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    index = found.index
    once = replace(params[index], max_tokens=1, min_tokens=0, logprobs=2, stop=(), stop_token_ids=())
    (again,) = llm.generate([[*llm.encode(prompts[index]), *b[:at]]], once)
    top = again.logprobs[0].top if again.logprobs else []
    return Difference(
        index=index,
        position=at,
        token=a[at] if at < len(a) else None,
        plain_token=b[at] if at < len(b) else None,
        margin=top[0][1] - top[1][1] if len(top) > 1 else None,
    )
