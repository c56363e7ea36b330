"""The limits of the machine that a benchmark runs on, measured in the same run, and what the machine is."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from m27quant.environment import describe_environment

PACKAGES = ("m27quant", "torch", "nvidia-modelopt", "transformers", "triton")


def interleaved(operations: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best seconds of each operation; they take turns, so that what else the machine does falls on all."""
    best = dict.fromkeys(operations, float("inf"))
    for _ in range(rounds):
        for name, operation in operations.items():
            started = time.perf_counter()
            operation()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes copied per second from memory to memory, in one block: a large one, that no cache holds."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)  # zeros might be one page many times
    target = torch.empty_like(source)
    return nbytes / interleaved({"copy": lambda: target.copy_(source)}, 7)["copy"]


def gemm_rate(device: torch.device, tokens: int, k: int, n: int) -> float:
    """FLOP/s of one BF16 product [tokens, k] x [n, k]."""
    x = torch.randn(tokens, k, device=device).bfloat16()
    w = torch.randn(n, k, device=device).bfloat16()
    seconds = interleaved({"product": lambda: torch.nn.functional.linear(x, w)}, 7)["product"]
    return 2.0 * tokens * k * n / seconds


def disk_read_rate(path: Path, most_bytes: int = 2**31) -> tuple[float, str]:
    """(bytes per second, how) of reading `path` in order from the disk, not from memory where that can be."""
    block = 2**24
    count = min(path.stat().st_size, most_bytes) // block * block
    if not count:
        return 0.0, "not measured: the file is too small"
    how, flags = "O_DIRECT", os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(path, flags)
    except OSError:
        fd = os.open(path, os.O_RDONLY)
        flags = os.O_RDONLY
    if flags == os.O_RDONLY:
        how = "through the page cache"
        if hasattr(os, "posix_fadvise"):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            how += ", emptied for this file before"
    try:
        with mmap.mmap(-1, block) as buffer:  # page aligned, as O_DIRECT wants it
            started = time.perf_counter()
            for offset in range(0, count, block):
                if os.preadv(fd, [buffer], offset) != block:
                    raise OSError(f"{path}: short read")
            return count / (time.perf_counter() - started), how
    finally:
        os.close(fd)


def facts() -> dict[str, Any]:
    """Hardware and versions; no name of the machine, no path."""
    environment = describe_environment().document()
    return {
        "system": environment["system"],
        "python": environment["python"],
        "cpu": environment["cpu"],
        "memory_bytes": environment["memory"]["total_bytes"],
        "devices": environment["devices"],
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
