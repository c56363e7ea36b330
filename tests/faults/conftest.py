"""A small good checkpoint, copies of it to break, and the program run on them inside this process."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from m27quant.cli.app import main
from tests.checkpoints import Shape, write_checkpoint, write_rows
from tests.faults.harness import Program, Tree, tree

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
def fast_folder() -> Iterator[Path]:
    """A folder in memory, where there is one: many thousand fsyncs are waited for in these tests."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and os.access(shared, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="m27quant-", dir=shared if in_memory else None))
    folder.chmod(0o755)  # tests of permissions run as somebody else
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tmp_path(fast_folder: Path) -> Iterator[Path]:
    """pytest's own, but fast."""
    with tempfile.TemporaryDirectory(dir=fast_folder) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def good(fast_folder: Path) -> Path:
    """A checkpoint that nobody may change."""
    model = write_checkpoint(fast_folder / "model", SMALL)
    for path in model.iterdir():
        path.chmod(0o644)  # safetensors writes for its user alone
    return model


@pytest.fixture(scope="session")
def rows(fast_folder: Path) -> Path:
    """Calibration rows of token ids."""
    return write_rows(fast_folder / "rows.jsonl", vocab_size=SMALL.vocab_size)


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


# -- runs that may be killed -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One quantization: what it reads, what it must give, and the fault points that it passes."""

    model: Path
    rows: Path
    undisturbed: Tree
    passed: tuple[str, ...]
    """Fault points in the order in which they are passed."""

    undisturbed_folder: Path
    """OUT of the run that nobody disturbed."""

    def argv(self, out: Path, *options: str) -> tuple[str, ...]:
        return ("quantize", str(self.model), str(out), "--dataset", str(self.rows), "--no-progress", *options)


@pytest.fixture(scope="session")
def program(repository: Path, fast_folder: Path) -> Iterator[Program]:
    """The program as a process."""
    (fast_folder / "runs").mkdir()
    program = Program(repository, fast_folder / "runs")
    yield program
    program.close()


@pytest.fixture(scope="session")
def case(good: Path, rows: Path, program: Program, fast_folder: Path) -> Case:
    """The small checkpoint, undisturbed."""
    log = fast_folder / "passed"
    case = Case(good, rows, {}, (), fast_folder / "undisturbed")
    assert program.ask({"warm": case.argv(fast_folder / "warm", "-q")}) == {"code": 0}
    env = {"M27QUANT_FAULT": "none", "M27QUANT_FAULT_LOG": str(log)}
    ended = program.run(*case.argv(fast_folder / "undisturbed"), env=env)
    assert ended.code == 0, ended.err
    passed = tuple(log.read_text().split())
    return dataclasses.replace(case, undisturbed=tree(fast_folder / "undisturbed"), passed=passed)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An OUT that does not exist yet."""
    return tmp_path / "out"
