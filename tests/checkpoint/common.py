"""A fault as a value, and what every fault must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from m27quant.errors import M27Error

T = TypeVar("T")


def outcome(call: Callable[[], T]) -> T | M27Error:
    """What `call` returns, or the error of ours that it raises; any other error is a failure."""
    try:
        return call()
    except M27Error as fault:
        return fault


def check_fault(fault: M27Error) -> None:
    """One printable line of bounded length, and a next step."""
    assert fault.message.isprintable()
    assert len(fault.message) < 2000
    assert fault.hint
    assert fault.exit_code != 70
