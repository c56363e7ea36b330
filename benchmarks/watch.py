"""What a command takes, seen from outside: time and the peak of its resident memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.03
CHILDREN_EVERY = 10
"""Samples: looking for children means reading the whole process table."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak_rss_bytes: int
    """The kernel's high-water mark of the process (VmHWM); the largest sample where there is no /proc."""
    peak_tree_bytes: int
    """Largest sample of the process and all its children together."""
    cpu_s: float
    """Processor time, user and system."""


def watch(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Watched:
    """Run `command` to its end; what it prints is kept, not shown."""
    started = time.monotonic()
    peak = tree = samples = 0
    cpu_s = 0.0
    with subprocess.Popen(
        command, env={**os.environ, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        seen = psutil.Process(process.pid)
        while True:
            try:
                peak = max(peak, _high_water(process.pid), seen.memory_info().rss)
                if samples % CHILDREN_EVERY == 0:
                    family = [seen, *seen.children(recursive=True)]
                    tree = max(tree, sum(p.memory_info().rss for p in family))
                samples += 1
                cpu_s = max(cpu_s, sum(seen.cpu_times()[:2]))
            except psutil.Error:  # it, or a child, ended in between
                pass
            try:
                # reads both pipes meanwhile, so that the command never waits for us
                stdout, stderr = process.communicate(timeout=INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                continue
    seconds = time.monotonic() - started
    return Watched(process.returncode, stdout, stderr, seconds, peak, max(peak, tree), cpu_s)


def _high_water(pid: int) -> int:
    """The kernel's own maximum, which no sampling misses but in the last moments; 0 where it is not told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
