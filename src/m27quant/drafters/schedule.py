"""The learning rate over the steps: warm-up, then one of four ways down."""

from __future__ import annotations

import math

STABLE = 0.4
"""Share of the steps after which wsd's rate falls."""


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of the warm-up; below 1, `warmup` is a share of all."""
    return min(steps, math.ceil(warmup * steps) if warmup < 1 else int(warmup))


def lr_scale(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The factor of the learning rate at `step`, counted from 0.

    Linear up to 1 over the warm-up, then cosine: half a cosine to 0; linear: a line to 0; constant: 1; wsd: 1 for the
    first `STABLE` of all steps, then a line to 0 (warm-up, stable, decay).
    """
    rising = warmup_steps(warmup, steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    if schedule == "wsd":
        return min(1.0, (steps - step) / ((1 - STABLE) * steps))
    return 1.0
