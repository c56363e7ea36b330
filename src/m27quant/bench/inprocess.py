"""The bundled runtime as it is measured: so many requests in flight, each new one as soon as another has ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from m27quant.bench.reading import Acceptance, Answer, Reading
from m27quant.bench.requests import BenchOptions, Request
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.errors import UsageError
from m27quant.runtime.api import LLM
from m27quant.runtime.chat import chat_prompt
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.sequence import Sequence as Running
from m27quant.runtime.speculative.proposal import Drafter

Watch = Callable[[int, int], None]
"""Called with answers and tokens that are new; may raise to stop the run."""


class InProcess:
    """A loaded model with one drafter, or with none."""

    def __init__(self, llm: LLM, options: BenchOptions, drafter: Drafter | None) -> None:
        """`drafter`: has the taps of the one that was loaded, and this bench to itself."""
        if llm.tokenizer is None:
            raise UsageError(
                "the checkpoint has no tokenizer.json, so questions cannot become tokens",
                hint="put the tokenizer's files into its folder",
            )
        self._llm, self._options, self._drafter = llm, options, drafter
        self._prompts: dict[int, list[int]] = {}

    def run(self, requests: Sequence[Request], concurrency: int, watch: Watch) -> Reading:
        """Answer them all; nothing of an earlier run is reused.

        Raises:
            UsageError: a conversation that is none, or settings that cannot be.
        """
        waiting = deque((request, self._prompt(request), self._params(request)) for request in requests)
        running: dict[int, tuple[Request, Running]] = {}
        answers: dict[int, Answer] = {}
        self._llm.drop_cache()
        with self._llm.drafting_with(self._drafter):
            try:
                started = time.perf_counter()
                while waiting or running:
                    while waiting and len(running) < concurrency:
                        request, prompt, params = waiting.popleft()
                        sequence = self._llm.submit(prompt, params)
                        running[sequence.number] = request, sequence
                    before = self._llm.engine.totals.num_output_tokens
                    self._llm.step()
                    ended = [n for n, (_, sequence) in running.items() if sequence.finish_reason is not None]
                    for number in ended:
                        request, sequence = running.pop(number)
                        answers[request.index] = self._answer(sequence)
                    watch(len(ended), self._llm.engine.totals.num_output_tokens - before)
                seconds = time.perf_counter() - started
            finally:
                for _, sequence in running.values():
                    self._llm.cancel(sequence)
        found = [answers[request.index] for request in requests]
        stats = total(a.stats for a in found if a.stats is not None)
        return Reading(answers=found, seconds=seconds, acceptance=Acceptance("runtime", stats))

    def _prompt(self, request: Request) -> list[int]:
        if request.index not in self._prompts:
            assert self._llm.tokenizer is not None
            rendered = chat_prompt(self._llm.tokenizer, request.messages, thinking=self._options.thinking)
            self._prompts[request.index] = rendered.token_ids
        return self._prompts[request.index]

    def _params(self, request: Request) -> SamplingParams:
        o = self._options
        return SamplingParams(
            temperature=o.temperature,
            top_p=o.top_p,
            top_k=o.top_k,
            max_tokens=request.max_tokens,
            seed=request.seed,
        )

    def _answer(self, sequence: Running) -> Answer:
        result = self._llm.result(sequence)
        if result.error is not None:
            return Answer(error=result.error, finish_reason=result.finish_reason)
        s, tokens = result.stats, len(result.token_ids)
        return Answer(
            prompt_tokens=result.num_prompt_tokens,
            output_tokens=tokens,
            finish_reason=result.finish_reason,
            ttft_s=s.time_to_first_token_s,
            itl_s=1 / s.tokens_per_s if s.tokens_per_s else None,
            source="runtime",
            stats=AcceptanceStats.of_steps(sequence.timing.accepted, sequence.timing.drafted),
            draft_s=s.draft_s,
            verify_s=s.verify_s,
            num_preemptions=s.num_preemptions,
        )
