"""Progress: a bar on a terminal, a line now and then off it, nothing when silent."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time

import pytest

from m27quant.cli.output import Mode, Output
from m27quant.cli.progress import Pace, facts, heading, show
from m27quant.progress import Progress, ignore
from tests.cli.conftest import Terminal

SNAPSHOT = Progress(
    stage="experts",
    fraction=0.25,
    layer=11,
    num_layers=62,
    tokens_per_s=1234.5,
    bytes_per_s=5.2e8,
    rss_bytes=5 << 30,
    device_bytes=70 << 30,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_what_a_snapshot_says() -> None:
    assert heading(SNAPSHOT) == "layer 12/62 experts"
    assert heading(Progress(stage="commit", fraction=1.0)) == "commit"
    assert facts(SNAPSHOT, 3723) == ["ETA 1:02:03", "1,234 tok/s", "0.52 GB/s", "RAM 5.0 GiB", "GPU 70.0 GiB"]
    assert facts(Progress(stage="commit", fraction=1.0), None) == []


def test_time_left_counts_from_what_a_resumed_run_found_done() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now_s += 100
    assert pace.left_s(0.5) is None
    clock.now_s += 10
    assert pace.left_s(0.6) == pytest.approx(40)
    assert pace.left_s(0.4) is None
    assert pace.elapsed_s() == pytest.approx(10)


def test_off_a_terminal_the_first_snapshot_is_told_at_once() -> None:
    stderr = io.StringIO()
    with show(Output(stdout=io.StringIO(), stderr=stderr), clock=Clock()) as listen:
        listen(SNAPSHOT)
        listen(SNAPSHOT)
    assert stderr.getvalue() == (
        "layer 12/62 experts, 25.0%, 1,234 tok/s, 0.52 GB/s, RAM 5.0 GiB, GPU 70.0 GiB, elapsed 0:00\n"
    )


def test_off_a_terminal_life_is_shown_even_if_the_work_is_silent() -> None:
    stderr = io.StringIO()
    with show(Output(stdout=io.StringIO(), stderr=stderr), interval_s=0.01) as listen:
        listen(SNAPSHOT)
        deadline_s = time.monotonic() + 30
        while stderr.getvalue().count("\n") < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert stderr.getvalue().count("layer 12/62 experts, 25.0%") >= 3


def test_the_heartbeat_ends_with_the_work_even_if_that_fails() -> None:
    stderr = io.StringIO()
    with contextlib.suppress(ZeroDivisionError), show(Output(stderr=stderr), interval_s=0.01) as listen:
        listen(SNAPSHOT)
        raise ZeroDivisionError
    said = stderr.getvalue()
    time.sleep(0.05)
    assert stderr.getvalue() == said


def test_json_progress_is_a_json_line() -> None:
    stderr = io.StringIO()
    clock = Clock()
    with show(Output(Mode.JSON, stderr=stderr), clock=clock) as listen:
        listen(SNAPSHOT)
    document = json.loads(stderr.getvalue())
    assert document["schema_version"] == 1
    assert document["progress"]["fraction"] == 0.25
    assert document["progress"]["device_bytes"] == 70 << 30
    assert document["progress"]["eta_s"] is None


@pytest.mark.parametrize(
    ("output", "enabled"),
    [
        (Output(Mode.QUIET, stderr=io.StringIO()), True),
        (Output(Mode.JSON, silent=True, stderr=io.StringIO()), True),
        (Output(stderr=io.StringIO()), False),
    ],
)
def test_silence(output: Output, enabled: bool) -> None:
    with show(output, enabled=enabled) as listen:
        assert listen is ignore


@pytest.mark.parametrize(
    ("width", "shown"), [(40, []), (60, ["0.52 GB/s"]), (120, ["1,234 tok/s", "GPU 70.0 GiB"])]
)
def test_a_terminal_gets_one_line_that_fits(
    width: int, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with show(Output(stdout=stream, stderr=stream)) as listen:
        listen(SNAPSHOT)
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "layer" in line]
    assert lines
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", lines[-1])
    assert len(text) <= width
    assert "25%" in text
    for figure in shown:
        assert figure in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with show(Output(stdout=stream, stderr=stream)) as listen:
        listen(SNAPSHOT)
    assert stream.getvalue().startswith("layer 12/62 experts, 25.0%")
    assert "\x1b" not in stream.getvalue()
