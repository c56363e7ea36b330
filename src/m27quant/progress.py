"""What long work reports while it runs: plain snapshots, rendered by whoever listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One snapshot of a long run."""

    stage: str
    """What happens now: "calibrate", "attention", "experts", "write", "commit"."""
    fraction: float
    """Share of the whole run that is done, 0 to 1."""
    layer: int | None = None
    num_layers: int | None = None
    tokens_per_s: float | None = None
    bytes_per_s: float | None = None
    """Source bytes (FP8) consumed per second."""
    rss_bytes: int | None = None
    device_bytes: int | None = None
    """Peak memory allocated on the accelerator, None on a CPU."""
    loss: float | None = None
    """Of the training step that was done last."""
    accuracy: tuple[float, ...] | None = None
    """Of that step's drafts, position by position."""


ProgressCallback = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener that does not listen."""
