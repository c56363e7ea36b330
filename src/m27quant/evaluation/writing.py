"""Texts that a model writes greedily, through the runtime as it would serve them; or why it cannot.

The prompts: beginnings of the evaluation's windows, and chats with tools whose replies must hold a call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from m27quant.checkpoint.source import Source
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, EnvironmentFault
from m27quant.evaluation.tool_prompts import ASKED, TOOLS
from m27quant.runtime.api import LLM, GenerateResult
from m27quant.runtime.chat import chat_prompt
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.load import load_llm
from m27quant.runtime.options import RunOptions
from m27quant.runtime.streamed import Precision

PROMPT_TOKENS = 64
TOOL_TOKENS = 192
"""Of a reply that must hold a tool call: M2's calls take 30 to 80."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered."""

    token_ids: list[int]
    tools: tuple[dict[str, Any], ...] = ()
    """Of a chat; none where a text goes on."""
    thinking: bool = False
    """The reply begins inside of the thoughts."""


@dataclass(frozen=True, slots=True)
class Written:
    """A model's answers, in the order of the prompts."""

    prompts: tuple[Prompt, ...]
    answers: tuple[GenerateResult, ...]

    @property
    def continued(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and text, in tokens, of the prompts that are no chats."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return [(prompt.token_ids, answer.token_ids) for prompt, answer in pairs if not prompt.tools]


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Why there are none."""

    reason: str


def make_prompts(
    windows: Sequence[torch.Tensor], tokenizer: Tokenizer | None, count: int, *, longest: int = 2**31
) -> list[Prompt]:
    """The first tokens of `count` windows at even distances, then the chats with tools.

    There are chats where there is a template that takes them, and where they fit with their replies.

    Args:
        windows: int64 [length] each.  Of a short one half is the prompt.
        tokenizer: of the reference; without one there are no chats.
        count: of texts; 0 is none, and no chats either.
        longest: tokens that the model has positions for.
    """
    count = min(count, len(windows))
    picked = [windows[i * len(windows) // count] for i in range(count)]
    prompts = [Prompt(ids[: min(PROMPT_TOKENS, max(1, len(ids) // 2))].tolist()) for ids in picked]
    if count and tokenizer is not None and tokenizer.has_chat_template:
        prompts += [chat for chat in _chats(tokenizer) if len(chat.token_ids) + TOOL_TOKENS < longest]
    return prompts


def _chats(tokenizer: Tokenizer) -> list[Prompt]:
    """Thoughts are closed at once, so that a call comes within few tokens; none where the template refuses."""
    try:
        asked = [
            chat_prompt(tokenizer, [{"role": "user", "content": question}], tools=TOOLS, thinking=False)
            for question in ASKED
        ]
    except CheckpointError:  # `verify` tells of it; no reason to lose all other figures
        return []
    return [Prompt(chat.token_ids, TOOLS, chat.thinking) for chat in asked]


def write(
    source: Source,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    precision: Precision | None = None,
    device: torch.device,
    max_memory: int | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Written | Unwritten:
    """Load a model, let it answer, forget it.

    Args:
        source: a reference (FP8 or BF16) or an NVFP4 checkpoint, its layout checked.
        prompts: all of one call run side by side.
        max_tokens: of a text; replies with tool calls get at least `TOOL_TOKENS`.
        precision: of an NVFP4 checkpoint; None: a reference, with nothing rounded but as its numbers are stored.
        device: where.
        max_memory: bytes to stay within.
        stop: called between steps; may raise.

    Raises:
        CheckpointError: a weight that cannot be computed with.
    """
    dtype: Literal["float32", "bfloat16"] = "float32" if device.type == "cpu" else "bfloat16"
    activations = precision.activations if precision else "auto"
    kv_cache = precision.kv_cache if precision else "auto"
    options = RunOptions(
        activations=activations, kv_cache_dtype=kv_cache, dtype=dtype, device=str(device), max_memory=max_memory,
        invariant=False, max_num_seqs=32, max_model_len=_longest(prompts, max_tokens),
    )  # fmt: skip
    try:
        llm = load_llm(source, options, alone=True)
    except EnvironmentFault as fault:
        return Unwritten(fault.message)
    try:
        answers = _answers(llm, prompts, max_tokens, stop)
        failed = next((answer for answer in answers if answer.error is not None), None)
        if failed is not None:
            return Unwritten(f"prompt {failed.index}: {failed.error}")
        return Written(tuple(prompts), answers)
    finally:
        del llm
        gc.collect()  # the next model wants the room
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _longest(prompts: Sequence[Prompt], max_tokens: int) -> int:
    return max(len(p.token_ids) + _room(p, max_tokens) for p in prompts) + 1


def _room(prompt: Prompt, max_tokens: int) -> int:
    return max(max_tokens, TOOL_TOKENS) if prompt.tools else max_tokens


def _answers(
    llm: LLM, prompts: Sequence[Prompt], max_tokens: int, stop: Callable[[], None]
) -> tuple[GenerateResult, ...]:
    # A penalty of generation_config.json would make the text another one than that of the likeliest tokens.
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.0, max_tokens=_room(prompt, max_tokens))
        for prompt in prompts
    ]
    found: dict[int, GenerateResult] = {}
    for event in llm.stream([prompt.token_ids for prompt in prompts], params):
        stop()
        if event.result is not None:
            found[event.index] = event.result
    return tuple(found[index] for index in range(len(prompts)))
