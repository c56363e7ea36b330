"""The page about an evaluation: figures with their intervals, tests of pairs, layers, texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m27quant.evaluation.result import CandidateResult, Estimate, Evaluation
from m27quant.report import evaluation_words as words
from m27quant.report import plots
from m27quant.report.evaluation_words import FIGURES, HEALTH, TESTED
from m27quant.report.page import GENERATOR, fill
from m27quant.report.page_drawings import Chart
from m27quant.report.plots import COLOURS, Series
from m27quant.report.text import line

MARGIN = 0.06
"""Of the width, to the left and right of what is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """One row's figure: in words, and its places in percent of the width; None where it is no finite number."""

    label: str
    colour: int
    value: str
    between: str
    at: float | None
    low: float | None
    width: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Whiskers:
    """One figure of all rows under one axis."""

    title: str
    note: str
    rows: list[Whisker]
    ends: tuple[str, str]
    mark: float | None
    """Where the reference itself lies, in percent."""


def render(result: Evaluation) -> str:
    """The page as ASCII HTML."""
    rows = result.candidates
    return fill(
        "evaluation.html.jinja",
        brand=GENERATOR.replace("report", "eval"),
        name=f"Quantized against {words.base_name(result.reference)}",
        verdict=words.verdict(result),
        counts=words.counts(result),
        about=result.reference,
        failures=result.failures,
        tiles=_tiles(rows),
        figures=[w for name in FIGURES if (w := _whiskers(name, rows)) is not None],
        rows=rows,
        worst=[(words.worst_layer(row), words.least_router(row)) for row in rows],
        pairs=[
            (p, *TESTED[p.metric], words.outcome(p, p.a, p.b), words.probability(p.p)) for p in result.pairs
        ],
        number=plots.number,
        charts=_charts(rows),
        layers=_layers(rows),
        health_names=[*HEALTH.values()],
        health=_health(result),
        greedy=[(row.label, *words.greedy_cells(row)) for row in rows],
        tasks=words.task_rows(result),
        untold=words.untold_tasks(result),
        data=words.data(result),
    )


def _tiles(rows: Sequence[CandidateResult]) -> list[tuple[str, str, str]]:
    """Of the row that is nearest to the reference."""
    known = [row for row in rows if math.isfinite(row.kl_mean.value)]
    if not known:
        return []
    best = min(known, key=lambda row: row.kl_mean.value)
    more = f"{best.label}, {best.mode}" + (", the least of all rows" if len(rows) > 1 else "")
    tiles = [(FIGURES["kl_mean"].number(best.kl_mean.value), "mean KL divergence, nats a token", more)]
    for name, what in (("perplexity_ratio", "perplexity ratio"), ("top1", "same likeliest token")):
        value, between = FIGURES[name].show(getattr(best, name))
        tiles.append((value, what, f"95 %: {between}"))
    tiles.append((words.worst_layer(best).split(" (")[0], "least SQNR of hidden states", f"{best.label}"))
    return tiles


def _whiskers(name: str, rows: Sequence[CandidateResult]) -> Whiskers | None:
    """None where no row has the figure."""
    figure = FIGURES[name]
    found = [(row.label, i % COLOURS, words.estimate_of(row, name)) for i, row in enumerate(rows)]
    known = [(label, colour, e) for label, colour, e in found if e is not None]
    values = [v for *_, e in known for v in (e.value, e.low, e.high) if math.isfinite(v)]
    if not values:
        return None
    own = {"kl_mean": 0.0, "kl_p99": 0.0, "perplexity_ratio": 1.0, "top1": 1.0, "top8": 1.0}.get(name)
    low, high = min(values), max(values)
    if own is not None:  # the reference is told where it is near enough
        low, high = (min(low, own), max(high, own)) if name != "top8" else (low, max(high, own))
    span = (high - low) or abs(high) or 1.0

    def place(value: float) -> float | None:
        return 100 * (MARGIN + (1 - 2 * MARGIN) * (value - low) / span) if math.isfinite(value) else None

    def whisker(label: str, colour: int, e: Estimate) -> Whisker:
        value, between = figure.show(e)
        left, right = place(e.low), place(e.high)
        width = None if left is None or right is None else right - left
        return Whisker(
            label=label, colour=colour, value=value, between=between, at=place(e.value), low=left, width=width
        )

    return Whiskers(
        title=figure.title, note=figure.note, rows=[whisker(*row) for row in known],
        ends=(figure.number(low), figure.number(high)), mark=None if own is None else place(own),
    )  # fmt: skip


def _charts(rows: Sequence[CandidateResult]) -> list[Chart]:
    drawn = [
        _chart(
            "SQNR of hidden states by layer",
            "Behind each layer, in dB, all layers before included; more is better. Bands: 95 % intervals.",
            [_series(row.label, row.layer_sqnr_db) for row in rows],
        ),
        _chart(
            "Router agreement by layer",
            "Share of tokens that go to the same set of experts as in the reference.",
            [_series(row.label, row.router) for row in rows],
        ),
        _chart(
            "Greedy texts that are still the reference's",
            "Share of prompts whose greedy text is the reference's up to this token.",
            [_survival(row) for row in rows],
            unit="token",
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def _chart(title: str, note: str, series: Sequence[Series], unit: str = "layer") -> Chart | None:
    there = [s for s in series if len(s.mid)]
    first = 0 if unit == "layer" else 1
    drawing = plots.lines(series, label=title, unit=unit, first=first) if len(there) == len(series) else None
    if drawing is None:
        return None
    return Chart(title=title, note=note, drawing=drawing, legend=tuple(s.name for s in series))


def _series(name: str, estimates: Sequence[Estimate]) -> Series:
    mid, low, high = np.array([(e.value, e.low, e.high) for e in estimates], np.float64).reshape(-1, 3).T
    finite = np.isfinite(mid)
    mid, low, high = (np.where(finite, a, np.nan) for a in (mid, low, high))
    unsure = np.isnan(low) | np.isnan(high)
    return Series(name=line(name), mid=mid, low=np.where(unsure, mid, low), high=np.where(unsure, mid, high))


def _survival(row: CandidateResult) -> Series:
    found = row.greedy or {}
    points = np.array(found.get("points", []), np.float64)
    tokens = np.arange(1, found.get("max_tokens", 0) + 1) if len(points) else np.array([])
    shares = np.array([(points >= n).mean() for n in tokens], np.float64)
    return Series(name=line(row.label), mid=shares)


def _layers(rows: Sequence[CandidateResult]) -> list[tuple[int, list[str]]]:
    """For each layer, for each row: SQNR and router agreement."""
    count = max((len(row.layer_sqnr_db) for row in rows), default=0)
    return [
        (
            layer,
            [
                cell
                for row in rows
                for cell in (
                    _decibels(row.layer_sqnr_db[layer].value),
                    words.SHARE.number(row.router[layer].value),
                )
            ],
        )
        for layer in range(count)
    ]


def _decibels(value: float) -> str:
    return "equal" if value == math.inf else "none" if math.isnan(value) else f"{value:.2f}"


def _health(result: Evaluation) -> list[tuple[str, list[str] | str]]:
    """The reference first; empty where no texts were asked for."""
    if result.reference_health is None:
        return []
    own = (words.base_name(result.reference), words.health_cells(result.reference_health))
    return [own, *((row.label, words.health_cells(row.health)) for row in result.candidates)]
