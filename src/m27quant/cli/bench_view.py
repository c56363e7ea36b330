"""A benchmark on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from m27quant.cli.output import clean

if TYPE_CHECKING:
    from m27quant.bench.render import Grid
    from m27quant.bench.result import BenchResult


def tables(result: BenchResult) -> RenderableType:
    """Every table with its title, then what is to be said of them."""
    from m27quant.bench.render import conditions, grids, remarks

    heading = result.subject if result.drafter is None else f"{result.subject} with {result.drafter}"
    parts: list[RenderableType] = [Text(clean(heading), style="bold"), Text(clean(conditions(result)))]
    for index, grid in enumerate(grids(result)):
        parts += [Text(""), *([Text(grid.title, style="bold")] if index else []), _table(grid)]
    said = [Text(clean(remark)) for remark in remarks(result)]
    return Group(*parts, *([Text("")] if said else []), *said)


def _table(grid: Grid) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(grid.headings):
        justify = "left" if index in (0, 2) else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold")  # type: ignore[arg-type]  # of Rich's words
    for row in grid.rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table
