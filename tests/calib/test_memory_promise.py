"""`--max-memory` is a promise: measured from outside, on a model that would not fit otherwise."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.synthetic import Size, write_model, write_rows
from benchmarks.watch import Watched, watch
from m27quant.cli.units import parse_size

SIZE = Size(
    num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=2, hidden_size=1024, intermediate_size=512,
    num_attention_heads=16, num_key_value_heads=2, head_dim=64, rotary_dim=32, vocab_size=512,
)  # fmt: skip
ROWS, LENGTH = 40, 1024
HIDDEN_BYTES = 2 * ROWS * LENGTH * SIZE.hidden_size * 2
"""Both sets of rows: 168 MB, which a tight budget has no room for."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("promise") / "model", SIZE)
    write_rows(folder.parent / "rows.jsonl", rows=ROWS, length=LENGTH, vocab_size=SIZE.vocab_size)
    return folder


def quantize(model: Path, out: Path, budget: str, *options: str) -> Watched:
    rows = model.parent / "rows.jsonl"
    command = ["quantize", str(model), str(out), "--dataset", str(rows), "--device", "cpu", *options]
    # one thread: tests run side by side
    return watch(
        [sys.executable, "-m", "m27quant", *command, "--max-memory", budget, "--json", "--no-progress"],
        env={"OMP_NUM_THREADS": "1"},
    )


def planned(out: Path) -> str:
    return (out / ".m27quant" / "run.log").read_text()


def test_too_little_is_refused_and_what_is_asked_for_suffices(model: Path, tmp_path: Path) -> None:
    refused = quantize(model, tmp_path / "out", "64MiB")
    assert refused.returncode == 4
    assert not (tmp_path / "out").exists()
    message = json.loads(refused.stderr.splitlines()[-1])["error"]["message"]
    needed = re.search(r"--max-memory 0\.06 GiB is too little: .* needs (\d\.\d GiB)", message)
    assert needed is not None, message

    tight_budget = needed[1].replace(" ", "")
    tight = quantize(model, tmp_path / "tight", tight_budget)
    assert tight.returncode == 0, tight.stderr
    assert "rows_in_memory=False" in planned(tmp_path / "tight")
    assert tight.peak_tree_bytes <= parse_size(tight_budget)

    ample = quantize(model, tmp_path / "ample", "8GiB")
    assert ample.returncode == 0, ample.stderr
    assert "rows_in_memory=True" in planned(tmp_path / "ample")
    assert ample.peak_tree_bytes > tight.peak_tree_bytes + HIDDEN_BYTES / 2, "spilling saves what it should"
    expected = int(planned(tmp_path / "ample").partition("peak_bytes=")[2].partition(",")[0])
    assert expected / 1.5 < ample.peak_tree_bytes <= expected

    shards = [json.loads(run.stdout)["shards"] for run in (tight, ample)]
    assert shards[0] == shards[1], "a budget decides where rows are kept, never what comes out"


@pytest.mark.parametrize("method", ["mse", "awmse", "gptq"])
def test_recipes_that_search_keep_it_too(method: str, model: Path, tmp_path: Path) -> None:
    """Where as little is to be had as the plan asks for: what statistics and factors take is in it."""
    recipe = ("--recipe", f"nvfp4_experts_only_{method}-fp8_kv", "--num-samples", "4")
    run = quantize(model, tmp_path / "out", "0.7GiB", *recipe)
    assert run.returncode == 0, run.stderr
    expected = int(planned(tmp_path / "out").partition("peak_bytes=")[2].partition(",")[0])
    assert run.peak_tree_bytes <= expected <= parse_size("0.7GiB")
