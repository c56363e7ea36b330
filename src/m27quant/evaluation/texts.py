"""What the models of an evaluation write: how long greedy text stays the reference's, and how healthy texts are.

One model is in memory at a time, as it would be served.  Of one that does not fit nothing can be said of its texts;
its divergence points follow from the other's texts all the same (see `greedy`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from m27quant.checkpoint.source import Source
from m27quant.evaluation.greedy import Common, compare_streamed, compare_texts
from m27quant.evaluation.health import share_of, text_health
from m27quant.evaluation.models import speaking_of
from m27quant.evaluation.result import CandidateResult, Pair
from m27quant.evaluation.statistics import Bootstrap, holm, mean_of, sign_flip_p
from m27quant.evaluation.writing import Prompt, Unwritten, Written, write
from m27quant.runtime.streamed import Precision

MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate in one mode."""

    name: str
    """As the user named it."""
    label: str
    source: Source
    precision: Precision


@dataclass(frozen=True, slots=True)
class Texts:
    """Of all rows, in their order; each mapping has figures, or says under `not_measured` why it has none."""

    reference_health: Mapping[str, Any]
    greedy: tuple[Mapping[str, Any], ...]
    health: tuple[Mapping[str, Any], ...]
    pairs: tuple[Pair, ...]
    """Rows compared by tokens in common with the reference, on the same prompts."""

    def beside(self, rows: Sequence[CandidateResult]) -> tuple[CandidateResult, ...]:
        """The rows, each with what was found of its texts."""
        found = zip(rows, self.greedy, self.health, strict=True)
        return tuple(replace(row, greedy=greedy, health=health) for row, greedy, health in found)


def measure_texts(
    reference: Source,
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    seed: int = 0,
    device: torch.device,
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
    stop: Callable[[], None] = lambda: None,
) -> Texts:
    """Let all models write behind the same prompts, and compare.

    Args:
        reference: what candidates are compared with; its layout checked, as theirs.
        rows: candidates and modes.
        prompts: see `make_prompts`; at least one of them is no chat.
        max_tokens: of a text.
        seed: of the intervals.
        device: where.
        max_memory: bytes to stay within while a model writes.
        progress: called with the share that is done.
        stop: called now and then; may raise.

    Raises:
        CheckpointError: a weight that cannot be computed with.
    """

    def written_by(source: Source, precision: Precision | None) -> Written | Unwritten:
        stop()
        return write(
            source, prompts, max_tokens, precision=precision, device=device, max_memory=max_memory, stop=stop
        )

    theirs = written_by(reference, None)  # a fault of its weights was met with before
    progress(1 / (len(rows) + 2))
    health, ours, common = [], [], []
    for number, row in enumerate(rows):
        with speaking_of(row.name):
            texts = written_by(row.source, row.precision)
        health.append(_health(texts, seed))
        ours.append(texts if isinstance(theirs, Unwritten) else None)  # else they are not wanted any more
        common.append(_compared(theirs, texts, row, device, stop))
        progress((number + 2) / (len(rows) + 2))
    if isinstance(theirs, Unwritten):
        common = _along(ours, reference, device, stop)
    progress(1.0)
    ways = [_way(theirs, figures) for figures in health]
    greedy = [_greedy(found, theirs, way, max_tokens, seed) for found, way in zip(common, ways, strict=True)]
    pairs = _pairs(rows, common, seed)
    return Texts(_health(theirs, seed), tuple(greedy), tuple(health), tuple(pairs))


def _health(texts: Written | Unwritten, seed: int) -> dict[str, Any]:
    return _not_measured(texts) if isinstance(texts, Unwritten) else text_health(texts, seed)


def _not_measured(texts: Unwritten) -> dict[str, Any]:
    return {"not_measured": texts.reason[:MAX_REASON]}


def _compared(
    theirs: Written | Unwritten,
    ours: Written | Unwritten,
    row: Row,
    device: torch.device,
    stop: Callable[[], None],
) -> list[Common] | None:
    """By the reference's texts; None where it has written none."""
    if isinstance(theirs, Unwritten):
        return None
    if isinstance(ours, Written):
        return compare_texts(theirs.continued, ours.continued)
    return compare_streamed(theirs.continued, row.source, precision=row.precision, device=device, stop=stop)


def _along(
    ours: Sequence[Written | Unwritten | None],
    reference: Source,
    device: torch.device,
    stop: Callable[[], None],
) -> list[list[Common] | None]:
    """The reference goes along the texts of all rows that have written, in one pass."""
    texts = [row.continued if isinstance(row, Written) else [] for row in ours]
    together = [text for row in texts for text in row]
    found = iter(compare_streamed(together, reference, device=device, stop=stop) if together else [])
    return [[next(found) for _ in row] or None for row in texts]


def _way(theirs: Written | Unwritten, health: Mapping[str, Any]) -> str:
    if isinstance(theirs, Unwritten):
        return "candidate's text"
    return "reference's text" if "not_measured" in health else "both texts"


def _greedy(
    common: list[Common] | None, theirs: Written | Unwritten, way: str, max_tokens: int, seed: int
) -> dict[str, Any]:
    if common is None:
        assert isinstance(theirs, Unwritten)
        return _not_measured(theirs)
    points = [found.num_tokens for found in common]
    points_N = torch.tensor(points, dtype=torch.float64)
    mean = mean_of(points_N, torch.ones_like(points_N))
    return {
        "num_prompts": len(points),
        "max_tokens": max_tokens,
        "compared_by": way,
        "tokens": Bootstrap(len(points), seed).estimate(mean).to_json(),
        "median": statistics.median_low(points),
        "identical": share_of([found.is_identical for found in common]).to_json(),
        "points": points,
    }


def _pairs(rows: Sequence[Row], common: Sequence[list[Common] | None], seed: int) -> list[Pair]:
    """Of rows that differ in the checkpoint alone or in the mode alone."""
    found = []
    for (a, ours), (b, other) in combinations(zip(rows, common, strict=True), 2):
        alike = (a.source is b.source, a.precision == b.precision)
        if ours is None or other is None or alike.count(True) != 1:
            continue
        difference_N = torch.tensor(
            [float(x.num_tokens - y.num_tokens) for x, y in zip(ours, other, strict=True)]
        )
        difference_N = difference_N.double()
        mean = Bootstrap(len(difference_N), seed).estimate(
            mean_of(difference_N, torch.ones_like(difference_N))
        )
        found.append((a.label, b.label, mean, sign_flip_p(difference_N, seed)))
    corrected = holm([p for *_, p in found])
    return [
        Pair(a=a, b=b, metric="greedy", difference=mean.value, low=mean.low, high=mean.high, p=p)
        for (a, b, mean, _), p in zip(found, corrected, strict=True)
    ]
