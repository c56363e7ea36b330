"""The command for each engine, GPU, tensor-parallel size and drafter at M2.7's full size, as golden/ has it.

`python -m tests.serve.test_golden` writes the files anew; read what changed before you commit it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from m27quant.checkpoint.hub import Location
from m27quant.errors import FindingsError
from m27quant.serve import launch
from m27quant.serve.launch import LaunchOptions, plan_launch
from m27quant.verify.collect import Findings
from m27quant.verify.configs import read_configs
from m27quant.verify.drafter import check_drafter
from m27quant.verify.engines import ENGINES, Engine
from m27quant.verify.findings import VerifyResult
from m27quant.verify.serving import Serving, check_serving
from m27quant.verify.view import View
from tests.serve import full_size

GOLDEN = Path(__file__).with_name("golden")
GPUS = ("b200", "rtx-pro-6000", "gb10", "h200")
SIZES = (1, 2, 4, 8)
DRAFTERS = ("none", "dflash", "eagle3")


def write_models(folder: Path) -> Path:
    full_size.write_configs(folder / "m27")
    full_size.write_drafter(folder / "dflash", full_size.DFLASH)
    full_size.write_drafter(folder / "eagle3", full_size.EAGLE3)
    return folder


def quickly(
    location: Location, *, engine: Engine, serving: Serving, drafter: Path | None, level: str
) -> VerifyResult:
    """Of a verification what differs between rows of the table: 191,211 headers are the same in all 96."""
    view, found = View(folder=location.folder), Findings()
    read_configs(view, Findings())
    assert view.config is not None
    check_serving(view, found, serving, (engine,))
    if drafter is not None:
        check_drafter(drafter, view.config, found, values=False)
    of_engine = (f for f in found.finish() if not f.check.engines or engine in f.check.engines)
    return VerifyResult(checkpoint="m27", level=level, findings=tuple(of_engine))


def table(engine: Engine, folder: Path) -> Iterator[str]:
    with mock.patch.object(launch, "verify_checkpoint", quickly):
        for gpu in GPUS:
            for tp in SIZES:
                for drafter in DRAFTERS:
                    yield f"## {gpu}, tp {tp}, drafter {drafter}\n{command(engine, folder, gpu, tp, drafter)}\n"


def command(engine: Engine, folder: Path, gpu: str, tp: int, drafter: str) -> str:
    wanted = LaunchOptions(
        engine=engine, gpu=gpu, tp=tp, level="quick",
        drafter=None if drafter == "none" else str(folder / drafter),
    )  # fmt: skip
    try:
        planned = plan_launch(str(folder / "m27"), wanted)
    except FindingsError as fault:
        return f"refused: {fault.message}"
    lines = [planned.shell().replace(" \\\n ", ""), *(f"note: {note}" for note in planned.notes)]
    lines += [f"finding: {f.check.code}" for f in planned.findings]
    return "\n".join(lines).replace(str(folder), "/models")


@pytest.fixture(scope="module")
def models(m27: Path) -> Path:
    return m27.parent


@pytest.mark.parametrize("engine", ENGINES)
def test_commands_are_the_golden_ones(engine: Engine, models: Path) -> None:
    written = (GOLDEN / f"{engine}.txt").read_text()
    assert "\n".join(table(engine, models)) == written, (
        "run `python -m tests.serve.test_golden` and read the diff"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        here = write_models(Path(name))
        for one in ENGINES:
            (GOLDEN / f"{one}.txt").write_text("\n".join(table(one, here)))
