"""An answer on its way to the screen: thoughts dimmed, accepted drafts coloured if asked for, tool calls at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.style import Style

from m27quant.cli.output import Mode, Output, clean

if TYPE_CHECKING:
    from m27quant.runtime.reply import Event

THOUGHT, DRAFTED, CALL = Style(dim=True), Style(color="green"), Style(color="cyan")


class AnswerView:
    """Shows pieces of one answer as they come; only on a terminal, everywhere else the answer comes whole."""

    def __init__(self, output: Output, *, show_drafts: bool = False) -> None:
        self._output, self._drafts = output, show_drafts
        self.is_live = output.mode is Mode.HUMAN and output.stdout.isatty()
        self._ends_line = True
        self._kind = ""

    def text(self, text: str, *, drafted: bool = False) -> None:
        """More of a plain answer."""
        self._write(text, DRAFTED if drafted and self._drafts else None)

    def event(self, event: Event, *, drafted: bool = False) -> None:
        """More of a chat's answer."""
        from m27quant.runtime.reply import Delta, Problem, ToolCall

        if isinstance(event, Delta):
            if self._kind and event.kind != self._kind:
                self._write("\n\n", None)
            self._kind = event.kind
            style = THOUGHT if event.kind == "thinking" else DRAFTED if drafted and self._drafts else None
            self._write(event.text, style)
        elif isinstance(event, ToolCall):
            arguments = json.dumps(event.arguments, ensure_ascii=False)
            self._break()
            self._write(f"{event.name}({arguments})\n", CALL)
        elif isinstance(event, Problem):
            self._break()
            self._output.warning(event.message)

    def end(self) -> None:
        """The answer is complete, or was stopped."""
        self._break()

    def _break(self) -> None:
        if not self._ends_line:
            self._write("\n", None)

    def _write(self, text: str, style: Style | None) -> None:
        if not self.is_live or not text:
            return
        self._ends_line = text.endswith("\n")
        colours = self._output.console.color_system is not None and not self._output.console.no_color
        shown = printable(text)
        self._output.stdout.write(style.render(shown) if style and colours else shown)
        self._output.stdout.flush()


def printable(text: str) -> str:
    """What a model wrote, safe for a terminal: tabs and newlines stay, other control characters are escapes."""
    return "\t".join(clean(part) for part in text.split("\t"))


def drafted_parts(text: str, own: str, num_accepted: int) -> Sequence[tuple[str, bool]]:
    """A step's text in two: what was drafted, and `own`, the target's token behind it."""
    if not num_accepted:
        return [(text, False)]
    cut = len(text) - len(own) if own and text.endswith(own) else len(text)
    return [(text[:cut], True), (text[cut:], False)]
