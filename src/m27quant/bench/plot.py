"""Two drawings in one SVG file: tokens/s by setting, acceptance by position.  In the style of the HTML report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from markupsafe import Markup

from m27quant.bench.render import PLAIN
from m27quant.bench.result import BenchResult
from m27quant.drafters.metrics import total
from m27quant.report.plots import number, tag

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 64, 16, 40, 40
COLOURS = ("#0b7285", "#c2410c", "#6741d9", "#13795b", "#9a6200", "#2461b8", "#b3261e", "#5a6673")
DARK = ("#4cc9dc", "#ff9b62", "#b197fc", "#46c79b", "#e8b04a", "#7fb2ff", "#ff8a80", "#9aa7b4")


def draw(result: BenchResult) -> str:
    """A whole SVG document; settings keep their colours in both drawings.

    Tasks are taken together: their mean tokens/s, and all their verify steps.
    """
    settings = list(dict.fromkeys(c.setting for c in result.cells))
    panels = [_speeds(result, settings), *_positions(result, settings)]
    legend, rows = _legend(settings, PANEL * len(panels) + 12)
    height = PANEL * len(panels) + 8 + 18 * rows
    parts = [tag("style", Markup(_style())), tag("rect", class_="page", width=WIDTH, height=height)]
    parts += [tag("g", panel, transform=f"translate(0 {PANEL * n})") for n, panel in enumerate(panels)]
    parts.append(legend)
    drawing = tag(
        "svg",
        Markup("").join(parts),
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=height,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label="tokens/s by setting, and drafts accepted by position",
    )
    return f"{drawing}\n"


def _speeds(result: BenchResult, settings: Sequence[str | None]) -> Markup:
    """Bars: a group for each concurrency, a bar for each setting."""
    concurrencies = list(dict.fromkeys(c.concurrency for c in result.cells))
    means = {
        (c, s): fmean(
            cell.tokens_per_s for cell in result.cells if (cell.concurrency, cell.setting) == (c, s)
        )
        for c, s in dict.fromkeys((cell.concurrency, cell.setting) for cell in result.cells)
    }
    axis = _Axis(max(means.values()))
    parts = [_title("tokens/s"), axis.grid()]
    group = (WIDTH - LEFT - RIGHT) / len(concurrencies)
    bar = min(72.0, group * 0.8 / len(settings))
    for n, concurrency in enumerate(concurrencies):
        begin = LEFT + n * group + (group - bar * len(settings)) / 2
        for place, setting in enumerate(settings):
            value = means.get((concurrency, setting))
            if value is None:
                continue
            x, y = begin + place * bar, axis.y(value)
            parts.append(
                tag(
                    "rect", class_=f"bar c{place % 8}", x=x + 2, y=y, width=bar - 4, height=PANEL - BOTTOM - y
                )
            )
            if bar >= 34:
                parts.append(_text("value", number(value), x + bar / 2, y - 4, "middle"))
        parts.append(
            _text("tick", f"{concurrency} at once", LEFT + (n + 0.5) * group, PANEL - BOTTOM + 18, "middle")
        )
    return Markup("").join(parts)


def _positions(result: BenchResult, settings: Sequence[str | None]) -> Iterator[Markup]:
    """Lines of C_k; nothing where no steps were counted."""
    counted = {}
    for place, setting in enumerate(settings):
        found = [c.acceptance.stats for c in result.cells if c.setting == setting and setting is not None]
        stats = total(s for s in found if s is not None)
        if stats.num_accepted:
            counted[place] = stats.c_k
    if not counted:
        return
    most = max(len(c_k) for c_k in counted.values())
    axis = _Axis(1.0)
    step = (WIDTH - LEFT - RIGHT) / most
    x = [LEFT + (k + 0.5) * step for k in range(most)]
    parts = [_title("C_k: share of verify steps that accept the first k drafts"), axis.grid()]
    parts += [_text("tick", str(k + 1), x[k], PANEL - BOTTOM + 18, "middle") for k in range(most)]
    for place, c_k in counted.items():
        points = [(x[k], axis.y(c)) for k, c in enumerate(c_k)]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        parts.append(tag("path", class_=f"line c{place % 8}", d=path))
        parts += [tag("circle", class_=f"dot c{place % 8}", cx=px, cy=py, r=3) for px, py in points]
    yield Markup("").join(parts)


class _Axis:
    """From 0 to a round number at or above the greatest value."""

    def __init__(self, greatest: float) -> None:
        power = 1.0
        while power * 10 <= greatest:
            power *= 10
        while power > greatest and greatest > 0:
            power /= 10
        self.top = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= greatest)

    def y(self, value: float) -> float:
        return PANEL - BOTTOM - (PANEL - TOP - BOTTOM) * value / self.top

    def grid(self) -> Markup:
        rows = []
        for n in range(5):
            value = self.top * n / 4
            rows.append(
                tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=self.y(value), y2=self.y(value))
            )
            rows.append(_text("tick", number(value), LEFT - 8, self.y(value) + 4, "end"))
        return Markup("").join(rows)


def _title(text: str) -> Markup:
    return _text("title", text, LEFT, 22, "start")


def _text(kind: str, text: str, x: float, y: float, anchor: str) -> Markup:
    return tag("text", text, class_=kind, x=x, y=y, text_anchor=anchor)


def _legend(settings: Sequence[str | None], y: float) -> tuple[Markup, int]:
    """Names and colours from `y` on, and the number of lines that they take."""
    parts, x, rows = [], float(LEFT), 1
    for place, setting in enumerate(settings):
        name = setting or PLAIN
        if x > LEFT and x + 15 + 7 * len(name) > WIDTH - RIGHT:
            x, y, rows = float(LEFT), y + 18, rows + 1
        parts.append(tag("rect", class_=f"bar c{place % 8}", x=x, y=y - 9, width=10, height=10))
        parts.append(_text("tick", name, x + 15, y, "start"))
        x += 32 + 7 * len(name)
    return Markup("").join(parts), rows


def _style() -> str:
    light, dark = (
        "".join(f".c{n} {{ --c: {colour}; }} " for n, colour in enumerate(table)) for table in (COLOURS, DARK)
    )
    return (
        ".page { fill: #ffffff; } text { font: 12px system-ui, sans-serif; fill: #5a6673; } "
        ".title { font-size: 14px; font-weight: 600; fill: #1a2027; } .value { font-size: 11px; } "
        ".grid { stroke: #e2e6eb; stroke-width: 1; } .bar, .dot { fill: var(--c); } "
        f".line {{ fill: none; stroke: var(--c); stroke-width: 2; }} {light}"
        "@media (prefers-color-scheme: dark) { .page { fill: #101418; } text { fill: #9aa7b4; } "
        f".title {{ fill: #e6ebf0; }} .grid {{ stroke: #2a323b; }} {dark}}}"
    )
