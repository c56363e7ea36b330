"""Charts as inline SVG: lines with bands over layers, and heat maps of layers x experts as an embedded PNG.

Everything is drawn in classes that the page's style sheet colours, so that one drawing serves light and dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Table = npt.NDArray[np.float64]

WIDTH, HEIGHT = 520, 236
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 36
MAP_WIDTH = 1000
MAX_CELL, MIN_CELL_HEIGHT, MAX_CELL_HEIGHT = 44.0, 8.0, 26.0

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
BELOW, ABOVE = "2f6fde", "e0662b"


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
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
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


# -- lines -----------------------------------------------------------------------------------------


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


def lines(series: Sequence[Series], *, label: str, log: bool = False) -> Markup | None:
    """A chart over layers, with a hover column for each; None where there is no number to draw."""
    rows = [s for s in series if (s.mid > 0 if log else ~np.isnan(s.mid)).any()]
    if not rows:
        return None
    values = np.concatenate([a for s in rows for a in (s.mid, s.low, s.high) if a is not None])
    axis = _Axis(values[~np.isnan(values)], log=log)
    layers = len(rows[0].mid)
    step = (WIDTH - LEFT - RIGHT) / layers
    x = [LEFT + (layer + 0.5) * step for layer in range(layers)]
    parts = [_grid(axis), _layer_labels(x, step)]
    classes = {id(s): f"s{index % 3}" for index, s in enumerate(series)}
    parts += [_band(x, s, axis, classes[id(s)]) for s in rows]
    parts += [_line(x, s.mid, axis, classes[id(s)]) for s in rows]
    parts += [_column(layer, x[layer] - step / 2, step, rows) for layer in range(layers)]
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


def _layer_labels(x: Sequence[float], step: float) -> Markup:
    stride = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n * step >= 26 or n == 1000)
    y = HEIGHT - BOTTOM + 16
    marks = [
        tag("text", str(n), class_="tick", x=x[n], y=y, text_anchor="middle")
        for n in range(0, len(x), stride)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return Markup("").join(
        [*marks, tag("text", "layer", class_="tick axis", x=middle, y=y + 16, text_anchor="middle")]
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


def _column(layer: int, x: float, width: float, series: Sequence[Series]) -> Markup:
    said = [f"layer {layer}"]
    for s in series:
        around = ""
        if s.low is not None and s.high is not None and not math.isnan(s.mid[layer]):
            around = f"  ({number(s.low[layer])} to {number(s.high[layer])})"
        said.append(f"{s.name}: {number(s.mid[layer])}{around}")
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
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in places)


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


# -- heat maps -------------------------------------------------------------------------------------


def heat_map(
    table_LE: Table, *, label: str, diverging: bool = False, log: bool = False
) -> tuple[Markup, Markup]:
    """(the map with its axes, the ramp below it): layers down, experts across; NaN cells are left open.

    A diverging map has its middle at 0 and fades to nothing there; the other runs from the least to the largest.
    """
    known = table_LE[~np.isnan(table_LE)]
    scaled_LE = np.log1p(table_LE) if log else table_LE
    ends = (float(known.min()), float(known.max()))
    if diverging:
        reach = max(1.0, float(np.abs(known).max()))
        ends, bounds = (-reach, reach), (-reach, reach)
    else:
        bounds = (math.log1p(ends[0]), math.log1p(ends[1])) if log else ends
    span = (bounds[1] - bounds[0]) or 1.0
    codes = np.where(np.isnan(table_LE), 0, 1 + np.nan_to_num((scaled_LE - bounds[0]) / span) * 254)
    palette = _diverging() if diverging else _sequential()
    picture = _png(np.rint(codes).astype(np.uint8), palette)
    ramp = _png(np.arange(1, 256, dtype=np.uint8)[None], palette)
    middle = 0.0 if diverging else math.expm1((bounds[0] + bounds[1]) / 2) if log else sum(ends) / 2
    return _framed(picture, table_LE.shape, label), _ramp(ramp, (ends[0], middle, ends[1]))


def _framed(picture: str, shape: tuple[int, ...], label: str) -> Markup:
    layers, experts = shape
    left, top = 40, 22
    cell = min(MAX_CELL, MAP_WIDTH / experts)
    height = min(MAX_CELL_HEIGHT, max(MIN_CELL_HEIGHT, cell))
    wide, high = cell * experts, height * layers
    parts = [
        tag("image", href=picture, x=left, y=top, width=wide, height=high, preserveAspectRatio="none", class_="cells"),
        tag("rect", class_="frame", x=left, y=top, width=wide, height=high),
    ]  # fmt: skip
    every = next(
        n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 20) if n * cell >= 30 or n == 1 << 20
    )
    for n in range(0, experts, every):
        x = left + (n + 0.5) * cell
        parts.append(tag("text", str(n), class_="tick", x=x, y=top - 7, text_anchor="middle"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1 << 20) if n * height >= 18 or n == 1 << 20)
    for n in range(0, layers, every):
        y = top + (n + 0.5) * height + 4
        parts.append(tag("text", str(n), class_="tick", x=left - 7, y=y, text_anchor="end"))
    parts.append(tag("rect", class_="cursor", width=cell, height=height, x=left, y=top))
    box = f"0 0 {_short(left + wide + 4)} {_short(top + high + 4)}"
    return tag(
        "svg", Markup("").join(parts), viewBox=box, width=left + wide + 4, role="img", aria_label=label,
        class_="map wide" if experts > 64 else "map", tabindex="0", data_layers=layers, data_experts=experts,
    )  # fmt: skip


def _ramp(picture: str, ends: tuple[float, float, float]) -> Markup:
    places = zip(ends, (0, 120, 240), ("start", "middle", "end"), strict=True)
    marks = [
        tag("text", number(value), class_="tick", x=x, y=28, text_anchor=anchor)
        for value, x, anchor in places
    ]
    bar = tag("image", href=picture, x=0, y=0, width=240, height=12, preserveAspectRatio="none")
    frame = tag("rect", class_="frame", x=0, y=0, width=240, height=12)
    return tag(
        "svg", Markup("").join([bar, frame, *marks]), viewBox="-1 -1 242 34", width=242, class_="ramp",
        aria_hidden="true",
    )  # fmt: skip


def _sequential() -> bytes:
    """RGBA of 256 codes: 0 is open, 1 to 255 run through viridis, which also greyscale keeps in order."""
    stops = np.array([list(bytes.fromhex(c)) for c in VIRIDIS], float)
    at = np.linspace(0, len(stops) - 1, 255)
    colours = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    return _with_alpha(colours, np.full(255, 255.0))


def _diverging() -> bytes:
    """RGBA of 256 codes: 0 is open, 1 to 255 run from blue through nothing to orange."""
    at = np.linspace(-1, 1, 255)
    colours = np.where(at[:, None] < 0, list(bytes.fromhex(BELOW)), list(bytes.fromhex(ABOVE))).astype(float)
    return _with_alpha(colours, 20 + 235 * np.abs(at) ** 0.8)


def _with_alpha(colours: Table, alpha: Table) -> bytes:
    rgba = np.concatenate([colours, alpha[:, None]], axis=1)
    codes: bytes = np.rint(rgba).astype(np.uint8).tobytes()
    return bytes(4) + codes


def _png(codes: npt.NDArray[np.uint8], palette: bytes) -> str:
    """An indexed PNG as a data: address (https://www.w3.org/TR/png-3/, 11.2)."""
    rgba = np.frombuffer(palette, np.uint8).reshape(-1, 4)
    rows = b"".join(b"\0" + row.tobytes() for row in codes)
    height, width = codes.shape
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", rgba[:, :3].tobytes()),
        (b"tRNS", rgba[:, 3].tobytes()),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
