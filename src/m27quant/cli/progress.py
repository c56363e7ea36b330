"""How long work looks while it runs: a bar on a terminal, one line every 30 s anywhere else.

with show(output, enabled=not no_progress) as listen:
    quantize_checkpoint(..., progress=listen)
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.text import Text

from m27quant.cli.output import Mode, Output, clean
from m27quant.cli.units import format_duration, format_rate, format_size
from m27quant.progress import Progress, ProgressCallback, ignore

HEARTBEAT_S = 30.0
SHOWN = 8
"""Positions whose accuracy is shown."""

Clock = Callable[[], float]


@contextmanager
def show(
    output: Output, *, enabled: bool = True, clock: Clock = time.monotonic, interval_s: float = HEARTBEAT_S
) -> Iterator[ProgressCallback]:
    """Render the snapshots that the callback gets until the block ends; nothing if silent or disabled."""
    if output.silent or not enabled:
        yield ignore
    elif output.mode is Mode.HUMAN and output.stderr.isatty() and not output.notes.is_dumb_terminal:
        with _bar(output, Pace(clock)) as listen:
            yield listen
    else:
        with _heartbeat(output, Pace(clock), interval_s) as listen:
            yield listen


class Pace:
    """Elapsed time and what is left of it, by a clock that never jumps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s = clock()
        self._first_fraction: float | None = None

    def elapsed_s(self) -> float:
        return self._clock() - self._start_s

    def left_s(self, fraction: float) -> float | None:
        """Seconds to go at the pace since the first snapshot: what a resumed run finds done took no time."""
        if self._first_fraction is None:
            self._first_fraction = fraction
            self._start_s = self._clock()
        done = fraction - self._first_fraction
        return self.elapsed_s() * (1 - fraction) / done if done > 0 else None


def facts(snapshot: Progress, left_s: float | None) -> list[str]:
    """The figures of a snapshot, the most wanted first."""
    found = [f"ETA {format_duration(left_s)}"] if left_s is not None else []
    if snapshot.loss is not None:
        found.append(f"loss {snapshot.loss:.4f}")
    if snapshot.accuracy:
        found.append("acc " + " ".join(f"{share:.0%}" for share in snapshot.accuracy[:SHOWN]))
    if snapshot.tokens_per_s is not None:
        found.append(f"{snapshot.tokens_per_s:,.0f} tok/s")
    if snapshot.bytes_per_s is not None:
        found.append(format_rate(snapshot.bytes_per_s))
    if snapshot.rss_bytes is not None:
        found.append(f"RAM {format_size(snapshot.rss_bytes)}")
    if snapshot.device_bytes is not None:
        found.append(f"GPU {format_size(snapshot.device_bytes)}")
    return found


def heading(snapshot: Progress) -> str:
    """Which layer and which stage: "layer 12/62 experts"."""
    if snapshot.layer is None:
        return snapshot.stage
    of = f"/{snapshot.num_layers}" if snapshot.num_layers is not None else ""
    return f"layer {snapshot.layer + 1}{of} {snapshot.stage}"


class _Field(ProgressColumn):
    """One text of the task, printed literally."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def render(self, task: Task) -> Text:
        return Text(clean(task.fields[self.name]), no_wrap=True, overflow="ellipsis")


@contextmanager
def _bar(output: Output, pace: Pace) -> Iterator[ProgressCallback]:
    bar_width = max(4, min(30, output.notes.width // 5))
    columns = (_Field("heading"), BarColumn(bar_width), _Field("percent"), _Field("facts"))
    with Bar(*columns, console=output.notes, transient=True) as bar:
        task = bar.add_task("", total=1.0, heading="", percent="", facts="")

        def listen(snapshot: Progress) -> None:
            where, percent = heading(snapshot), f"{snapshot.fraction:4.0%}"
            room = output.notes.width - len(where) - bar_width - len(percent) - 3
            figures = _fitting(facts(snapshot, pace.left_s(snapshot.fraction)), room)
            bar.update(task, completed=snapshot.fraction, heading=where, percent=percent, facts=figures)

        yield listen


def _fitting(figures: list[str], room: int) -> str:
    """As many figures, from the first on, as there are columns for."""
    while figures and len("  ".join(figures)) > room:
        figures = figures[:-1]
    return "  ".join(figures)


@contextmanager
def _heartbeat(output: Output, pace: Pace, interval_s: float) -> Iterator[ProgressCallback]:
    """A line at the first snapshot and one every `interval_s` from then on, even if the work falls silent."""
    latest: list[Progress] = []
    ended = threading.Event()

    def say(snapshot: Progress) -> None:
        left_s = pace.left_s(snapshot.fraction)
        parts = [heading(snapshot), f"{snapshot.fraction:.1%}", *facts(snapshot, left_s)]
        elapsed_s = pace.elapsed_s()
        parts.append(f"elapsed {format_duration(elapsed_s)}")
        document = {**dataclasses.asdict(snapshot), "elapsed_s": round(elapsed_s, 3), "eta_s": left_s}
        output.heartbeat(", ".join(parts), document)

    def beat() -> None:
        while not ended.wait(interval_s):
            if latest:
                say(latest[-1])

    def listen(snapshot: Progress) -> None:
        first = not latest
        latest[:] = [snapshot]
        if first:
            say(snapshot)

    thread = threading.Thread(target=beat, name="m27quant-heartbeat", daemon=True)
    thread.start()
    try:
        yield listen
    finally:
        ended.set()
        thread.join()
