"""Where everything that a command says goes: data to stdout, all else to stderr.

Three modes.  *human*: text and tables.  *json*: stdout holds one document with `schema_version`; every line
of stderr is one JSON object too, with one of the keys `warning`, `hint`, `progress`, `error`.  *quiet*:
stdout holds the bare values, stderr only errors.  Whatever comes from a file is printed literally: never as
markup, its control characters as escapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from m27quant.errors import M27Error

SCHEMA_VERSION = 1
"""Of every JSON document; grows when a key changes its meaning or goes away, not when one is added."""

UNBOUNDED_WIDTH = 10_000
"""Columns of a table that no terminal shows: it takes its natural width, one line per row."""


class Mode(enum.StrEnum):
    """How a command speaks."""

    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """The sink of one command."""

    def __init__(
        self,
        mode: Mode = Mode.HUMAN,
        *,
        silent: bool = False,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        """`silent` drops warnings, hints and progress; errors are always said."""
        self.mode = mode
        self.silent = silent or mode is Mode.QUIET
        self.stdout = stdout or sys.stdout
        self.stderr: IO[str] = cast(IO[str], _BestEffort(stderr or sys.stderr))
        self.console = _console(self.stdout)
        self.notes = _console(self.stderr)

    @classmethod
    def open(cls, *, json: bool = False, quiet: bool = False, verbose: int = 0) -> Output:
        """The sink that a command's flags ask for; the package's log messages go to it too."""
        output = cls(Mode.JSON if json else Mode.QUIET if quiet else Mode.HUMAN, silent=quiet)
        logger = logging.getLogger("m27quant")
        logger.handlers = [_LogHandler(output)]
        logger.propagate = False
        logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
        return output

    @property
    def width(self) -> int | None:
        """Columns of the terminal that shows the result; None where it is none, and lines may be of any length."""
        return self.console.width if self.stdout.isatty() else None

    # Data: stdout.

    def result(
        self, document: Mapping[str, Any], *, human: RenderableType | None = None, quiet: object = None
    ) -> None:
        """The result of the command: `document` as JSON, `human` for people, `quiet` as its bare value."""
        if self.mode is Mode.JSON:
            self._write(_dumps({"schema_version": SCHEMA_VERSION, **document}, indent=2))
        elif self.mode is Mode.QUIET:
            if quiet is not None:
                self._write(clean(quiet))
        else:
            self._show(human if human is not None else pairs(document))

    def table(
        self, rows: Sequence[Mapping[str, Any]], *, columns: Mapping[str, str], key: str = "rows"
    ) -> None:
        """A list: `columns` maps the rows' keys to headings; quiet mode writes the first column alone."""
        if self.mode is Mode.JSON:
            self._write(_dumps({"schema_version": SCHEMA_VERSION, key: list(rows)}, indent=2))
        elif self.mode is Mode.QUIET:
            first = next(iter(columns))
            for row in rows:
                self._write(clean(row[first]))
        else:
            self._show(grid(columns.values(), ([row[name] for name in columns] for row in rows)))

    # Notes: stderr.

    def status(self, message: str) -> None:
        """What is being done, for a person who watches."""
        if self.mode is Mode.HUMAN and not self.silent:
            self._note(Text(clean(message)))

    def aside(self, renderable: RenderableType) -> None:
        """A table that accompanies the data, for a person who asked for it."""
        if self.mode is Mode.HUMAN and not self.silent:
            with self.notes.capture() as captured:
                self.notes.print(renderable)
            lines = captured.get().rstrip("\n").split("\n")
            self.stderr.write("\n".join(line.rstrip() for line in lines) + "\n")
            self.stderr.flush()

    def warning(self, message: str, *, hint: str | None = None) -> None:
        """Something the user can act on, though the command goes on."""
        if self.silent:
            return
        if self.mode is Mode.JSON:
            self._note_json({"warning": {"message": message, "hint": hint}})
        else:
            self._note(_labelled("warning", message, "yellow"))
            if hint:
                self.hint(hint)

    def hint(self, message: str) -> None:
        """The next step."""
        if self.silent:
            return
        if self.mode is Mode.JSON:
            self._note_json({"hint": message})
        else:
            self._note(_labelled("hint", message, "cyan"))

    def error(self, error: M27Error, *, kind: str | None = None, traceback: str | None = None) -> None:
        """Why the command ends, in every mode; the caller exits with the error's code."""
        kind = kind or kind_of(error)
        if self.mode is Mode.JSON:
            document = {
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
                "kind": kind,
            }
            if traceback is not None:
                document["traceback"] = traceback
            self._note_json({"error": document})
            return
        if traceback is not None:
            self._note(Text(clean(traceback.rstrip())))
        self._note(_labelled("interrupted" if kind == "interrupted" else "error", error.message, "bold red"))
        if error.hint:
            self._note(Text("\n").append_text(_labelled("hint", error.hint, "cyan")))

    def heartbeat(self, line: str, document: Mapping[str, Any]) -> None:
        """One sign of life of a long run off a terminal."""
        if self.silent:
            return
        if self.mode is Mode.JSON:
            self._note_json({"progress": document})
        else:
            self._note(Text(clean(line)))

    def _show(self, renderable: RenderableType) -> None:
        if isinstance(renderable, str):
            renderable = Text(clean(renderable))
        with self.console.capture() as captured:
            self.console.print(renderable, soft_wrap=isinstance(renderable, Text))
        lines = captured.get().rstrip("\n").split("\n")
        self._write("\n".join(line.rstrip() for line in lines))  # Rich pads cells and lines to full width.

    def _write(self, text: str) -> None:
        self.stdout.write(text + "\n")
        self.stdout.flush()

    def _note(self, text: Text) -> None:
        self.notes.print(text, soft_wrap=True)

    def _note_json(self, document: Mapping[str, Any]) -> None:
        self.stderr.write(_dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")
        self.stderr.flush()


class _BestEffort:
    """A stream that swallows its faults: a terminal that went away must not stop the work behind it.

    Nor must a signal handler that speaks while its own thread is writing, which Python answers by RuntimeError, nor a
    thread that speaks after the stream was closed, which it answers by ValueError.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LogHandler(logging.Handler):
    """Log messages of the package's rooms: warnings as warnings, the rest (with -v) as status lines."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.output.warning(record.getMessage())
        else:
            self.output.status(record.getMessage())


def clean(value: object) -> str:
    """Text with its control, bidirectional and other invisible characters as escapes; newlines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


def grid(headings: Iterable[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """A plain table of literal cells; numbers stand to the right, long names fold instead of being cut."""
    cells = [list(row) for row in rows]
    table = Table(
        title=title and Text(clean(title), style="bold"), box=None, pad_edge=False, title_justify="left"
    )
    for index, heading in enumerate(headings):
        column = [row[index] for row in cells if row[index] is not None]
        numeric = bool(column) and all(isinstance(cell, int | float) for cell in column)
        table.add_column(Text(clean(heading)), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    return table


def pairs(document: Mapping[str, Any]) -> Table:
    """A mapping as two columns: the name, the value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold", style="bold")
    table.add_column(overflow="fold")
    for name, value in document.items():
        table.add_row(Text(clean(name)), Text(_cell(value)))
    return table


def kind_of(error: M27Error) -> str:
    """The error's class as one stable lower-case word: `checkpoint`, `recipe`, `environment`, ..."""
    if type(error) is M27Error:
        return "bug"
    return re.sub(r"(Error|Fault)$", "", type(error).__name__).lower()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return clean(value)


def _labelled(label: str, message: str, style: str) -> Text:
    return Text.assemble((f"{label}: ", style), clean(message))


def _console(stream: IO[str]) -> Console:
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    if not stream.isatty():
        console.width = UNBOUNDED_WIDTH
    return console


def _dumps(document: Mapping[str, Any], indent: int | None = None) -> str:
    """ASCII JSON without NaN: a figure that is not finite is null."""
    return json.dumps(_plain(document), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return value
