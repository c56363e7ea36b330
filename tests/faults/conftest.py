"""A small good checkpoint, copies of it to break, and the program run on them inside this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from m27quant.cli.app import main
from tests.checkpoints import Shape, write_checkpoint, write_rows

SMALL = Shape(
    hidden_size=48,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=4,
    vocab_size=64,
)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    document: dict[str, Any] | None
    """What --json wrote to stdout."""
    lines: list[dict[str, Any]]
    """What --json wrote to stderr, line by line."""

    @property
    def error(self) -> dict[str, Any]:
        """The one error line."""
        (line,) = (x["error"] for x in self.lines if "error" in x)
        return line

    @property
    def warnings(self) -> list[str]:
        return [x["warning"]["message"] for x in self.lines if "warning" in x]


Quantize = Callable[..., Ended]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody may change."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "model", SMALL)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration rows of token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", vocab_size=SMALL.vocab_size)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint, to be broken."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def quantize(rows: Path, capfd: pytest.CaptureFixture[str]) -> Quantize:
    """`m27quant quantize MODEL OUT ... --json` in this process."""

    def run(model: Path | str, out: Path | str, *options: str) -> Ended:
        capfd.readouterr()
        code = main(["quantize", str(model), str(out), "--dataset", str(rows), "--json", *options])
        said = capfd.readouterr()
        return Ended(
            code,
            json.loads(said.out) if said.out else None,
            [json.loads(line) for line in said.err.splitlines()],
        )

    return run
