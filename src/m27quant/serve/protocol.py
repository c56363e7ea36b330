"""Requests of OpenAI's interface, checked to the letter: whatever else comes in gets a 400 that names it.

Beside OpenAI's own fields stand those of vLLM and SGLang that the runtime has: top_k, min_p, repetition_penalty,
min_tokens, stop_token_ids, ignore_eos, skip_special_tokens, return_token_ids, chat_template_kwargs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m27quant.checkpoint.strict_json import parse as parse_json
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.runtime.generation import SamplingParams
from m27quant.serve.errors import invalid

MAX_STOPS = 16
MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""Of a completion that says nothing of it, as in OpenAI's interface; null is as many as fit."""
LACKING = {
    "response_format": "only text: nothing here holds the model to JSON or a schema",
    "logit_bias": "the runtime has none: leave it out",
    "suffix": "the model fills nothing in: leave it out",
}
"""What OpenAI's interface has, and this one refuses."""
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[Count], Field(fail_fast=True)]


class Strict(BaseModel):
    """No conversions, no NaN, no field that has no meaning."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    """A last chunk with token counts."""
    continuous_usage_stats: bool | None = None
    """Token counts so far with every chunk."""


class Settings(Strict):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Only empty: the runtime has none."""
    # What other services do with these has no counterpart here, and no answer depends on them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report at each position; None: nothing is reported."""
        raise NotImplementedError

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens of one answer, as asked for."""
        return self.max_tokens

    def sampling(self, index: int, most: int | None) -> SamplingParams:
        """The runtime's settings of choice `index`, whose answer has at most `most` tokens where nothing is said.

        Raises:
            ApiError: a combination that cannot be.
        """
        seed = None if self.seed is None else self.seed if not index else (self.seed + index) % 2**64
        stop: tuple[str, ...] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingParams(
                temperature=self.temperature, top_k=0 if self.top_k == -1 else self.top_k, top_p=self.top_p,
                min_p=self.min_p, repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
                max_tokens=self._most_tokens(most), min_tokens=self.min_tokens or 0, stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()), ignore_eos=bool(self.ignore_eos), seed=seed,
                logprobs=self.num_logprobs, skip_special_tokens=self.skip_special_tokens is not False,
            )  # fmt: skip
        except UsageError as fault:
            raise invalid(fault.message, param=fault.message.split()[0]) from None

    def _most_tokens(self, most: int | None) -> int | None:
        return self.wanted_tokens or most


class CompletionRequest(Settings):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(fail_fast=True, min_length=1, max_length=1024),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Only equal to n."""
    suffix: Annotated[str, Field(max_length=0)] | None = None
    """Only empty: the model fills nothing in."""

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def _most_tokens(self, most: int | None) -> int | None:
        if "max_tokens" not in self.model_fields_set:
            return COMPLETION_TOKENS if most is None else min(COMPLETION_TOKENS, most)
        return super()._most_tokens(most)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class TextPart(BaseModel):
    """Text in a list; what else other models take (images, audio) this one does not."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A function and its arguments, as JSON text or as an object."""

    model_config = ConfigDict(strict=True, extra="ignore")
    name: str
    arguments: str | dict[str, Any] = ""


class Call(BaseModel):
    """A call that the assistant has made."""

    model_config = ConfigDict(strict=True, extra="ignore")
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(BaseModel):
    """One turn.  Answers come back as they were given, so fields without a meaning here are let through."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Call] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(Strict):
    """What the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function in OpenAI's wrapping."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """Which function."""

    name: ToolName


class NamedChoice(Strict):
    """The answer has to be a call of this function."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """The one format there is: nothing forces the model into another."""

    type: Literal["text"]


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """none: as enable_thinking off; the others change nothing."""
    include_reasoning: bool | None = None
    """Off: the thoughts are left out of the answer."""
    response_format: TextFormat | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Request = TypeVar("Request", bound=Settings)


def parse(kind: type[Request], body: bytes) -> tuple[Request, dict[str, Any]]:
    """The request, and the JSON object that it was.

    Raises:
        ApiError: 400, with the place of the first fault.
    """
    try:
        raw = parse_json(body, "the body")
        if not isinstance(raw, dict):
            raise invalid(f"the body must be a JSON object, not {_json_name(raw)}")
        return kind.model_validate(raw), raw
    except CheckpointError as fault:
        raise invalid(fault.message) from None
    except ValidationError as fault:
        raise _invalid(fault) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def _invalid(fault: ValidationError) -> Exception:
    """The first thing that is wrong.

    Of a union's branches the one that got furthest is the one that was meant, and rather one of the right type.
    """
    errors = fault.errors(include_url=False, include_input=False, include_context=False)
    top = errors[0]["loc"][:1]
    first = max(
        (e for e in errors if e["loc"][:1] == top),
        key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")),
    )
    place = escape(".".join(str(part) for part in first["loc"] if _is_place(part)))
    if first["type"] == "extra_forbidden":
        return invalid(f"unrecognized request argument: {place}", param=place, code="unknown_parameter")
    text = LACKING.get(str(top[0]) if top else "") or first["msg"].replace(" after validation", "")
    return invalid(f"{place}: {text[:1].lower()}{text[1:]}" if place else text, param=place or None)


def _is_place(part: int | str) -> bool:
    """Whether it stands in the request: pydantic also names the branch of a union."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float", "bool"))


def _json_name(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
