"""How much memory of this machine there is to use."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

CONTROL_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def default_budget() -> int:
    """80% of the memory that is free now, or that the control group allows in all where that is less."""
    room = psutil.virtual_memory().available + rss_bytes()
    return int(min([room, *control_group_limits()]) * 0.8)


def control_group_limits() -> list[int]:
    """Bytes that the control group of a container (version 2, 1) allows; empty without one."""
    limits = []
    for file in CONTROL_GROUP_LIMITS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit; nor is version 1's enormous number, which any minimum ignores
            limits.append(int(text))
    return limits


def give_back_freed() -> None:
    """Return what was freed to the system, where the C library would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
