"""The program as a process: exit codes, streams, signals, readers that leave."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import m27quant as package
from m27quant.cli.app import main
from tests.cli.conftest import Run

# Scripts rely on these numbers: a change here is a change of the contract in docs/cli.md.
EXIT_CODES = {
    "findings": (1, "findings"),
    "calibration": (1, "calibration"),
    "usage": (2, "usage"),
    "recipe": (2, "recipe"),
    "checkpoint": (3, "checkpoint"),
    "environment": (4, "environment"),
    "disk full": (4, "environment"),
    "memory": (4, "environment"),
    "output": (5, "output"),
    "bug": (70, "bug"),
    "base": (70, "bug"),
    "other system error": (70, "bug"),
    "interrupted": (130, "interrupted"),
    "keyboard": (130, "interrupted"),
    "abort": (130, "interrupted"),
}


def start(repository: Path, *args: str, **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.raising", *args],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite in the background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def test_the_table_names_every_fault() -> None:
    from tests.cli.raising import FAULTS

    assert set(EXIT_CODES) | {"terminated"} == set(FAULTS)


@pytest.mark.parametrize("name", EXIT_CODES)
def test_exit_codes(name: str, repository: Path) -> None:
    code, kind = EXIT_CODES[name]
    assert finish(human := start(repository, "fail", name))[:2] == (code, "")
    status, stdout, stderr = finish(start(repository, "fail", name, "--json"))
    document = json.loads(stderr)
    assert (status, stdout, human.returncode) == (code, "", code)
    assert document["schema_version"] == 1
    assert set(document["error"]) == {"message", "hint", "exit_code", "kind"}
    assert (document["error"]["exit_code"], document["error"]["kind"]) == (code, kind)


def test_an_error_is_a_line_and_its_hint(repository: Path) -> None:
    _, stdout, stderr = finish(start(repository, "fail", "checkpoint"))
    assert stdout == ""
    assert stderr == "error: [/red]\\x1b[2J.safetensors: truncated\n\nhint: download it again\n"


def test_a_bug_shows_its_traceback_only_when_asked(repository: Path) -> None:
    _, _, plain = finish(start(repository, "fail", "bug"))
    assert plain.startswith("error: internal error, a bug in m27quant: ZeroDivisionError: division by zero\n")
    assert "Traceback" not in plain
    debug = {**os.environ, "M27QUANT_DEBUG": "1"}
    _, _, full = finish(start(repository, "fail", "bug", env=debug))
    assert full.startswith("Traceback (most recent call last):\n")
    assert "raising.py" in full
    _, _, document = finish(start(repository, "fail", "bug", "--json", env=debug))
    assert "raising.py" in json.loads(document)["error"]["traceback"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals(signum: signal.Signals, repository: Path) -> None:
    process = start(repository, "wait")
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signum)
    assert finish(process) == (128 + signum, "", f"interrupted: stopped by {signum.name}\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_can_be_resumed_says_how(signum: signal.Signals, repository: Path) -> None:
    # With a buffered stderr, which the handler may find in the middle of a write.
    process = start(repository, "wait", "--resumable", env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert process.stderr is not None
    assert [process.stderr.readline() for _ in range(2)] == ["ready\n", "steady\n"]
    process.send_signal(signum)
    code, stdout, stderr = finish(process)
    assert (code, stdout) == (128 + signum, "")
    assert stderr.endswith(
        f"interrupted: stopped by {signum.name}; what was finished is kept\n\n"
        "hint: continue with: m27quant ... --resume\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("mode", [[], ["--json"]])
def test_a_reader_that_leaves_ends_the_program_quietly(
    mode: list[str], unbuffered: str, repository: Path
) -> None:
    process = start(repository, "flood", *mode, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()


def test_help_too_ends_quietly_when_nobody_reads_it(m27quant: Run) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "m27quant", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_the_surroundings_fault() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "m27quant", "env", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode == 4
    assert json.loads(process.stderr)["error"]["kind"] == "environment"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--no-such-option"], "No such option: --no-such-option (Possible options: "),
        (["no-such-command"], "No such command 'no-such-command'."),
        (["evn"], "No such command 'evn'. Did you mean 'env'?"),
        (["env", "extra"], "Got unexpected extra argument(s) (extra)"),
    ],
)
def test_usage_errors(args: list[str], says: str, m27quant: Run) -> None:
    human = m27quant(*args)
    assert (human.returncode, human.stdout) == (2, "")
    assert human.stderr.startswith(f"error: {says}")
    assert "\n\nhint: see `m27quant" in human.stderr
    machine = m27quant(*args, "--json")
    assert machine.returncode == 2
    assert json.loads(machine.stderr)["error"]["kind"] == "usage"


def test_no_arguments_show_the_help_as_a_mistake(m27quant: Run) -> None:
    process = m27quant()
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("Usage: m27quant")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, m27quant: Run) -> None:
    process = m27quant(flag)
    assert (process.returncode, process.stdout, process.stderr) == (
        0,
        f"m27quant {package.__version__}\n",
        "",
    )


def test_python_dash_m_is_the_same_program(m27quant: Run) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "m27quant", "--help"], capture_output=True, text=True, check=True
    )
    assert process.stdout == m27quant("--help").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, m27quant: Run) -> None:
    shown = m27quant("--show-completion", shell, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert shown.returncode == 0
    assert "_M27QUANT_COMPLETE" in shown.stdout
    asked = m27quant(
        env={
            "_M27QUANT_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": "m27quant en",
            "COMP_CWORD": "1",
            "_TYPER_COMPLETE_ARGS": "m27quant en",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
    )
    assert "env" in asked.stdout


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_an_ascii_terminal_shows_escapes(locale: dict[str, str], m27quant: Run) -> None:
    process = m27quant("gr\u00fc\u00df", env=locale)
    assert process.returncode == 2
    assert process.stderr.isascii()


def test_a_stdout_without_a_buffer_stays_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever calls `main` from Python goes on with it."""
    with (tmp_path / "out").open("wb", buffering=0) as raw:
        theirs = io.TextIOWrapper(raw, write_through=True)
        monkeypatch.setattr(sys, "stdout", theirs)
        assert main(["--version"]) == 0
        monkeypatch.undo()
        gc.collect()
        theirs.write("more")
    assert (tmp_path / "out").read_text().endswith("more")
