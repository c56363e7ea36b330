"""What `run` is asked: a conversation from files and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m27quant.errors import CheckpointError, UsageError, escape

MAX_FILE_BYTES = 2**28


class Conversation:
    """What makes prompts of messages."""

    def __init__(
        self,
        turns: list[dict[str, Any]] | None,
        tools: list[dict[str, Any]] | None,
        *,
        is_chat: bool,
        system_prompt: str | None,
        thinking: bool,
    ) -> None:
        self.tools, self.is_chat, self.thinking = tools, is_chat, thinking
        self.system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.turns = turns

    def with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns behind the system prompt, if there is one."""
        return [*self.system, *turns]


def read_conversation(
    path: Path | None,
    tools: Path | None,
    chat: bool,
    system_prompt: str | None,
    thinking: bool,
    prompt: str | None,
) -> Conversation:
    """Read the files that the options name.

    Raises:
        CheckpointError: a file that is unreadable or holds something else.
        UsageError: options that do not go together.
    """
    turns: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    if path is not None:
        turns, functions = _read_messages(path)
    if tools is not None:
        functions = _read_list(tools, "tools")
    is_chat = chat or path is not None or system_prompt is not None or functions is not None
    if turns and system_prompt is not None and turns[0].get("role") == "system":
        raise UsageError("the messages have a system prompt already", hint="leave --system-prompt out")
    if not is_chat and prompt is not None and not thinking:
        raise UsageError("--no-thinking is for a chat", hint="add --chat")
    return Conversation(turns, functions, is_chat=is_chat, system_prompt=system_prompt, thinking=thinking)


def _read_messages(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    found = _read(path)
    turns: Any = found.get("messages") if isinstance(found, dict) else found
    tools: Any = found.get("tools") if isinstance(found, dict) else None
    for name, value in (("messages", turns), ("tools", tools)):
        if not (value is None and name == "tools") and not _is_objects(value):
            raise CheckpointError(
                f"{escape(path)}: {name} is not a list of objects",
                hint='write [{"role": "user", "content": "Hello"}]',
            )
    return turns, tools


def _read_list(path: Path, name: str) -> list[dict[str, Any]]:
    found = _read(path)
    if not _is_objects(found):
        raise CheckpointError(f"{escape(path)}: {name} is not a list of objects")
    objects: list[dict[str, Any]] = found
    return objects


def _read(path: Path) -> Any:
    from m27quant.checkpoint.strict_json import parse, read_bytes

    return parse(read_bytes(path, MAX_FILE_BYTES), escape(path))


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
