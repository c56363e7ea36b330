"""The compiled CPU core, found and loaded once; a machine without it runs the reference and says why."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent / "_native"


class Library(NamedTuple):
    """The loaded core, or the reason why there is none."""

    handle: ctypes.CDLL | None
    isa: str
    error: str | None


@cache
def load() -> Library:
    """Load the compiled core."""
    return Library(None, "", "the compiled core was not built (no C compiler at install time)")
