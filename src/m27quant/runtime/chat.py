"""A conversation to a prompt: the checkpoint's own template, thinking on or off, tools, replies to tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import UsageError, escape

THINK, THINK_END = "<think>", "</think>"
ROLES = ("system", "user", "assistant", "tool")
_EXAMPLE = 'write [{"role": "user", "content": "Hello"}]'


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What the model is given to answer."""

    text: str
    token_ids: list[int]
    thinking: bool
    """The reply starts inside of `<think>`, which the prompt has opened."""


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """Render messages in OpenAI's form for the next turn of the assistant.

    M2's template opens `<think>` at the end of every prompt.  With `thinking` off it is closed again at once,
    unless the template heeds `enable_thinking` by itself.

    Args:
        tokenizer: the checkpoint's.
        messages: `role` and `content` (text, or a list of text parts); of the assistant also `tool_calls`
            (arguments as object or as JSON text) and `reasoning_content`.
        tools: function definitions with a JSON schema of their parameters.
        thinking: whether the model may think before it answers.
        template_arguments: further variables for the template.

    Raises:
        UsageError: messages or tools that are none; a checkpoint without template.
        CheckpointError: the template refuses the messages.
    """
    arguments = {"enable_thinking": thinking, **(template_arguments or {})}
    text = tokenizer.render(
        [_turn(message, index) for index, message in enumerate(_nonempty(messages))],
        [dict(check_tool(tool, index)) for index, tool in enumerate(tools)] if tools else None,
        add_generation_prompt=True,
        **arguments,
    )
    if not thinking and _is_thinking(text):
        text = f"{text.rstrip()}\n\n{THINK_END}\n\n"
    return ChatPrompt(text, tokenizer.rendered(text), _is_thinking(text))


def check_tool(tool: Any, index: int) -> Mapping[str, Any]:
    """The tool, if it is a function with a name.

    Raises:
        UsageError: it is not; the message says which.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(
            f"tool {index} has no function name",
            hint='write {"type": "function", "function": {"name": ..., "parameters": {...}}}',
        )
    checked: Mapping[str, Any] = tool
    return checked


def _is_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK)


def _nonempty(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UsageError("messages must be a list of at least one message", hint=_EXAMPLE)
    return messages


def _turn(message: Any, index: int) -> dict[str, Any]:
    """One message as templates want it: arguments of tool calls as objects, whatever form they came in."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} is {type(message).__name__}, not an object", hint=_EXAMPLE)
    if (role := message.get("role")) not in ROLES:
        raise UsageError(f"{where} has the role {escape(role)}; roles are {', '.join(ROLES)}", hint=_EXAMPLE)
    turn = dict(message)
    calls = turn.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise UsageError(f"{where}: tool_calls is not a list")
        turn["tool_calls"] = [_call(call, f"{where}, tool call {n}") for n, call in enumerate(calls)]
    elif not _is_content(turn.get("content")):
        raise UsageError(f"{where} has no content: neither text nor a list of text parts", hint=_EXAMPLE)
    turn.setdefault("content", "")
    if turn["content"] is None:
        turn["content"] = ""
    return turn


def _is_content(content: Any) -> bool:
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: arguments are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise UsageError(f"{where}: arguments are not an object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
