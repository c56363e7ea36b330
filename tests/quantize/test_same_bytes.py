"""Same inputs, same bytes: in another process, with other hash seeds, with rows in memory or on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import m27quant.prepare
from m27quant.calib.memory import MemoryPlan, plan_memory
from tests.checkpoints import read_tensors
from tests.quantize.models import SHAPES, Model, quantized, random_model, same_bytes
from tests.tolerance import AMAX_BF16_STEPS, bf16_steps

LOG = ".m27quant/run.log"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the log, which carries times."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found.pop(LOG)
    return found


def assert_same_files(a: Path, b: Path) -> None:
    one, two = files(a), files(b)
    assert set(one) == set(two)
    assert [name for name in one if one[name] != two[name]] == []
    assert len(one) > 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["gqa2"])


@pytest.fixture(scope="module")
def reference(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other runs must reproduce."""
    return quantized(model, tmp_path_factory.mktemp("reference") / "out")


def planned(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[MemoryPlan]:
    """Let every run have a memory plan with `changes`; returns the plans that were handed out."""
    given: list[MemoryPlan] = []

    def plan(*args: Any, **kwargs: Any) -> MemoryPlan:
        given.append(replace(plan_memory(*args, **kwargs), **changes))
        return given[-1]

    monkeypatch.setattr(m27quant.prepare, "plan_memory", plan)
    return given


def test_the_same_call_twice(model: Model, reference: Path, tmp_path: Path) -> None:
    assert_same_files(reference, quantized(model, tmp_path / "again"))


def test_other_processes_with_other_hash_seeds(model: Model, reference: Path, tmp_path: Path) -> None:
    rows = model.write_rows(tmp_path / "rows.jsonl")
    begun = []
    for seed in ("1", "2"):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        command = [sys.executable, "-m", "m27quant", "quantize", str(model.folder), "out", "--dataset", str(rows),
                   "--num-samples", str(len(model.rows)), "--device", "cpu", "-q"]  # fmt: skip
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        begun.append(subprocess.Popen(command, cwd=folder, env=environment))
    assert [process.wait(timeout=120) for process in begun] == [0, 0]
    assert_same_files(tmp_path / "seed1" / "out", tmp_path / "seed2" / "out")
    assert_same_files(reference, tmp_path / "seed1" / "out")


@pytest.mark.parametrize("rows_in_memory", [True, False])
@pytest.mark.parametrize("expert_group", [1, 3, 8])
def test_memory_decides_where_things_are_and_not_what_they_are(
    rows_in_memory: bool,
    expert_group: int,
    model: Model,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = planned(monkeypatch, rows_in_memory=rows_in_memory, expert_group=expert_group)
    assert_same_files(reference, quantized(model, tmp_path / "out"))
    assert [(p.rows_in_memory, p.expert_group) for p in given] == [(rows_in_memory, expert_group)]


def test_natural_coverage_does_not_depend_on_memory_either(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = quantized(model, tmp_path / "wide", moe_calib="natural")
    planned(monkeypatch, rows_in_memory=False, expert_group=1)
    assert_same_files(wide, quantized(model, tmp_path / "narrow", moe_calib="natural"))


def test_other_chunks_may_move_a_range_by_one_step(
    model: Model, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A very small budget shrinks chunks, and a product's last bit may depend on how many rows it has."""
    planned(monkeypatch, chunk_tokens=1)
    a, b = read_tensors(reference), read_tensors(quantized(model, tmp_path / "out"))
    assert set(a) == set(b)
    for name in a:
        if name.endswith(("input_scale", "k_scale", "v_scale")):
            assert bf16_steps(float(a[name]), float(b[name])) <= AMAX_BF16_STEPS, name
        else:
            assert same_bytes(a[name], b[name]), name
