"""The training curve as an SVG of its own: loss, and accuracy by position, over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from m27quant.report.plots import number, tag

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 720, 250, 58, 110, 34, 36
POINTS = 240
"""Of a line: steps are averaged in as many groups."""
POSITIONS = (0, 1, 3, 7)
"""Whose accuracy is drawn."""
STYLE = """
  svg { --s0: #0b7285; --s1: #b35900; --s2: #5f3dc4; --s3: #868e96; --ink: #212529; --soft: #6c757d; --edge: #dee2e6;
        --page: #ffffff; font-family: system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --s0: #4cc9dc; --s1: #ffa94d; --s2: #b197fc; --s3: #adb5bd; --ink: #e9ecef; --soft: #adb5bd; --edge: #343a40;
          --page: #16191d; } }
  .page { fill: var(--page); } .grid { stroke: var(--edge); } .title { fill: var(--ink); font-size: 14px; }
  .tick, .name { fill: var(--soft); font-size: 11px; } .line { fill: none; stroke-width: 1.8; }
  .s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
  .dot { fill: var(--page); stroke-width: 1.8; }
"""
Points = list[tuple[float, float]]
"""(step, value), ascending."""


def draw(entries: Sequence[dict[str, Any]]) -> str:
    """The picture of a log's entries."""
    steps = [entry for entry in entries if entry.get("event") == "step"]
    evals = [entry for entry in entries if entry.get("event") == "eval"]
    last = max((entry["step"] for entry in steps), default=1)
    places = max((len(entry["accuracy"]) for entry in steps), default=0)
    shown = [k for k in POSITIONS if k < places]
    loss = [("training", averaged(steps, lambda e: e["loss"]), False)]
    if evals:
        loss.append(("held out", [(e["step"], e["val_loss"]) for e in evals], True))
    hits = [(f"position {k + 1}", averaged(steps, lambda e, k=k: place(e, k)), False) for k in shown]  # type: ignore[misc]  # k is bound
    panels = [_panel("loss", loss, last, 0), _panel("accuracy, what came before being given", hits, last, 1)]
    page = tag("rect", class_="page", width=WIDTH, height=2 * PANEL)
    style = Markup("<style>{}</style>").format(Markup(STYLE))
    return str(
        tag(
            "svg", Markup("").join([style, page, *panels]), xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {2 * PANEL}", role="img", aria_label="Loss and accuracy over the training's steps",
        )
    ) + "\n"  # fmt: skip


def place(entry: dict[str, Any], k: int) -> float:
    """A step's accuracy at a position; NaN where its blocks were shorter."""
    return float(entry["accuracy"][k]) if k < len(entry["accuracy"]) else math.nan


def averaged(entries: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Points:
    """At most `POINTS` means of neighbours."""
    found = [(float(e["step"]), v) for e in entries if math.isfinite(v := value(e))]
    size = max(1, -(-len(found) // POINTS))
    groups = [found[at : at + size] for at in range(0, len(found), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _panel(title: str, series: Sequence[tuple[str, Points, bool]], last: int, row: int) -> Markup:
    top, bottom = row * PANEL + TOP, (row + 1) * PANEL - BOTTOM
    values = [value for _, points, _ in series for _, value in points] or [0.0, 1.0]
    ticks = round_ticks(min(values), max(values))

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    parts = [tag("text", title, class_="title", x=LEFT, y=top - 12)]
    for tick in ticks:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick)))
        parts.append(tag("text", number(tick), class_="tick", x=LEFT - 8, y=y(tick) + 4, text_anchor="end"))
    parts += [
        tag("text", f"{step:,.0f}", class_="tick", x=x(step), y=bottom + 16, text_anchor="middle")
        for step in round_ticks(0, last)
        if step <= last and step.is_integer()
    ]
    parts.append(
        tag("text", "step", class_="tick", x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 30, text_anchor="middle")
    )
    for index, (name, points, dotted) in enumerate(series):
        if not points:
            continue
        path = "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        parts.append(tag("path", class_=f"line s{index}", d=path))
        if dotted:
            parts += [
                tag("circle", class_=f"dot s{index}", cx=x(step), cy=y(value), r=3) for step, value in points
            ]
        parts.append(tag("line", class_=f"line s{index}", x1=WIDTH - RIGHT + 12, x2=WIDTH - RIGHT + 30,
                         y1=top + 8 + 18 * index, y2=top + 8 + 18 * index))  # fmt: skip
        parts.append(tag("text", name, class_="name", x=WIDTH - RIGHT + 36, y=top + 12 + 18 * index))
    return Markup("").join(parts)


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= span / 4 * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]
