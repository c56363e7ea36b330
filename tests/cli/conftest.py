"""Ways to call the program: its sink alone in every mode, or the installed program as a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from m27quant.cli.output import Mode, Output

Said = tuple[str, str]
"""What went to stdout and what to stderr."""

PROGRAM = Path(sys.executable).with_name("m27quant")


class Check(Protocol):
    def __call__(self, call: Callable[[Output], None], *, human: Said, json: Said, quiet: Said) -> None: ...


class Run(Protocol):
    def __call__(
        self, *args: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]: ...


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def said(call: Callable[[Output], None], mode: Mode) -> Said:
    stdout, stderr = io.StringIO(), io.StringIO()
    call(Output(mode, stdout=stdout, stderr=stderr))
    return stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def check() -> Check:
    """One call, all modes: what each of the three writes to stdout and to stderr."""

    def compare(call: Callable[[Output], None], *, human: Said, json: Said, quiet: Said) -> None:
        assert said(call, Mode.HUMAN) == human
        assert said(call, Mode.JSON) == json
        assert said(call, Mode.QUIET) == quiet

    return compare


@pytest.fixture
def m27quant() -> Run:
    """The installed program as a process."""

    def run(*args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *args],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            env={**os.environ, **(env or {})},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def nvfp4(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-m27 quantized with a few rows; to be read only."""
    from m27quant.quantize import quantize_checkpoint

    tiny, out = repository / "examples/tiny-m27", tmp_path_factory.mktemp("nvfp4") / "tiny-m27"
    rows = tiny / "calibration.jsonl"
    quantize_checkpoint(str(tiny), out, dataset=str(rows), num_samples=8, seq_len=64, device="cpu")
    return out
