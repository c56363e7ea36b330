"""The table, cell by cell: everything that is compared is asked the same, and in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from m27quant.bench.reading import Reading
from m27quant.bench.requests import BenchOptions, Request, make_requests
from m27quant.bench.result import BenchResult, Cell
from m27quant.bench.tasks import Loaded
from m27quant.errors import EnvironmentFault
from m27quant.progress import Progress, ProgressCallback

MOST_TURNS = 16


class Subject(Protocol):
    """What answers."""

    def run(
        self, requests: Sequence[Request], concurrency: int, watch: Callable[[int, int], None]
    ) -> Reading:
        """Answer all requests, so many at once; `watch` hears of new answers and tokens, and may raise."""


@dataclass(slots=True)
class _Told:
    """Progress over all cells, by requests."""

    total: int
    listen: ProgressCallback
    stop: Callable[[], None]
    done: int = 0
    stage: str = ""

    def __call__(self, answers: int, tokens: int) -> None:
        self.stop()
        self.done += answers
        if answers:
            self.listen(Progress(stage=self.stage, fraction=min(1.0, self.done / self.total)))


def measure(
    result: BenchResult,
    subjects: Mapping[str | None, Subject],
    tasks: Sequence[Loaded],
    options: BenchOptions,
    progress: ProgressCallback,
    stop: Callable[[], None],
    on_cell: Callable[[BenchResult], None],
) -> None:
    """Fill the cells: those of one task and concurrency belong together, and come when all of them are done."""
    rounds = options.repeat
    each = sum(c + rounds * options.count(c) for c in options.concurrency)
    told = _Told(total=each * len(tasks) * len(subjects), listen=progress, stop=stop)
    for task in tasks:
        for concurrency in options.concurrency:
            warm, requests = make_requests(task.conversations, options, concurrency)
            readings: dict[str | None, Reading] = {}
            order = list(subjects)
            for name in order:
                told.stage = f"{task.name}, {concurrency} at once, warm-up"
                subjects[name].run(warm, concurrency, told)
            for part in _parts(requests, concurrency) * rounds:
                for name in order:
                    told.stage = f"{task.name}, {concurrency} at once, {name or 'without drafter'}"
                    reading = subjects[name].run(part, concurrency, told)
                    readings[name] = readings[name] + reading if name in readings else reading
                order.reverse()
            cells = [Cell.of(task.name, concurrency, name, readings[name]) for name in subjects]
            _refuse_silence(cells)
            result.cells += cells
            result.notices += [n for r in readings.values() for n in r.notices if n not in result.notices]
            on_cell(result)


def _parts(requests: Sequence[Request], concurrency: int) -> list[Sequence[Request]]:
    """What is asked of one subject before it is another's turn.

    One at a time requests do not meet, so that turns change often and a machine that slows down slows all alike.
    Several at once are asked in one go: each end of a part would run with fewer in flight.
    """
    if concurrency > 1:
        return [requests]
    size = -(-len(requests) // MOST_TURNS)
    return [requests[begin : begin + size] for begin in range(0, len(requests), size)]


def _refuse_silence(cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.num_errors == cell.num_requests:
            first = max(cell.errors, key=lambda e: cell.errors[e])
            raise EnvironmentFault(
                f"{cell.task}: none of {cell.num_requests} requests was answered: {first}",
                hint="mend that first; nothing was measured",
            )
