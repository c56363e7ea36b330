"""When a training state is written: every so many steps, or as often as costs a fiftieth of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 50
LONGEST_S = 600.0


class Pace:
    """Of one run's states."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._cost_s = 0.0
        self._saved_at = time.monotonic()

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the state after `step` of `steps` is to be written."""
        if step == steps:
            return True
        if self._every is not None:
            return step % self._every == 0
        return time.monotonic() - self._saved_at >= min(LONGEST_S, SHARE * self._cost_s)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the writing."""
        begun = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - begun
