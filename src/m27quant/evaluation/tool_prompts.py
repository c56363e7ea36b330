"""Chats whose replies must call a tool: three tools, eight questions that each ask for one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m27quant.runtime.reply import Reply, ReplyParser


def _tool(name: str, description: str, required: Sequence[str], **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": [*required]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = (
    _tool("get_weather", "The weather forecast of a city.", ["city"], city="string", days="integer"),
    _tool("search", "Search the web.", ["query"], query="string", max_results="integer"),
    _tool(
        "read_file",
        "Lines of a text file.",
        ["path"],
        path="string",
        first_line="integer",
        last_line="integer",
    ),
)
ASKED = (
    "What will the weather be in Paris for the next 3 days?",
    "Will I need an umbrella in Nairobi tomorrow?",
    "Compare today's temperature in Oslo with that in Lima.",
    "Search the web for the release date of Python 3.14.",
    "Find five articles about the history of the metric system.",
    "Who won the last chess world championship? Look it up.",
    "Show me lines 10 to 25 of src/main.py.",
    "What does the file README.md say?",
)


def is_valid_call(text: str, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> bool:
    """Whether a reply holds one or more calls, all whole, of tools that there are, with what these require.

    Args:
        text: the reply, special tokens left out.
        tools: function definitions in OpenAI's form.
        thinking: the prompt has opened `<think>`.
    """
    parser = ReplyParser(tools, thinking=thinking)
    parser.feed(text)
    parser.finish()
    return bool(parser.reply.tool_calls) and not parser.reply.problems and _is_complete(parser.reply, tools)


def _is_complete(reply: Reply, tools: Sequence[Mapping[str, Any]]) -> bool:
    required = {t["function"]["name"]: t["function"]["parameters"].get("required", []) for t in tools}
    return all(set(required[call.name]) <= set(call.arguments) for call in reply.tool_calls)
