"""How to generate: the checkpoint's generation_config.json for defaults, a request's own settings above them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from m27quant.checkpoint.sidecars import END_OF_TURN
from m27quant.checkpoint.strict_json import DAMAGED, read_object
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, UsageError, escape

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prescription:
    """What an output has to contain; between the parts the model is free, but nothing that stops (by id) is chosen."""

    choices: tuple[tuple[int, ...], ...]
    """One of these runs of tokens comes; none of them is the beginning of another."""
    after: int | None = None
    """Behind the first token of this id; None: at the very beginning."""
    until: int | None = None
    """Nothing stops before this token, either; None: behind the run all is free."""

    def allowed(self, output: Sequence[int]) -> tuple[frozenset[int], bool]:
        """(the only tokens that may come next, empty where all may; whether one that stops is among these)."""
        begin = 0
        if self.after is not None:
            if self.after not in output:
                return frozenset(), False
            begin = output.index(self.after) + 1
        count = len(output) - begin
        open_ = [run for run in self.choices if len(run) > count and [*run[:count]] == [*output[begin:]]]
        if open_:
            return frozenset(run[count] for run in open_), False
        return frozenset(), self.until is None or self.until in output[begin:]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's settings; None takes generation_config's value, and what that leaves out has no effect."""

    temperature: float | None = None
    """0 is greedy: the likeliest token, always."""
    top_k: int | None = None
    """Only the k likeliest tokens; 0 for all."""
    top_p: float | None = None
    """Of those the fewest whose probabilities reach p; 1 for all."""
    min_p: float | None = None
    """Of those the ones at least this times as likely as the likeliest; 0 for all."""
    repetition_penalty: float | None = None
    """Logits of tokens of prompt and output: divided by it where positive, else multiplied; 1 for none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens of the output."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the token stands in the output."""
    max_tokens: int | None = None
    """The most tokens of the output; None: generation_config's max_new_tokens, else as many as fit."""
    min_tokens: int = 0
    """Before so many tokens nothing that stops (by id) is chosen."""
    stop: tuple[str, ...] | str = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, beside the checkpoint's own."""
    ignore_eos: bool = False
    """The checkpoint's own end tokens do not end the output."""
    seed: int | None = None
    """The output depends on nothing else; None: on the engine's seed and the request's number."""
    logprobs: int | None = None
    """So many likeliest tokens are reported with each token's log probability; None: nothing is."""
    skip_special_tokens: bool = True
    """The text leaves special tokens out."""
    prescribed: Prescription | None = None
    """What the output has to contain."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _number("temperature", self.temperature, 0, math.inf)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        _number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _count("top_k", self.top_k, 0)
        _count("max_tokens", self.max_tokens, 1)
        _count("min_tokens", self.min_tokens, 0)
        _count("logprobs", self.logprobs, 0)
        _count("seed", self.seed, -(2**63), 2**64 - 1)
        for index in self.stop_token_ids:
            _count("stop_token_ids", index, 0)
        _strings("stop", self.stop)

    @property
    def is_greedy(self) -> bool:
        return not self.temperature

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop


def _number(name: str, value: Any, least: float, most: float, *, above: bool = False) -> None:
    if value is None:
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= most or (above and value == least):
        wanted = f"a number {'above' if above else 'from'} {least:g}" if least > -math.inf else "a number"
        wanted += f" to {most:g}" if most < math.inf else ""
        raise UsageError(f"{name} must be {wanted}, got {escape(repr(value))}")


def _count(name: str, value: Any, least: int, most: int = 2**63) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} must be an integer of at least {least}, got {escape(repr(value))}")


def _strings(name: str, values: Any) -> None:
    for text in values:
        if not isinstance(text, str) or not text:
            raise UsageError(f"{name} needs strings that are not empty, got {escape(repr(text))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What generation_config.json says, checked."""

    defaults: SamplingParams
    """No field of it that has an effect is None."""
    eos_token_ids: tuple[int, ...]
    """All of them end an output."""
    notices: tuple[str, ...] = ()

    def complete(self, params: SamplingParams, vocab_size: int) -> SamplingParams:
        """`params` with every None replaced.

        Raises:
            UsageError: token ids that the vocabulary does not have.
        """
        unset = {
            f.name: getattr(self.defaults, f.name) for f in fields(params) if getattr(params, f.name) is None
        }
        for index in params.stop_token_ids:
            _count("stop_token_ids", index, 0)
            if index >= vocab_size:
                raise UsageError(f"stop_token_ids holds {index}, the vocabulary has {vocab_size} tokens")
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise UsageError(f"logprobs is {params.logprobs}, the vocabulary has {vocab_size} tokens")
        return replace(params, **unset)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an output under `params`."""
        return frozenset(params.stop_token_ids + (() if params.ignore_eos else self.eos_token_ids))


def read_generation_config(folder: Path, vocab_size: int, tokenizer: Tokenizer | None) -> GenerationConfig:
    """Read generation_config.json; without an eos in it, the tokenizer's end of turn is taken and a notice given.

    Raises:
        CheckpointError: it is damaged, or a value in it cannot be.
    """
    path = folder / FILE
    raw = read_object(path) if path.is_file() else {}
    try:
        defaults = _defaults(raw)
    except UsageError as fault:
        raise CheckpointError(f"{escape(path)}: {fault.message}", hint=DAMAGED) from None
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{escape(path)}: eos_token_id {escape(index)} is no token of the {vocab_size} of the vocabulary",
                hint=DAMAGED,
            )
    notices = []
    if not ids:
        found = tokenizer.token_id(END_OF_TURN) if tokenizer else None
        ids = [] if found is None else [found]
        what = f"{END_OF_TURN} ({found}) is taken" if ids else "nothing but max_tokens ends an output"
        notices.append(f"{FILE} names no eos_token_id: {what}")
    return GenerationConfig(defaults=defaults, eos_token_ids=tuple(ids), notices=tuple(notices))


def _defaults(raw: Mapping[str, Any]) -> SamplingParams:
    def value(name: str, neutral: float) -> Any:
        found = raw.get(name)
        return neutral if found is None else found

    sampled = raw.get("do_sample", raw.get("temperature") is not None)
    return SamplingParams(
        temperature=value("temperature", 1.0) if sampled else 0.0,
        top_k=value("top_k", 0),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        max_tokens=raw.get("max_new_tokens"),
    )


def derived_seed(seed: int, number: int) -> int:
    """A request's seed where it has none: from the engine's and the request's number."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
