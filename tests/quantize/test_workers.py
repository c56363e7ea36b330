"""--num-processes: this process and workers that it starts, with the bytes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import m27quant.workers
from m27quant.cli.app import main
from m27quant.errors import UsageError
from m27quant.prepare import Options
from m27quant.workers import count_of_ranks, device_of, working_together
from tests.faults.harness import tree
from tests.quantize.models import SHAPES, quantized, random_model


def test_two_processes_give_the_bytes_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = random_model(tmp_path, SHAPES["gqa1"])
    whole = quantized(model, tmp_path / "one" / "out")
    rows = str(tmp_path / "one" / "rows.jsonl")
    argv = ["quantize", str(model.folder), str(tmp_path / "two"), "--dataset", rows, "--num-samples", "7"]
    threads = torch.get_num_threads()
    try:
        code = main([*argv, "--device", "cpu", "--num-processes", "2", "--no-progress"])
    finally:
        torch.set_num_threads(threads)
    said = capfd.readouterr()
    assert code == 0, said.err
    assert tree(tmp_path / "two") == tree(whole)
    assert said.out.startswith("done")
    assert said.err.count("source: ") == 1


def test_a_worker_that_cannot_begin_ends_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(m27quant.workers.sys, "executable", "/bin/false")
    argv = [
        "quantize",
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "--num-processes",
        "2",
        "--no-progress",
    ]
    assert main([*argv, "--device", "cpu"]) == 4


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "--num-processes beside torchrun"),
        ({}, {"device": "cuda"}, "2 processes on --device cuda, with 0 visible GPUs"),
    ],
)
def test_what_cannot_be(
    environment: dict[str, str], options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with (
        pytest.raises(UsageError, match=said),
        working_together("model", Path("out"), Options(**options), 2, lambda: None),
    ):
        pass


def test_all_visible_gpus_are_taken_one_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    counts = {
        device: count_of_ranks(Options(device=device), None) for device in ("auto", "cuda", "cuda:1", "cpu")
    }
    assert counts == {"auto": 4, "cuda": 4, "cuda:1": 1, "cpu": 1}
    assert [device_of(device, 3) for device in ("auto", "cuda", "cpu")] == ["cuda:3", "cuda:3", "cpu"]
