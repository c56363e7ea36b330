"""The append-only record of what is done.  A line in it is the commit point of its step.

Each line is a JSON object {"crc": CRC-32 of the body's text, "body": {...}}.  A torn last line is what a crash
leaves and is cut off; a damaged line before others is corruption and stops the run.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from m27quant.checkpoint.durable import fault_point, raise_for_os_error, sync_folder
from m27quant.errors import CheckpointError, EnvironmentFault, escape


class Journal:
    """Steps in the order in which they became durable."""

    def __init__(self, path: Path) -> None:
        """Open or create; reads what is there.

        Raises:
            CheckpointError: damaged before its last line.
            EnvironmentFault: not writable.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            sync_folder(path.parent)
            self.entries, good = _parse(path, path.read_bytes())
            os.ftruncate(self._fd, good)
        except OSError as fault:
            raise_for_os_error(fault, path)

    def append(self, step: str, **fields: Any) -> None:
        """Record a step durably; when this returns, it is done for good."""
        body = {"step": step, **fields}
        text = json.dumps(body, sort_keys=True)
        line = json.dumps({"crc": zlib.crc32(text.encode()), "body": body}, sort_keys=True).encode() + b"\n"
        try:
            fault_point("journal-before")
            half = len(line) // 2
            _write_all(self._fd, line[:half])
            fault_point("journal-torn")
            _write_all(self._fd, line[half:])
            os.fsync(self._fd)
            fault_point("journal-after")
        except OSError as fault:
            raise_for_os_error(fault, self.path)
        self.entries.append(json.loads(text))  # as a resumed run reads it, down to the order of keys

    def find(self, step: str, **fields: Any) -> dict[str, Any] | None:
        """The first entry of `step` whose fields have these values."""
        for entry in self.entries:
            if entry["step"] == step and all(entry.get(k) == v for k, v in fields.items()):
                return entry
        return None

    def all(self, step: str) -> list[dict[str, Any]]:
        """Every entry of `step` in order."""
        return [entry for entry in self.entries if entry["step"] == step]

    def close(self) -> None:
        """Close the file; what was appended is durable already."""
        os.close(self._fd)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """What is in a journal that another process may be writing; nothing where there is none.

    Raises:
        CheckpointError: damaged before its last line.
        EnvironmentFault: not readable.
    """
    try:
        return _parse(path, path.read_bytes())[0]
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise EnvironmentFault(
            f"{escape(path)}: cannot be read ({fault.strerror})", hint="check its permissions"
        ) from None


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Another run's steps, left as they are.

    Raises:
        CheckpointError: damaged before its last line.
        EnvironmentFault: not readable.
    """
    try:
        return _parse(path, path.read_bytes())[0]
    except OSError as fault:
        raise_for_os_error(fault, path)


def _write_all(fd: int, data: bytes) -> None:
    """Write all of `data`: on a nearly full disk the system may take a part and say so only by the count."""
    while data:
        data = data[os.write(fd, data) :]


def _parse(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """(entries, length of the good part)."""
    entries: list[dict[str, Any]] = []
    good = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1]):  # what follows the last newline is torn by definition
        body = _parse_line(line)
        if body is None:
            if number == len(lines) - 2:
                break
            raise CheckpointError(
                f"{escape(path)}: damaged at line {number + 1} of {len(lines) - 1}",
                hint="the run cannot be resumed; start again with --overwrite",
            )
        entries.append(body)
        good += len(line) + 1
    return entries, good


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        body = record["body"]
        if zlib.crc32(json.dumps(body, sort_keys=True).encode()) == record["crc"] and isinstance(
            body["step"], str
        ):
            return dict(body)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
