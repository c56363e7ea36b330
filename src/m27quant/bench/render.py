"""The benchmark as tables: the same rows for a terminal and for a model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m27quant.bench.reading import COUNTED
from m27quant.bench.result import BenchResult, Cell, Speed, Spread
from m27quant.errors import escape

NONE = "-"
PLAIN = "none"
"""The setting's name where nothing is drafted."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts; all columns behind the first `num_left` are numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    num_left: int = 3


def grids(result: BenchResult) -> list[Grid]:
    """Speed, acceptance by position, and where the time of a step goes, as far as each was measured."""
    found = [_speed(result), _acceptance(result), _steps(result)]
    return [grid for grid in found if grid.rows]


def _speed(result: BenchResult) -> Grid:
    ratios = {(s.task, s.concurrency, s.setting): s.measured for s in result.speeds()}
    failed = any(cell.num_errors for cell in result.cells)
    headings = ["task", "at once", "drafts", "tokens/s", "speed-up", "tau", "first token", "per token"]
    return Grid(
        "tokens/s",
        headings + (["failed"] if failed else []),
        [
            [
                *_place(cell),
                f"{cell.tokens_per_s:,.1f}",
                _times(ratios.get((cell.task, cell.concurrency, cell.setting or ""))),
                NONE if cell.setting is None or cell.acceptance.tau is None else f"{cell.acceptance.tau:.3f}",
                _ms(cell.ttft_s),
                _ms(cell.itl_s),
                *([f"{cell.num_errors} of {cell.num_requests}"] if failed else []),
            ]
            for cell in result.cells
        ],
    )


def _acceptance(result: BenchResult) -> Grid:
    cells = [c for c in result.cells if c.setting is not None and c.acceptance.stats is not None]
    known = [(c, c.acceptance.stats) for c in cells if c.acceptance.stats is not None]
    most = max((len(stats.histogram) - 1 for _, stats in known), default=0)
    return Grid(
        "drafts accepted: m_accept, their share, and C_k",
        ["task", "at once", "drafts", "m_accept", "accepted", *(f"C_{k}" for k in range(1, most + 1))],
        [
            [
                *_place(cell),
                f"{stats.m_accept:.3f}",
                NONE if stats.acceptance_rate is None else f"{stats.acceptance_rate:.1%}",
                *(f"{c:.3f}" for c in stats.c_k),
                *[NONE] * (most - len(stats.c_k)),
            ]
            for cell, stats in known
            if stats.num_steps
        ],
    )


def _steps(result: BenchResult) -> Grid:
    def row(speed: Speed) -> list[str]:
        times = (speed.decode_s, speed.verify_s, speed.draft_s)
        error = "" if speed.error is None else f" +-{speed.error:.2f}"
        return [
            speed.task,
            str(speed.concurrency),
            speed.setting,
            f"{speed.tau:.3f}",
            *(f"{t * 1e3:.2f}" for t in times if t is not None),
            _times(speed.predicted),
            _times(speed.measured) + error,
        ]

    return Grid(
        "a step in ms: speed-up = tau x decode / (verify + draft)",
        ["task", "at once", "drafts", "tau", "decode", "verify", "draft", "speed-up", "measured"],
        [row(speed) for speed in result.speeds() if speed.predicted is not None],
    )


def remarks(result: BenchResult) -> Iterator[str]:
    """Whose count the acceptance is, the advice, what was noticed: one sentence each."""
    for source in dict.fromkeys(c.acceptance.source for c in result.cells if c.setting is not None):
        yield f"acceptance ({source}): {COUNTED[source]}"
    for cell in result.cells:
        for error, count in cell.errors.items():
            yield f"failed: {cell.task}, {cell.concurrency} at once: {count} of {cell.num_requests}: {error}"
    yield from result.notices
    for advice in result.advice:
        if advice.setting is None:
            yield f"{advice.concurrency} at once: draft nothing; {advice.why}"
        else:
            yield f"{advice.concurrency} at once: take {advice.setting} ({advice.flags}); {advice.why}"
    if not result.complete:
        yield "stopped before the end: what is missing was not measured"


def conditions(result: BenchResult) -> str:
    """What the figures have to be read with, in a line."""
    o, m = result.options, result.machine
    client = m.get("client", m)
    where = ", ".join(client["gpus"]) or f"{client['cpu']}, {client['cpus']} CPUs"
    sampling = "greedy" if not o["temperature"] else f"temperature {o['temperature']:g}"
    thinking = "on" if o["thinking"] else "off"
    if "client" in m:
        where = f"server {result.subject}, asked from {where}"
    kinds = [m[key] for key in ("device", "activations", "kv_cache_dtype") if key in m]
    kind = f", {kinds[0]}, activations {kinds[1]}, KV cache {kinds[2]}" if len(kinds) == 3 else ""
    return (
        f"{where}{kind}; {sampling}, at most {o['max_tokens']:,} tokens, thinking {thinking}, seed {o['seed']}; "
        f"m27quant {client['m27quant']}, torch {client['versions']['torch']}"
    )


def markdown(result: BenchResult) -> str:
    """A section for a model card."""
    lines = [_cards_table(result), "", f"{_safe(conditions(result))}.", ""]
    for grid in grids(result)[1:]:
        lines += [f"{grid.title[0].upper()}{grid.title[1:]}:", "", _markdown_table(grid), ""]
    lines += [f"* {_safe(remark)}" for remark in remarks(result)]
    return "\n".join(lines).rstrip() + "\n"


def _cards_table(result: BenchResult) -> str:
    """A row for each task and setting; tokens/s, speed-up and tau at each concurrency, as the drafters' cards."""
    concurrencies = list(dict.fromkeys(c.concurrency for c in result.cells))
    cells = {(c.task, c.setting, c.concurrency): c for c in result.cells}
    ratios = {(s.task, s.setting, s.concurrency): s.measured for s in result.speeds()}
    headings = ["task", "drafts"]
    headings += [f"{what}, {c} at once" for c in concurrencies for what in ("tokens/s", "speed-up", "tau")]
    rows = []
    for task, setting in dict.fromkeys((c.task, c.setting) for c in result.cells):
        row = [task, setting or PLAIN]
        for concurrency in concurrencies:
            cell = cells.get((task, setting, concurrency))
            tau = cell.acceptance.tau if cell is not None and setting is not None else None
            row += [
                NONE if cell is None else f"{cell.tokens_per_s:,.1f}",
                _times(ratios.get((task, setting or "", concurrency))),
                NONE if tau is None else f"{tau:.3f}",
            ]
        rows.append(row)
    return _markdown_table(Grid("", headings, rows, num_left=2))


def _markdown_table(grid: Grid) -> str:
    rule = ["---"] * grid.num_left + ["---:"] * (len(grid.headings) - grid.num_left)
    rows = [grid.headings, rule, *grid.rows]
    return "\n".join(f"| {' | '.join(_safe(cell) for cell in row)} |" for row in rows)


def _safe(text: str) -> str:
    """Text of a file or a server as text of Markdown."""
    return escape(text, limit=2000).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _place(cell: Cell) -> list[str]:
    return [cell.task, str(cell.concurrency), cell.setting or PLAIN]


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}x"


def _ms(spread: Spread | None) -> str:
    return NONE if spread is None else f"{spread.mean * 1e3:,.1f} ms"


def lines(result: BenchResult) -> Sequence[str]:
    """Bare values for scripts: task, concurrency, setting, tokens/s and tau, ` | ` between them."""
    found = []
    for c in result.cells:
        tau = NONE if c.acceptance.tau is None else f"{c.acceptance.tau:.4f}"
        found.append(" | ".join((*_place(c), f"{c.tokens_per_s:.2f}", tau)))
    return found
