"""The evaluation that quantization_report.json keeps, as far as it is shown: believed only after a check."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from m27quant.evaluation.result import Estimate
from m27quant.report.evaluation_words import HEALTH

Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]


class _Part(BaseModel):
    """No conversions, no NaN; keys that a later version adds are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Interval(_Part):
    """A figure and its 95 % interval; None where it was no finite number."""

    value: Number | None
    low: Number | None
    high: Number | None

    @property
    def estimate(self) -> Estimate:
        """With NaN for what is not known."""
        value, low, high = (math.nan if v is None else v for v in (self.value, self.low, self.high))
        return Estimate(value, low, high)


class Divergence(_Part):
    """KL divergence from the reference."""

    mean: Interval
    p99: Interval


class Greedy(_Part):
    """Greedy text in common with the reference's; None where it was not measured."""

    tokens: Interval | None = None
    max_tokens: Count = 0


class Task(_Part):
    """lm-eval's figures of one task."""

    metrics: Annotated[dict[Text, Interval], Field(max_length=64)]


class Row(_Part):
    """The checkpoint in one mode."""

    mode: Text
    perplexity_ratio: Interval
    kl: Divergence
    top1: Interval
    top8: Interval
    greedy: Greedy | None = None
    health: Annotated[dict[Text, Interval | Count | Text | None], Field(max_length=64)] | None = None
    tasks: Annotated[dict[Text, Task | Text], Field(max_length=1024)] | None = None

    def figure(self, name: str) -> Estimate | None:
        """By its name in `evaluation_words.FIGURES` or `HEALTH`; None where it was not measured."""
        if name == "greedy":
            return None if self.greedy is None or self.greedy.tokens is None else self.greedy.tokens.estimate
        if name in HEALTH:
            share = (self.health or {}).get(name)
            return share.estimate if isinstance(share, Interval) else None
        of = {"kl_mean": self.kl.mean, "kl_p99": self.kl.p99}
        found: Interval = of.get(name) or getattr(self, name)
        return found.estimate

    @property
    def of_tasks(self) -> dict[tuple[str, str], Estimate]:
        """(task, metric) -> figure."""
        return {
            (name, metric): figure.estimate
            for name, task in (self.tasks or {}).items()
            if isinstance(task, Task)
            for metric, figure in task.metrics.items()
        }


class Reference(_Part):
    """What it was compared with."""

    checkpoint: Text


class Data(_Part):
    """On what."""

    dataset: Annotated[list[Text], Field(max_length=64)]
    num_windows: Count
    num_tokens: Count


class Evaluated(_Part):
    """An evaluation of this checkpoint alone."""

    reference: Reference
    data: Data
    candidates: Annotated[list[Row], Field(max_length=64)]
