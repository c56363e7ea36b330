"""Percentiles and headroom of input ranges: against a sort, whatever the chunks, and from options to bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import m27quant.calib.memory
from m27quant.calib.input_ranges import BlockMaxima, InputRange
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.errors import UsageError
from tests.checkpoints import Shape, read_tensors
from tests.quantize.models import SHAPES, Model, quantized, random_model, same_bytes

CPU = torch.device("cpu")
REPORT = "quantization_report.json"


@pytest.fixture(scope="module")
def config() -> M2Config:
    config = parse_config(Shape(num_local_experts=2).config())
    return replace(config, hidden_size=32, intermediate_size=48)


def counted(config: M2Config, h: torch.Tensor, acts: list[torch.Tensor], chunk: int) -> BlockMaxima:
    found = BlockMaxima(config, CPU)
    for part in torch.split(h, chunk):
        found.add_inputs(part)
    for expert, act in enumerate(acts):
        for part in torch.split(act, chunk):
            found.add(expert, part[:0], part, part[:0])
    return found


def expected(tensors: list[torch.Tensor], wanted: InputRange) -> tuple[float, torch.Tensor]:
    """The range by sorting, and every block's largest value."""
    blocks = torch.cat([x.double().abs().view(-1, 16).amax(1) for x in tensors])
    blocks = blocks[blocks > 0].sort().values
    return wanted.headroom * float(blocks[math.ceil(len(blocks) * wanted.percentile / 100) - 1]), blocks


@pytest.mark.parametrize("percentile", [100.0, 99.0, 50.0, 0.001])
@pytest.mark.parametrize("headroom", [1.0, 0.5, 3.0])
def test_against_sorted_blocks(config: M2Config, percentile: float, headroom: float) -> None:
    torch.manual_seed(0)
    wanted = InputRange(headroom, percentile)
    h = torch.randn(700, 32).bfloat16()
    h[5:9] = 0
    acts = [(torch.randn(700, 48) * scale).bfloat16() for scale in (1e-30, 1e20)]
    limits = counted(config, h, acts, 700).limits(wanted, shared=False)
    w13, blocks = expected([h], wanted)
    assert limits.w13 == w13
    assert limits.saturated["w13"] == pytest.approx(float((blocks > w13).double().mean()), rel=1e-5)
    assert limits.w2 == [expected([act], wanted)[0] for act in acts]
    above = sum(int((expected([act], wanted)[1] > v).sum()) for act, v in zip(acts, limits.w2, strict=True))
    assert limits.saturated["w2"] == pytest.approx(above / (2 * 700 * 3), rel=1e-5)
    together = counted(config, h, acts, 700).limits(wanted, shared=True)
    assert together.w2 == [expected(acts, wanted)[0]] * 2
    assert counted(config, h, acts, 9).limits(wanted, shared=False) == limits


def test_an_expert_without_tokens_has_no_range_and_bad_values_do_not_count(config: M2Config) -> None:
    act = torch.ones(4, 48).bfloat16()
    act[0, 0], act[1, 20], act[2, 40] = float("nan"), float("inf"), -float("inf")
    limits = counted(config, torch.zeros(4, 32).bfloat16(), [act, act[:0]], 4).limits(
        InputRange(2.0), shared=False
    )
    assert (limits.w13, limits.w2) == (0.0, [2.0, 0.0])
    assert limits.saturated == {"w13": 0.0, "w2": 0.0}


@pytest.mark.parametrize(
    "values", [(0.0, 100.0), (math.nan, 100.0), (math.inf, 100.0), (1.0, 0.0), (1.0, 100.5)]
)
def test_what_is_no_range_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="--input-scale"):
        InputRange(*values)


# ---- from options to bytes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["gqa1"])


@pytest.fixture(scope="module")
def plain(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(model, tmp_path_factory.mktemp("plain") / "out")


def report(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return document


def test_headroom_is_a_factor_of_input_scales_alone(model: Model, plain: Path, tmp_path: Path) -> None:
    one, two = read_tensors(plain), read_tensors(quantized(model, tmp_path / "out", input_scale_headroom=2.0))
    for name, tensor in one.items():
        twice = tensor * 2 if name.endswith("input_scale") else tensor
        assert same_bytes(twice, two[name]), name
    found = report(tmp_path / "out")
    assert found["calibration"]["input_range"] == {"headroom": 2.0, "percentile": 100.0}
    assert [layer["saturated_inputs"] for layer in found["layers"]] == [{"w13": 0.0, "w2": 0.0}] * 2
    assert "input_range" not in report(plain)["fingerprint"] | report(plain)["calibration"]
    assert "saturated_inputs" not in report(plain)["layers"][0]


@pytest.mark.parametrize("moe_calib", ["full", "natural"])
def test_a_percentile_narrows_and_says_what_saturates(
    moe_calib: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m27quant.calib.memory, "CHUNK_TOKENS", {"cpu": 40})
    common: dict[str, Any] = {"moe_calib": moe_calib}
    one = read_tensors(quantized(model, tmp_path / "max" / "out", **common))
    out = quantized(model, tmp_path / "p" / "out", input_scale_percentile=95.0, **common)
    two = read_tensors(out)
    for name, tensor in one.items():
        narrower = name.endswith("input_scale")
        assert bool(two[name] < tensor) if narrower else same_bytes(two[name], tensor), name
    for layer in report(out)["layers"]:
        assert all(0.03 < share <= 0.05 for share in layer["saturated_inputs"].values())
    with pytest.raises(UsageError):  # the journal is of another range
        quantized(model, out, resume=True, **common)


def test_ranges_for_another_run_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration and packing in one run"):
        quantized(model, tmp_path / "out", input_scale_percentile=99.0, calibrate_only=True)
