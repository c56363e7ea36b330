"""How much memory of this machine there is to use, and how much this process has."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

CONTROL_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Largest resident memory that this process has had."""
    with suppress(OSError):  # Linux; ru_maxrss would begin with the size of whoever started this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


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


def limit_caches() -> None:
    """Keep oneDNN and torch from caching a program for each height that a matrix ever had; call before products.

    Experts get another number of tokens in every chunk: at the default of 1024 programs of 0.6 MB, made in less
    than a millisecond each, that is what the activations of a whole chunk take.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "128")
