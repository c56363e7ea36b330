"""Charts as inline SVG: lines with bands over layers, or whatever is counted.

Everything is drawn in classes that the page's style sheet colours, so that one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Table = npt.NDArray[np.float64]

WIDTH, HEIGHT = 520, 236
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 36
COLOURS = 6
"""Of the style sheet, s0 to s5; further lines begin again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line over layers: the middle, and the range around it where there is one.  NaN breaks a line."""

    name: str
    mid: Table
    low: Table | None = None
    high: Table | None = None


def over_experts(name: str, table_LE: Table, *, middle: Callable[[Table], object] = np.median) -> Series:
    """The middle and the range of each layer's experts."""
    rows = [row[~np.isnan(row)] for row in table_LE]
    of_layers = [(float(middle(r)), r.min(), r.max()) if r.size else (math.nan,) * 3 for r in rows]  # type: ignore[arg-type]  # numpy's reductions
    mid, low, high = np.array(of_layers, float).reshape(-1, 3).T
    return Series(name=name, mid=mid, low=low, high=high)


def tag(name: str, content: Markup | str = "", **attributes: object) -> Markup:
    """An element; attributes and content are escaped, `class_` is `class`, `_` in names is `-`."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), short(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, given, content)


def number(value: float) -> str:
    """Four digits, without a needless exponent: "20.47", "1.05e-4", "37,171"."""
    if math.isnan(value):
        return "none"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


class _Axis:
    """From values to places, with ticks at round numbers; on a logarithmic axis 0 lies at the bottom."""

    def __init__(self, values: Table, *, log: bool) -> None:
        self._log = log
        values = values[values > 0] if log else values
        low, high = float(values.min()), float(values.max())
        self.ticks = _log_ticks(low, high) if log else _ticks(low, high)
        self._low, self._high = self._of(min(low, self.ticks[0])), self._of(max(high, self.ticks[-1]))
        if self._low == self._high:
            self._low, self._high = self._low - 0.5, self._high + 0.5

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def y(self, value: float) -> float:
        place = self._of(value) if value > 0 or not self._log else self._low
        share = (place - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = (high - low) or abs(high) * 0.02 or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) if step > 1e-9 else n * step for n in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, -(-(last - first) // 6))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [float(f"{m}e{p}") for p in range(first, last + 1, stride) for m in steps]
    below = [t for t in ticks if t <= low * (1 + 1e-9)]
    above = [t for t in ticks if t >= high * (1 - 1e-9)]
    bottom, top = (below[-1] if below else ticks[0]), (above[0] if above else ticks[-1])
    return [t for t in ticks if bottom <= t <= max(top, bottom)]


def lines(
    series: Sequence[Series], *, label: str, log: bool = False, unit: str = "layer", first: int = 0
) -> Markup | None:
    """A chart over layers, with a hover column for each; None where there is no number to draw.

    `unit` is what is counted instead, `first` its first number.
    """
    rows = [s for s in series if (s.mid > 0 if log else ~np.isnan(s.mid)).any()]
    if not rows:
        return None
    values = np.concatenate([a for s in rows for a in (s.mid, s.low, s.high) if a is not None])
    axis = _Axis(values[~np.isnan(values)], log=log)
    layers = len(rows[0].mid)
    step = (WIDTH - LEFT - RIGHT) / layers
    x = [LEFT + (layer + 0.5) * step for layer in range(layers)]
    parts = [_grid(axis), _labels(x, step, unit, first)]
    classes = {id(s): f"s{index % COLOURS}" for index, s in enumerate(series)}
    parts += [_band(x, s, axis, classes[id(s)]) for s in rows]
    parts += [_line(x, s.mid, axis, classes[id(s)]) for s in rows]
    parts += [_column(f"{unit} {n + first}", n, x[n] - step / 2, step, rows) for n in range(layers)]
    return tag(
        "svg", Markup("").join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart"
    )  # fmt: skip


def _grid(axis: _Axis) -> Markup:
    rows = []
    for tick in axis.ticks:
        y = axis.y(tick)
        rows.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        rows.append(tag("text", number(tick), class_="tick", x=LEFT - 8, y=y + 4, text_anchor="end"))
    return Markup("").join(rows)


def _labels(x: Sequence[float], step: float, unit: str, first: int) -> Markup:
    stride = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n * step >= 26 or n == 1000)
    y = HEIGHT - BOTTOM + 16
    marks = [
        tag("text", str(n + first), class_="tick", x=x[n], y=y, text_anchor="middle")
        for n in range(-first % stride, len(x), stride)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return Markup("").join(
        [*marks, tag("text", unit, class_="tick axis", x=middle, y=y + 16, text_anchor="middle")]
    )


def _band(x: Sequence[float], series: Series, axis: _Axis, style: str) -> Markup:
    if series.low is None or series.high is None:
        return Markup("")
    shapes = []
    for run in _runs(series.mid):
        upper = [(x[n], axis.y(series.high[n])) for n in run]
        lower = [(x[n], axis.y(series.low[n])) for n in reversed(run)]
        shapes.append(tag("path", class_=f"band {style}", d=_path(upper + lower) + "Z"))
    return Markup("").join(shapes)


def _line(x: Sequence[float], mid: Table, axis: _Axis, style: str) -> Markup:
    shapes = []
    for run in _runs(mid):
        places = [(x[n], axis.y(mid[n])) for n in run]
        shapes.append(tag("path", class_=f"line {style}", d=_path(places)))
        if len(mid) <= 32 or len(run) == 1:
            shapes += [tag("circle", class_=f"dot {style}", cx=px, cy=py, r=2.6) for px, py in places]
    return Markup("").join(shapes)


def _column(place: str, n: int, x: float, width: float, series: Sequence[Series]) -> Markup:
    said = [place]
    for s in series:
        around = ""
        if s.low is not None and s.high is not None and not math.isnan(s.mid[n]):
            around = f"  ({number(s.low[n])} to {number(s.high[n])})"
        said.append(f"{s.name}: {number(s.mid[n])}{around}")
    height = HEIGHT - TOP - BOTTOM
    return tag("rect", class_="hit", x=x, y=TOP, width=width, height=height, data_tip="\n".join(said))


def _runs(values: Table) -> list[list[int]]:
    """Indices of neighbours that are numbers."""
    runs: list[list[int]] = []
    for n in np.flatnonzero(~np.isnan(values)):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(int(n))
        else:
            runs.append([int(n)])
    return runs


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in places)


def short(value: object) -> object:
    """A number with at most two digits behind its point; all else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
