"""The benchmark itself, on a tiny model: all of its parts run, agree with each other, and are written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layer, machine, packing, quantize
from benchmarks.synthetic import TINY, Size, model_bytes, require_room, write_model, write_rows
from m27quant.checkpoint.config import parse_config
from m27quant.checkpoint.layout import check_layout
from m27quant.cli.units import parse_size
from tests.threads import one_thread as one_thread

ARGUMENTS = ("--tiny", "--rows", "2", "--length", "16", "--layer-tokens", "64", "--rounds", "1")
CPU = torch.device("cpu")


def test_all_parts_run_and_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    results = quantize.main([*ARGUMENTS, "--max-memory", "4GiB", "--save"])
    (run,) = results["run"]["budgets"]
    assert run["kept"]
    assert 100 * 2**20 < run["peak_rss_bytes"] <= run["peak_with_children_bytes"] < parse_size("4GiB")
    assert len(run["layer_seconds"]) == TINY.num_hidden_layers
    per_expert = 3 * 3  # w1, w2, w3: weight, weight_scale, weight_scale_2
    assert results["run"]["tensors_equal_to_modelopt"] == TINY.num_hidden_layers * 3 * per_expert
    assert set(results["pack"]["times_modelopt"]) <= set(results["pack"]["fp8_gb_per_s"])
    assert all(rate > 0 for rate in results["pack"]["fp8_gb_per_s"].values())
    assert 0 < results["layer"]["share_of_peak"] < 1.5

    said = capsys.readouterr().out
    assert "all equal" in said
    assert "kept: peak" in said
    files = sorted(tmp_path.joinpath("results").iterdir())
    assert [f.suffix for f in files] == [".json", ".md"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(results))
    page = files[1].read_text()
    assert "## Packing" in page
    for secret in (str(tmp_path), str(Path.home()), machine.os.uname().nodename):
        assert secret not in files[0].read_text() + page
    assert not list(tmp_path.glob("m27quant-benchmark-*")), "the model is gone"


def test_one_part_alone() -> None:
    results = quantize.main([*ARGUMENTS, "--part", "layer"])
    assert "layer" in results
    assert not {"run", "pack"} & set(results)


def test_other_bytes_than_modelopts_give_no_times(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", TINY)
    out = tmp_path / "out"
    rows = write_rows(tmp_path / "rows.jsonl", rows=2, length=16, vocab_size=TINY.vocab_size)
    quantize.run_command(model, out, rows, "4GiB", "cpu")
    assert packing.compare_with_modelopt(model, out) > 0
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    at, _ = json.loads(data[8:begin])[name]["data_offsets"]
    data[begin + at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit, match=r"w1\.weight differs"):
        packing.compare_with_modelopt(model, out)


def test_a_command_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed with"):
        quantize.run_command(tmp_path / "absent", tmp_path / "out", tmp_path / "rows", "4GiB", "cpu")


def test_extrapolation_is_plain_arithmetic_and_says_so() -> None:
    results: dict[str, Any] = {
        "pack": {"fp8_gb_per_s": {"read, pack, write, made durable": 2.0, "modelopt (BF16 given)": 0.05}},
        "limits": {"disk_read_gb_per_s": 1.0},
        "layer": {"flop_per_s": 1e12},
    }
    found = quantize.extrapolate(Size(), results)
    gigabytes = 3 * 3072 * 1536 * 256 * 62 / 1e9
    assert found["packing_seconds"] == pytest.approx(gigabytes / 2, abs=0.1)
    assert found["modelopt_packing_seconds"] == pytest.approx(gigabytes / 0.05, abs=0.1)
    assert found["calibration_pflop"] == pytest.approx(162.6, abs=0.1)
    assert "not a measurement" in found["what"]


def test_flops_are_those_that_torch_counts() -> None:
    """All but the attention's core, which torch does not count on a CPU: 4 products' worth per pair, half of them."""
    c = parse_config(TINY.config())
    weights = layer._Weights(c, CPU)
    with FlopCounterMode(display=False) as counted:
        layer._run(c, weights, [32, 32], 64, CPU)
    core = 4 * c.q_size * 32 / 2 * 64
    assert counted.get_total_flops() == layer.flops(TINY, 64, 32) - core


def test_the_synthetic_model_is_the_official_layout_and_always_the_same(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a", TINY, shard_bytes=300_000)
    again = write_model(tmp_path / "b", TINY, shard_bytes=300_000)
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    assert all((first / f).read_bytes() == (again / f).read_bytes() for f in files)
    shards = [f for f in files if f.endswith(".safetensors")]
    assert len(shards) > 2
    assert shards[0] == f"model-00000-of-{len(shards) + 5:05d}.safetensors"
    with packing.open_source(first) as source:
        assert check_layout(source) == []
        assert source.total_bytes < model_bytes(TINY) + 2**20
    other = write_model(tmp_path / "c", TINY, seed=1, shard_bytes=300_000)
    assert (other / shards[0]).read_bytes() != (first / shards[0]).read_bytes()


def test_full_width_is_m27s() -> None:
    assert model_bytes(Size()) == pytest.approx(7.4e9, rel=0.02)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="GB needed"):
        require_room(tmp_path / "not" / "there", 2**60)
    assert not (tmp_path / "not").exists()
