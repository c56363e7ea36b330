"""The error tree: every fault a user can meet, with the exit code it ends in.

A message says what is wrong and where; the hint says what to do next.  Whatever is not an
`M27Error` is a bug of ours and ends in exit code 70.
"""

from __future__ import annotations

import signal


class M27Error(Exception):
    """Base of all expected faults; `hint` is one line that says what to do next."""

    exit_code = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class FindingsError(M27Error):
    """The command worked and found problems."""

    exit_code = 1


class CalibrationError(FindingsError):
    """Calibration ran but its result cannot be trusted (too many non-finite rows, for instance)."""


class TrainingError(FindingsError):
    """Training ran but its loss or gradient is no longer a number."""


class UsageError(M27Error):
    """Bad arguments or a bad combination of them."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, or that asks for what does not exist."""


class CheckpointError(M27Error):
    """An input that is unreadable, corrupt or not supported."""

    exit_code = 3


class EnvironmentFault(M27Error):
    """Disk, memory, device, permission or network: right input, wrong surroundings."""

    exit_code = 4


class OutputError(M27Error):
    """The output folder is locked by another run or holds somebody else's files."""

    exit_code = 5


class Interrupted(M27Error):
    """Stopped by a signal; what is done is durable and the run can be resumed."""

    def __init__(self, message: str, *, signum: int = signal.SIGINT, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum


def escape(text: object, limit: int = 200) -> str:
    """Render hostile text (tensor names, file names, strings of a checkpoint) as one safe line.

    Control characters, bidirectional marks and other unprintable characters appear as escapes;
    text longer than `limit` characters is cut in the middle.
    """
    try:
        raw = str(text)
    except RecursionError:  # lists within lists, as deep as the JSON parser allows
        raw = f"a deeply nested {type(text).__name__}"
    if len(raw) > limit:
        raw = f"{raw[: limit // 2]}...{raw[-limit // 2 :]}"
    if raw.isprintable():  # nearly always, and headers have 191,211 names
        return raw
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw)
