"""What was measured: a cell of the table, two cells beside each other, the whole; numbers only, nothing rendered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from m27quant.bench.reading import COUNTED, Acceptance, Reading
from m27quant.drafters import metrics


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over requests."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Nearest-rank percentiles; None where there are no values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(fmean(ordered), *(ordered[-(-len(ordered) * p // 100) - 1] for p in (50, 99)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One task at one concurrency with one setting."""

    task: str
    concurrency: int
    setting: str | None
    """None: without a drafter."""
    num_requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_s: float
    """Tokens of all answers over the time of the whole run, prompts included."""
    turns: tuple[float, ...]
    """The same of each turn; the n-th turns of all settings were asked the same, one right behind the other."""
    ttft_s: Spread | None
    itl_s: Spread | None
    finish_reasons: dict[str, int]
    errors: dict[str, int]
    """Requests without an answer, by what went wrong."""
    acceptance: Acceptance
    zlab_local: float | None
    """Mean over answers of each one's tau."""
    zlab_server: float | None
    """Mean over answers of tokens over verify steps: the figure of the DFlash cards."""
    step_draft_s: float | None
    """Of a mean verify step, as a sequence sees it; None from a server."""
    step_verify_s: float | None
    num_preemptions: int

    @classmethod
    def of(cls, task: str, concurrency: int, setting: str | None, reading: Reading) -> Cell:
        """Sum up a run."""
        answers = reading.answers
        good = [a for a in answers if a.error is None]
        counted = [(a.output_tokens, a.stats) for a in good if a.stats is not None and a.stats.num_steps]
        steps = sum(stats.num_steps for _, stats in counted)
        timed = bool(steps) and any(a.verify_s for a in good)
        drafting = setting is not None and bool(counted)
        return cls(
            task=task,
            concurrency=concurrency,
            setting=setting,
            num_requests=len(answers),
            seconds=reading.seconds,
            prompt_tokens=sum(a.prompt_tokens for a in good),
            output_tokens=sum(a.output_tokens for a in good),
            tokens_per_s=reading.rate,
            turns=reading.turns,
            ttft_s=Spread.of([a.ttft_s for a in good if a.ttft_s is not None]),
            itl_s=Spread.of([a.itl_s for a in good if a.itl_s is not None]),
            finish_reasons=dict(Counter(a.finish_reason or "unknown" for a in good)),
            errors=dict(Counter(a.error for a in answers if a.error is not None)),
            acceptance=reading.acceptance,
            zlab_local=metrics.zlab_local([stats for _, stats in counted]) if drafting else None,
            zlab_server=metrics.zlab_server([(n, s.num_steps) for n, s in counted]) if drafting else None,
            step_draft_s=sum(a.draft_s for a in good) / steps if timed else None,
            step_verify_s=sum(a.verify_s for a in good) / steps if timed else None,
            num_preemptions=sum(a.num_preemptions for a in good),
        )

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; acceptance under the names of docs/metrics.md."""
        found = asdict(self)
        a = self.acceptance
        stats = a.stats.to_json() if a.stats is not None else {}
        return {
            **found,
            "acceptance": {**stats, "tau": a.tau, "source": a.source, "counted": COUNTED[a.source]},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A drafted cell beside the plain one of the same task and concurrency, measured in the same run."""

    task: str
    concurrency: int
    setting: str
    tau: float | None
    measured: float
    """Ratio of tokens/s, prompts included."""
    error: float | None
    """Standard error of that ratio, from the turns; None where there were fewer than three."""
    decode_s: float | None
    """A step without drafter, which gives one token."""
    verify_s: float | None
    draft_s: float | None

    @property
    def predicted(self) -> float | None:
        """tau * t_decode / (t_verify + t_draft): decoding alone."""
        if self.tau is None or self.decode_s is None or self.verify_s is None or self.draft_s is None:
            return None
        return metrics.speedup(self.tau, self.decode_s, self.verify_s, self.draft_s)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "predicted": self.predicted}


def _ratio_error(rates: Sequence[float], plain: Sequence[float]) -> float | None:
    """Standard error of the mean ratio of paired turns."""
    if len(rates) != len(plain) or len(rates) < 3 or min(plain) <= 0:
        return None
    ratios = [a / b for a, b in zip(rates, plain, strict=True)]
    return stdev(ratios) / math.sqrt(len(ratios))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Which setting to take at one concurrency, over all tasks."""

    concurrency: int
    setting: str | None
    """None: draft nothing."""
    speedup: float
    """By the formula, of the best setting, taken or not."""
    why: str
    flags: str | None = None
    """For `m27quant run`."""


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """Everything; cells are added as they are measured."""

    subject: str
    """The checkpoint, or the server's address."""
    drafter: str | None
    options: dict[str, Any]
    machine: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def num_errors(self) -> int:
        return sum(cell.num_errors for cell in self.cells)

    def speeds(self) -> list[Speed]:
        """Each cell with a drafter beside the one without."""
        plain = {(c.task, c.concurrency): c for c in self.cells if c.setting is None}
        found = []
        for cell in self.cells:
            without = plain.get((cell.task, cell.concurrency))
            if cell.setting is None or without is None or not without.tokens_per_s:
                continue
            steps = without.step_draft_s, without.step_verify_s
            decode = None if None in steps else sum(s for s in steps if s is not None)
            found.append(
                Speed(
                    task=cell.task,
                    concurrency=cell.concurrency,
                    setting=cell.setting,
                    tau=cell.acceptance.tau,
                    measured=cell.tokens_per_s / without.tokens_per_s,
                    error=_ratio_error(cell.turns, without.turns),
                    decode_s=decode,
                    verify_s=cell.step_verify_s,
                    draft_s=cell.step_draft_s,
                )
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The document behind `schema_version`."""
        return {
            "subject": self.subject,
            "drafter": self.drafter,
            "complete": self.complete,
            "options": self.options,
            "machine": self.machine,
            "cells": [cell.to_json() for cell in self.cells],
            "speeds": [speed.to_json() for speed in self.speeds()],
            "advice": [asdict(advice) for advice in self.advice],
            "notices": self.notices,
        }
