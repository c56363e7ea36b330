"""A model in memory for programs: prompts in, texts out, at once or as they come."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, UsageError
from m27quant.runtime.blocks import Blocks
from m27quant.runtime.detokenize import Detokenizer
from m27quant.runtime.engine import Engine
from m27quant.runtime.generation import SamplingParams, derived_seed, read_generation_config
from m27quant.runtime.graphs import Graphs
from m27quant.runtime.kv_cache import KvCache
from m27quant.runtime.memory import MemoryPlan
from m27quant.runtime.model import Model
from m27quant.runtime.options import RunOptions
from m27quant.runtime.scheduler import Scheduler
from m27quant.runtime.sequence import FinishReason, Timing, TokenLogprobs
from m27quant.runtime.sequence import Sequence as Running
from m27quant.runtime.speculative.proposal import Drafter
from m27quant.runtime.statistics import RequestStats, request_stats

Prompt = str | Sequence[int]
"""Text, or token ids as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """One request's outcome."""

    index: int
    """Its place among the prompts of the call."""
    text: str
    """Without the stop string; special tokens left out unless asked for.  Empty without a tokenizer."""
    token_ids: list[int]
    """With the token that ended it."""
    finish_reason: FinishReason
    error: str | None
    """Why there is no answer, where the reason is "error"."""
    logprobs: list[TokenLogprobs] | None
    num_prompt_tokens: int
    seed: int
    stats: RequestStats

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under OpenAI's names."""
        prompt, output = self.num_prompt_tokens, len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """What one step added to one request."""

    index: int
    text: str
    """More of the text; what may begin a stop string, and half a character, comes with a later event."""
    token_ids: list[int]
    num_accepted: int
    """So many of these tokens, the first ones, had been drafted."""
    result: GenerateResult | None
    """The whole outcome, with a request's last event."""


@dataclass(slots=True)
class _Watched:
    """A request of a call, and how much of it was handed out."""

    index: int
    sequence: Running
    num_chars: int = 0
    num_tokens: int = 0
    event: StreamEvent | None = field(default=None)


class LLM:
    """A loaded model and the requests that it answers; `m27quant.load` makes it.  For one thread at a time."""

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        folder: Path,
        options: RunOptions,
        plan: MemoryPlan,
        drafter: Drafter | None = None,
        *,
        notices: Iterable[str] = (),
    ) -> None:
        """Put the parts together.

        Args:
            model: with the weights.
            cache: its keys and values.
            folder: where tokenizer.json and generation_config.json lie; without the first, prompts are token ids.
            options: as it was loaded with.
            plan: what everything takes.
            drafter: proposes tokens; its taps are the cache's.
            notices: what was decided on the way and is worth a line.

        Raises:
            CheckpointError: a damaged tokenizer.json or generation_config.json.
        """
        self.model, self.options, self.memory = model, options, plan
        config = model.config
        self.tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
        self.generation = read_generation_config(folder, config.vocab_size, self.tokenizer)
        self.notices = [*notices, *self.generation.notices]
        blocks = Blocks(cache.num_blocks, options.block_size, reusing=options.prefix_caching)
        scheduler = Scheduler(
            blocks,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_draft_tokens=drafter.num_draft_tokens if drafter else 0,
        )
        self.engine = Engine(model, cache, scheduler, drafter)
        if options.cuda_graphs and model.device.type == "cuda" and model.ranks.size == 1:
            self.engine.graphs = Graphs(model, cache, self.engine.taps)
        longest = min(config.max_position_embeddings, cache.num_blocks * options.block_size + 1)
        self.max_model_len = min(longest, options.max_model_len or longest)
        self._number = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerateResult]:
        """Answer all prompts; results in their order.

        Args:
            prompts: one or several; a list of ints is one.
            params: for all of them, or one for each; None: generation_config's.

        Raises:
            UsageError: params that cannot be, another number of them than prompts, text without a tokenizer.

        What is wrong with one prompt (empty, too long) is that request's "error" and no other's.
        """
        results = [event.result for event in self.stream(prompts, params) if event.result is not None]
        return sorted(results, key=lambda result: result.index)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Answer all prompts, in pieces as they come; arguments and errors as `generate`.

        Closing the iterator cancels what is not finished.
        """
        many = _as_prompts(prompts)
        settings = _one_for_each(params, len(many))
        requests = [self._request(prompt, setting) for prompt, setting in zip(many, settings, strict=True)]
        return self._events({r.number: _Watched(index, r) for index, r in enumerate(requests)})

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Running:
        """Queue one request; `step` works on it, `result` tells its outcome.

        Raises:
            UsageError: as `generate`.
        """
        request = self._request(prompt, params or SamplingParams())
        if request.error is None:
            self.engine.scheduler.add(request)
        return request

    def _request(self, prompt: Prompt, params: SamplingParams) -> Running:
        """A request that is not queued yet, or is refused already."""
        settings = self.generation.complete(params, self.model.config.vocab_size)
        ids = self.encode(prompt)
        number, self._number = self._number, self._number + 1
        room = self.max_model_len - len(ids)
        sequence = Running(
            number=number,
            tokens=ids,
            num_prompt=len(ids),
            params=settings,
            seed=derived_seed(self.options.seed, number) if settings.seed is None else settings.seed,
            stop_ids=self.generation.stop_ids(settings),
            max_length=len(ids) + min(room, settings.max_tokens or room),
            text=self._detokenizer(settings),
            timing=Timing(arrived=time.perf_counter()),
        )
        sequence.error = self._refusal(ids)
        if sequence.error is not None:
            sequence.finish_reason = "error"
        return sequence

    def step(self) -> list[Running]:
        """Compute one batch; returns the requests that have new tokens or are finished."""
        return self.engine.step()

    def cancel(self, request: Running) -> None:
        """Stop one request; its result then has what it had so far."""
        self.engine.cancel(request)

    def result(self, request: Running, index: int = 0) -> GenerateResult:
        """The outcome of a finished request."""
        assert request.finish_reason is not None, "the request is still running"
        return GenerateResult(
            index=index,
            text=request.text.text if request.text else "",
            token_ids=request.tokens[request.num_prompt :],
            finish_reason=request.finish_reason,
            error=request.error,
            logprobs=request.logprobs if request.params.logprobs is not None else None,
            num_prompt_tokens=request.num_prompt,
            seed=request.seed,
            stats=request_stats(request),
        )

    @contextmanager
    def drafting_with(self, drafter: Drafter | None) -> Iterator[None]:
        """Within the block this drafter is asked, or none; taps are kept up, so that each finds its way in its turn.

        Args:
            drafter: with the taps of the one loaded, or without any.  No request may be running.

        Raises:
            UsageError: it reads other hidden states than are kept.
        """
        if drafter is not None and drafter.taps not in ((), self.engine.taps):
            raise UsageError(
                f"the drafter reads hidden states {list(drafter.taps)}, kept are {list(self.engine.taps)}",
                hint="load the checkpoint with it",
            )
        engine, scheduler = self.engine, self.engine.scheduler
        before = engine.drafter, scheduler.num_draft_tokens
        engine.drafter, scheduler.num_draft_tokens = drafter, drafter.num_draft_tokens if drafter else 0
        try:
            yield
        finally:
            engine.drafter, scheduler.num_draft_tokens = before

    def without_drafter(self) -> AbstractContextManager[None]:
        """Within the block nothing is drafted."""
        return self.drafting_with(None)

    def drop_cache(self) -> None:
        """Requests from now on compute their prompts anew."""
        self.engine.scheduler.blocks.forget()

    def _events(self, watched: dict[int, _Watched]) -> Generator[StreamEvent, None, None]:
        try:
            for entry in watched.values():
                if entry.sequence.finish_reason is None:
                    self.engine.scheduler.add(entry.sequence)
            while watched:
                for entry in list(watched.values()):
                    finished = entry.sequence.finish_reason is not None
                    if finished:
                        del watched[entry.sequence.number]
                    if finished or entry.sequence.num_output > entry.num_tokens:
                        yield self._event(entry)
                if watched:
                    self.step()
        finally:
            for entry in watched.values():
                self.cancel(entry.sequence)

    def _event(self, watched: _Watched) -> StreamEvent:
        sequence = watched.sequence
        text = sequence.text.text if sequence.text else ""
        tokens = sequence.tokens[sequence.num_prompt + watched.num_tokens :]
        accepted = sequence.timing.accepted[-1] if watched.num_tokens and sequence.timing.accepted else 0
        event = StreamEvent(
            index=watched.index,
            text=text[watched.num_chars :],
            token_ids=tokens,
            num_accepted=min(accepted, len(tokens)),
            result=self.result(sequence, watched.index) if sequence.finish_reason else None,
        )
        watched.num_chars, watched.num_tokens = len(text), watched.num_tokens + len(tokens)
        return event

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with the special tokens that stand in it and no others.

        Raises:
            UsageError: text without a tokenizer or that UTF-8 cannot hold, ids that are none.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(
                    "the checkpoint has no tokenizer.json, so text cannot become tokens",
                    hint="pass token ids",
                )
            try:
                return self.tokenizer.rendered(prompt)
            except CheckpointError as fault:
                raise UsageError(fault.message, hint="pass text that is valid Unicode") from None
        ids = list(prompt)
        size = self.model.config.vocab_size
        values: list[Any] = list(ids)  # a caller's types are not ours to trust
        for index in values:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
                raise UsageError(f"a prompt's token ids must be integers from 0 to {size - 1}, got {index!r}")
        return ids

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            if params.stop_strings:
                raise UsageError(
                    "stop strings need a tokenizer.json, which the checkpoint does not have",
                    hint="pass stop_token_ids",
                )
            return None
        return Detokenizer(
            self.tokenizer, params.stop_strings, skip_special_tokens=params.skip_special_tokens
        )

    def _refusal(self, ids: list[int]) -> str | None:
        """Why a prompt cannot be answered, if it cannot."""
        if not ids:
            return "the prompt is empty: MiniMax-M2 has no token that a text begins with"
        if len(ids) >= self.max_model_len:
            return f"the prompt has {len(ids)} tokens; with an answer at most {self.max_model_len} fit"
        return None


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(p, int) for p in many):
        return [[p for p in many if isinstance(p, int)]]
    return [p for p in many if not isinstance(p, int)]


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling params for {count} prompts")
    return list(params)
