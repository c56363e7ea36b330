"""Prompts from a JSON-lines file, answers to another one in the same order, resumable.

While the work goes on each answer is durable in `OUTPUT.partial`, in the order in which they were finished.
OUTPUT itself appears at the end, whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from m27quant.checkpoint.durable import write_durably
from m27quant.checkpoint.journal import Journal
from m27quant.checkpoint.strict_json import parse, read_bytes
from m27quant.errors import CheckpointError, OutputError, UsageError, escape

MAX_INPUT_BYTES = 2**30
FORMS = ("prompt", "messages")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One line of the input: exactly one of `prompt` and `messages` is set."""

    where: str
    """File and line, for messages to the user."""
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None


def read_prompts(path: Path) -> list[PromptRow]:
    """All rows of a JSON-lines file; blank lines do not count.

    Raises:
        CheckpointError: a line that is not JSON, or neither `{"prompt": text}` nor `{"messages": [...]}`.
        UsageError: no row at all.
    """
    rows = []
    for number, line in enumerate(read_bytes(path, MAX_INPUT_BYTES).split(b"\n"), start=1):
        if line.strip():
            rows.append(_prompt_row(line, f"{escape(path)}, line {number}"))
    if not rows:
        raise UsageError(f"{escape(path)} holds no prompts", hint='write a line {"prompt": "..."} for each')
    return rows


def _prompt_row(line: bytes, where: str) -> PromptRow:
    row = parse(line, where)
    hint = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    if not isinstance(row, dict):
        raise CheckpointError(f"{where}: a row must be an object, found {type(row).__name__}", hint=hint)
    given = [form for form in FORMS if row.get(form) is not None]
    if len(given) != 1:
        raise CheckpointError(f"{where}: has {' and '.join(given) or 'no prompt'}; one is needed", hint=hint)
    wanted = {"prompt": str, "messages": list, "tools": list}
    for key, kind in wanted.items():
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise CheckpointError(f"{where}: `{key}` is {type(row[key]).__name__}", hint=hint)
    return PromptRow(where, row.get("prompt"), row.get("messages"), row.get("tools"))


class AnswerFile:
    """The answers to the rows of one input, each durable once `add` returns."""

    def __init__(
        self,
        output: Path,
        source: Path,
        settings: Mapping[str, Any],
        num_rows: int,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Begin, or go on where a former run with the same input and settings stopped.

        Args:
            output: the file to make; its folder exists.
            source: the input file.
            settings: whatever changes the answers (JSON values).
            num_rows: rows in the input.
            resume: go on if there is something to go on with.
            overwrite: drop what is there.

        Raises:
            OutputError: something is there and neither flag was given, or another run is writing.
            UsageError: `resume` with another input or other settings.
            CheckpointError: the partial file is damaged.
        """
        self.output, self._num_rows = output, num_rows
        self._partial = output.with_name(output.name + ".partial")
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if output.resolve() == source.resolve():
            raise UsageError(f"{escape(output)} is the input", hint="name another file for the answers")
        if not output.parent.is_dir():
            raise OutputError(f"{escape(output.parent)}: no such folder", hint="make it first")
        self._lock = _lock(output)
        try:
            self._refuse_or_clear(resume=resume, overwrite=overwrite)
            self.was_complete = output.exists()
            if not self.was_complete:
                self._journal = self._open(source, settings)
        except BaseException:
            self._lock.release()
            raise

    def _refuse_or_clear(self, *, resume: bool, overwrite: bool) -> None:
        there = self._partial if self._partial.exists() else self.output
        if not there.exists() or resume:
            return
        if not overwrite:
            kind = "an unfinished run" if there == self._partial else "a file"
            raise OutputError(
                f"{escape(there)}: {kind} is there already",
                hint="pass --resume to go on, or --overwrite to start again",
            )
        self._partial.unlink(missing_ok=True)
        self.output.unlink(missing_ok=True)

    def _open(self, source: Path, settings: Mapping[str, Any]) -> Journal:
        identity = {
            "input_sha256": hashlib.sha256(read_bytes(source, MAX_INPUT_BYTES)).hexdigest(),
            "settings": json.loads(json.dumps(settings)),
            "rows": self._num_rows,
        }
        journal = Journal(self._partial)
        begun = journal.find("begin")
        if begun is None:
            journal.append("begin", **identity)
        elif changed := [key for key, value in identity.items() if begun.get(key) != value]:
            journal.close()
            raise UsageError(
                f"{escape(self._partial)} belongs to another run: {_difference(begun, identity, changed)}",
                hint="repeat the former command with --resume, or pass --overwrite",
            )
        return journal

    def missing(self) -> list[int]:
        """Rows without an answer yet, ascending."""
        if self.was_complete:
            return []
        done = {entry["row"] for entry in self._journal.all("answer")}
        return [row for row in range(self._num_rows) if row not in done]

    def add(self, row: int, answer: Mapping[str, Any]) -> None:
        """Make the answer to a row durable."""
        self._journal.append("answer", row=row, answer=dict(answer))

    def finish(self) -> None:
        """Write OUTPUT: one line per row, in the order of the input."""
        if self.was_complete:
            return
        answers = {entry["row"]: entry["answer"] for entry in self._journal.all("answer")}
        lines = [json.dumps(answers[row], ensure_ascii=False) for row in range(self._num_rows)]
        # half a surrogate pair, which no UTF-8 holds, becomes a question mark
        write_durably(self.output, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.was_complete:
            self._journal.close()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def _lock(output: Path) -> FileLock:
    try:
        lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{escape(output)}: another run is writing it", hint="wait for it, or stop it first"
        ) from None
    except OSError as fault:
        raise OutputError(
            f"{escape(output)}: cannot be written ({fault.strerror})", hint="choose an existing folder"
        ) from None
    return lock


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any], changed: list[str]) -> str:
    if "input_sha256" in changed:
        return "the input file has changed"
    if "settings" not in changed:
        return "its rows differ"
    before, after = begun.get("settings"), now["settings"]
    if not isinstance(before, dict):
        return "its settings differ"
    keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    return ", ".join(f"{k} was {escape(before.get(k))}, now {escape(after.get(k))}" for k in keys)
