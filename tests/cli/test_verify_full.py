"""`m27quant verify --full [--source MODEL]` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from m27quant.cli.app import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, stdout and stderr of `m27quant verify ...`."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main(["verify", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_full_and_source(nvfp4: Path, verify: Call, repository: Path) -> None:
    tiny = repository / "examples/tiny-m27"
    code, out, err = verify(nvfp4, "--full", "--source", tiny, "--fail-on", "warning", "--json", "--offline")
    assert code == 0, err
    facts = json.loads(out)["facts"]
    assert facts["source"]["exact"] == facts["source"]["matrices"] > 0
    assert facts["source"]["other_tensors_different"] == 0
    code, out, err = verify(nvfp4, "--full")
    assert (code, "level" in out) == (0, True)
    assert "verify, 0.0%" in err  # progress, as lines where there is no terminal


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quick", "--full"), "exclude each other"),
        (("--source", "x/y"), "--full"),
        (("--full", "--revision", "main"), "--source"),
    ],
)
def test_options_that_do_not_go_together(
    nvfp4: Path, verify: Call, options: tuple[str, ...], words: str
) -> None:
    code, out, err = verify(nvfp4, *options)
    assert (code, out) == (2, "")
    assert words in err


def test_a_source_that_is_none_is_named(nvfp4: Path, verify: Call, tmp_path: Path) -> None:
    code, out, err = verify(nvfp4, "--full", "--source", tmp_path / "nowhere")
    assert (code, out) == (3, "")
    assert "nowhere" in err
