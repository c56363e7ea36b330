"""The sink: one call, all modes; hostile text; narrow, ASCII and colourless terminals."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.text import Text

from m27quant.cli.output import Mode, Output, clean, grid, kind_of
from m27quant.errors import CheckpointError, EnvironmentFault, Interrupted, M27Error, RecipeError
from tests.cli.conftest import Check, Terminal, said

HOSTILE = "[/bad][red]\x1b[31m\x07\u202egpj\udcff\r"
LITERAL = "[/bad][red]\\x1b[31m\\x07\\u202egpj\\udcff\\r"


def test_result(check: Check) -> None:
    check(
        lambda out: out.result({"path": "out", "bytes": 3}, human="out: 3 bytes", quiet="out"),
        human=("out: 3 bytes\n", ""),
        json=('{\n  "schema_version": 1,\n  "path": "out",\n  "bytes": 3\n}\n', ""),
        quiet=("out\n", ""),
    )


def test_result_without_words_for_people_is_pairs(check: Check) -> None:
    check(
        lambda out: out.result({"path": "out", "sizes": [1], "none": None}),
        human=("path   out\nsizes  1\nnone\n", ""),
        json=(
            '{\n  "schema_version": 1,\n  "path": "out",\n  "sizes": [\n    1\n  ],\n  "none": null\n}\n',
            "",
        ),
        quiet=("", ""),
    )


def test_table(check: Check) -> None:
    rows = [{"name": "w1", "bits": 4, "hidden": 0}, {"name": "o_proj", "bits": 16, "hidden": 1}]
    check(
        lambda out: out.table(rows, columns={"name": "NAME", "bits": "BITS"}, key="tensors"),
        human=("NAME    BITS\nw1         4\no_proj    16\n", ""),
        json=(json.dumps({"schema_version": 1, "tensors": rows}, indent=2) + "\n", ""),
        quiet=("w1\no_proj\n", ""),
    )


def test_status(check: Check) -> None:
    check(lambda out: out.status("reading"), human=("", "reading\n"), json=("", ""), quiet=("", ""))


def test_warning(check: Check) -> None:
    check(
        lambda out: out.warning("odd", hint="look"),
        human=("", "warning: odd\nhint: look\n"),
        json=("", '{"schema_version": 1, "warning": {"message": "odd", "hint": "look"}}\n'),
        quiet=("", ""),
    )


def test_hint(check: Check) -> None:
    check(
        lambda out: out.hint("run it again"),
        human=("", "hint: run it again\n"),
        json=("", '{"schema_version": 1, "hint": "run it again"}\n'),
        quiet=("", ""),
    )


def test_error_is_said_in_every_mode(check: Check) -> None:
    text = "error: a.safetensors: truncated\n\nhint: download it again\n"
    document = (
        '{"schema_version": 1, "error": {"message": "a.safetensors: truncated", "hint": "download it again", '
        '"exit_code": 3, "kind": "checkpoint"}}\n'
    )
    check(
        lambda out: out.error(CheckpointError("a.safetensors: truncated", hint="download it again")),
        human=("", text),
        json=("", document),
        quiet=("", text),
    )


def test_json_may_be_silent_too() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    out = Output(Mode.JSON, silent=True, stdout=stdout, stderr=stderr)
    out.warning("odd")
    out.hint("look")
    out.heartbeat("layer 1", {"layer": 0})
    out.result({"ok": True})
    assert stderr.getvalue() == ""
    assert json.loads(stdout.getvalue()) == {"schema_version": 1, "ok": True}


def test_hostile_text_is_literal_everywhere(check: Check) -> None:
    def call(out: Output) -> None:
        out.table([{"name": HOSTILE}], columns={"name": "name"})
        out.warning(HOSTILE)

    human, _, quiet = (said(call, mode) for mode in Mode)
    assert human == (f"name\n{LITERAL}\n", f"warning: {LITERAL}\n")
    assert quiet == (f"{LITERAL}\n", "")
    stdout, stderr = said(call, Mode.JSON)
    assert stdout.isascii()
    assert json.loads(stdout)["rows"] == [{"name": HOSTILE}]
    assert json.loads(stderr)["warning"]["message"] == HOSTILE


def test_clean_keeps_lines() -> None:
    assert clean("a\nb\tc\x00") == "a\nb\\tc\\x00"


def test_json_has_no_nan_and_knows_plain_types() -> None:
    @dataclass
    class Row:
        sqnr_db: float
        path: Path

    stdout, _ = said(lambda out: out.result({"rows": (Row(float("inf"), Path("a/b")),)}), Mode.JSON)
    assert json.loads(stdout)["rows"] == [{"sqnr_db": None, "path": "a/b"}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointError("x"), "checkpoint"),
        (RecipeError("x"), "recipe"),
        (EnvironmentFault("x"), "environment"),
        (Interrupted("x"), "interrupted"),
        (M27Error("x"), "bug"),
    ],
)
def test_kind_is_one_stable_word(error: M27Error, kind: str) -> None:
    assert kind_of(error) == kind


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_folds_and_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    name = "model.layers.61.block_sparse_moe.experts.255.w1.weight"
    Output(stdout=stream, stderr=stream).result({}, human=grid(("tensor", "size"), [(name, 2359296)]))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert name in "".join(line.split("  ")[0].strip() for line in lines[1:])
    assert "2359296" in stream.getvalue()


def test_off_a_terminal_nothing_is_folded_or_padded() -> None:
    name = "n" * 300
    stdout, _ = said(lambda out: out.table([{"a": name, "b": "x"}], columns={"a": "A", "b": "B"}), Mode.HUMAN)
    assert stdout.splitlines()[1] == f"{name}  x"
    assert all(line == line.rstrip() for line in stdout.splitlines())


def test_colour_on_a_terminal_only_and_never_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> str:
        stream = Terminal()
        Output(stdout=stream, stderr=stream).warning("odd")
        return stream.getvalue()

    assert "\x1b[33m" in warn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert warn() == "warning: odd\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert warn() == "warning: odd\n"


def test_a_closed_stderr_stops_no_work_but_a_closed_stdout_does() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if text:
                raise BrokenPipeError
            return 0

    out = Output(stdout=Gone(), stderr=Gone())
    out.status("on")
    out.warning("and on")
    with pytest.raises(BrokenPipeError):
        out.result({}, human=Text("data"))


def test_a_signal_handler_may_speak_in_the_middle_of_a_write() -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    Output(stderr=Busy()).status("stopping")
    Output(Mode.JSON, stderr=Busy()).warning("stopping")


def test_what_is_said_after_stderr_was_closed_is_lost_and_nothing_else() -> None:
    closed = io.StringIO()
    outputs = [Output(stderr=closed), Output(Mode.JSON, stderr=closed)]
    closed.close()
    for output in outputs:
        output.status("late")
        output.warning("late")


def test_log_messages_of_the_package_are_notes(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    logger = logging.getLogger("m27quant.checkpoint")
    Output.open()
    logger.info("quiet")
    logger.warning("loud %s", "x")
    assert capsys.readouterr().err == "warning: loud x\n"
    Output.open(verbose=1)
    logger.info("more")
    logger.debug("most")
    assert capsys.readouterr().err == "more\n"
    Output.open(verbose=2)
    logger.debug("most")
    assert capsys.readouterr().err == "most\n"
