"""What the model writes, read as it comes: thoughts, text and tool calls.

The format (MiniMax-M2; the prompt usually has opened `<think>` already):

    thoughts
    </think>

    text
    <minimax:tool_call>
    <invoke name="function">
    <parameter name="key">value</parameter>
    </invoke>
    </minimax:tool_call>

Nothing is lost: what is malformed is handed out as a `Problem` that holds the text.  However the text is cut into
pieces on its way in, the reply is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from m27quant.runtime.chat import THINK, THINK_END
from m27quant.runtime.tool_values import parameter_schemas, read_value

CALLS, CALLS_END = "<minimax:tool_call>", "</minimax:tool_call>"
INVOKE_END = "</invoke>"


class Delta(NamedTuple):
    """More of the thoughts or of the text."""

    kind: Literal["thinking", "content"]
    text: str


class ToolCall(NamedTuple):
    """One whole call; the values have the types that the tool's schema asks for."""

    name: str
    arguments: dict[str, Any]


class Problem(NamedTuple):
    """Something that is not as the format says, and the text concerned."""

    message: str
    text: str = ""


Event = Delta | ToolCall | Problem
_State = Literal["thinking", "content", "calls"]


@dataclass(slots=True)
class Reply:
    """All that was read."""

    thinking: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class ReplyParser:
    """Feed it text as it is generated, then `finish()`; each returns what has become certain."""

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None = None, *, thinking: bool = True, calls: bool = True
    ) -> None:
        """Begin a reply.

        Args:
            tools: for names and types, as in the prompt.
            thinking: the prompt has opened `<think>`.
            calls: whether a tool call is one; else its text is text as any other.
        """
        self.reply = Reply()
        self._markers = (THINK_END, CALLS) if calls else (THINK_END,)
        self._schemas = None if tools is None else parameter_schemas(tools)
        self._state: _State = "thinking" if thinking else "content"
        self._buffer = ""
        self._space = ""
        """Blank space that is part of the text only if more text follows."""

    def feed(self, text: str) -> list[Event]:
        """Take more text."""
        self._buffer += text
        return self._collect(final=False)

    def finish(self) -> list[Event]:
        """The end of the reply: what was held back, and what was left open."""
        events = self._collect(final=True)
        if self._state == "thinking":
            events.append(self._keep(Problem("the thoughts were not closed")))
        return events

    def _collect(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        step = {"thinking": self._thinking, "content": self._content, "calls": self._calls}
        while step[self._state](events, final):
            pass
        return events

    # Each takes what it can from the buffer and says whether another state goes on.

    def _thinking(self, events: list[Event], final: bool) -> bool:
        if not self.reply.thinking:  # some models open their thoughts again
            opens = self._opens(final)
            if opens is not False:
                return bool(opens)
        marker = self._emit_until("thinking", self._markers, events, final)
        if marker == CALLS:
            events.append(self._keep(Problem("a tool call inside of the thoughts, which it ends")))
        if marker:
            self._state = "content" if marker == THINK_END else "calls"
        return marker is not None

    def _content(self, events: list[Event], final: bool) -> bool:
        if not self.reply.content:
            opens = self._opens(final)
            if opens:
                self._state = "thinking"
            if opens is not False:
                return bool(opens)
        marker = self._emit_until("content", self._markers, events, final)
        if marker == THINK_END:
            events.append(self._keep(Problem(f"{THINK_END} without thoughts before it", THINK_END)))
        if marker == CALLS:
            self._state = "calls"
        return marker is not None

    def _opens(self, final: bool) -> bool | None:
        """Whether what is left begins with `<think>`, which is then taken away; None while it is not known."""
        self._buffer = self._buffer.lstrip()
        if self._buffer.startswith(THINK):
            self._buffer = self._buffer.removeprefix(THINK)
            return True
        return None if not final and THINK.startswith(self._buffer) else False

    def _calls(self, events: list[Event], final: bool) -> bool:
        """Invocations one by one, each as soon as it is whole."""
        invoke = self._buffer.find(INVOKE_END)
        close = self._buffer.find(CALLS_END)
        if invoke >= 0 and not 0 <= close < invoke:
            body, self._buffer = self._cut(invoke, INVOKE_END)
            events.extend(self._keep(event) for event in self._invocation(body))
            return True
        if close >= 0:
            rest, self._buffer = self._cut(close, CALLS_END)
            if rest.strip():
                events.append(self._keep(Problem("in a tool call block, but no whole call", rest.strip())))
            self._state = "content"
            return True
        if final:
            events.append(self._keep(Problem("the tool call block was not closed", self._buffer.strip())))
            self._buffer = ""
        return False

    def _emit_until(
        self, kind: Literal["thinking", "content"], markers: Sequence[str], events: list[Event], final: bool
    ) -> str | None:
        """Hand out text up to the first marker, which is taken away and returned."""
        found = [(at, marker) for marker in markers if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            text, self._buffer = self._cut(at, marker)
        else:
            marker = None
            keep = 0 if final else _unfinished(self._buffer, markers)
            cut = len(self._buffer) - keep
            text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        text = self._space + text
        if not getattr(self.reply, kind):
            text = text.lstrip()
        body = text.rstrip()
        self._space = "" if marker or final else text[len(body) :]
        if body:
            events.append(self._keep(Delta(kind, body)))
        return marker

    def _cut(self, at: int, marker: str) -> tuple[str, str]:
        return self._buffer[:at], self._buffer[at + len(marker) :]

    def _invocation(self, body: str) -> list[Event]:
        """`<invoke name="f"> parameters`, without its end."""
        start = _INVOKE.search(body)
        if start is None:
            return [Problem("an invocation without a name", body.strip())]
        events: list[Event] = []
        if before := body[: start.start()].strip():
            events.append(Problem("text between tool calls", before))
        name = start["name"]
        schema: Mapping[str, Any] = {}
        if self._schemas is not None:
            if name not in self._schemas:
                events.append(Problem(f"a call of '{name}', which is not among the tools", name))
            schema = self._schemas.get(name, {})
        arguments, rest = {}, body[start.end() :]
        for match in _PARAMETER.finditer(rest):
            key, text = match["name"], match["value"].removeprefix("\n").removesuffix("\n")
            if key in arguments:
                events.append(Problem(f"parameter '{key}' twice; the last counts", text))
            arguments[key], fits = read_value(text, schema.get(key))
            if not fits:
                events.append(
                    Problem(f"parameter '{key}' of '{name}' is not of the type in its schema", text)
                )
        if left := _PARAMETER.sub("", rest).strip():
            events.append(Problem(f"not a whole parameter in a call of '{name}'", left))
        return [*events, ToolCall(name, arguments)]

    def _keep(self, event: Event) -> Event:
        reply = self.reply
        if isinstance(event, ToolCall):
            reply.tool_calls.append(event)
        elif isinstance(event, Problem):
            reply.problems.append(event)
        elif event.kind == "thinking":
            reply.thinking += event.text
        else:
            reply.content += event.text
        return event


# Quotes are optional and of either kind: models vary.
_NAME = r"""\s+name\s*=\s*(?P<q>["']?)(?P<name>[^"'<>\n]+?)(?P=q)\s*>"""
_INVOKE = re.compile(r"<invoke" + _NAME)
_PARAMETER = re.compile(r"<parameter" + _NAME + r"(?P<value>.*?)</parameter>", re.DOTALL)


def _unfinished(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0
