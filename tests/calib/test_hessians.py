"""Hessians of experts' inputs against loops in float64, and their scratch files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.calib.hessians import Hessians, LayerHessians, hessians_on_disk
from m27quant.calib.moments import SMOOTHING_TOKENS
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.errors import CalibrationError, EnvironmentFault
from m27quant.kernels.nvfp4_gptq import factorize
from tests.checkpoints import Shape
from tests.tolerance import gram_rtol

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> M2Config:
    shape = Shape(hidden_size=32, intermediate_size=48, num_local_experts=3)
    return replace(parse_config(shape.config()), hidden_size=32, intermediate_size=48)


def chunks(config: M2Config, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Inputs, activations and routed rows of each expert by chunk; none is routed to the last one."""
    torch.manual_seed(1)
    hidden, experts = config.hidden_size, config.num_local_experts
    mixing = torch.randn(config.intermediate_size, config.intermediate_size)
    return [
        {
            "h": (torch.randn(size, hidden) * torch.logspace(-3, 3, hidden)).bfloat16(),
            "act": [
                (torch.randn(size, config.intermediate_size) @ mixing).bfloat16() for _ in range(experts)
            ],
            "rows": [torch.randperm(size)[: size // 2 * (e < experts - 1)] for e in range(experts)],
        }
        for size in sizes
    ]


def summed(config: M2Config, parts: Sequence[dict[str, Any]], path: Path) -> Hessians:
    """As the pass over experts does it: two at a time, each group over all chunks."""
    hessians = Hessians(config, CPU, path)
    for group in ([0, 1], [2]):
        for part in parts:
            if group[0] == 0:
                hessians.add_inputs(part["h"])
            for e in group:
                rows = part["rows"][e]
                hessians.add(e, part["h"][rows], part["act"][e], part["act"][e][rows])
        hessians.done(group)
    return hessians


def mean_squares(parts: Sequence[dict[str, Any]], experts: int) -> torch.Tensor:
    everything = [torch.cat([part["act"][e] for part in parts]) for e in range(experts)]
    return torch.stack([act.double().square().mean(0) for act in everything])


def test_against_float64(config: M2Config, tmp_path: Path) -> None:
    parts = chunks(config, (90, 7, 40))
    with summed(config, parts, tmp_path / "sums") as own:
        means = mean_squares(parts, 3)
        layer = LayerHessians(own.finish(), config, CPU, [tmp_path / "sums"], means)
        for e in range(3):
            routed = torch.cat([part["act"][e][part["rows"][e]] for part in parts]).double()
            expected = routed.T @ routed + SMOOTHING_TOKENS * means[e].diag()
            size = expected.diagonal().sqrt()
            off = (layer.activations(e) - expected).abs() / (size[:, None] * size)
            assert off.max() < gram_rtol(137)
            for name, tensor in factorize(layer.activations(e))._asdict().items():
                same = getattr(layer.factor(e, "w2"), name)
                assert same.equal(tensor) if isinstance(tensor, torch.Tensor) else same == tensor
        assert layer.activations(2).equal((SMOOTHING_TOKENS * means[2]).diag()), "no token: by the average"
        h = torch.cat([part["h"] for part in parts]).double()
        pivots = factorize(h.T @ h).pivots
        assert layer.factor(0, "w1") is layer.factor(2, "w3")
        torch.testing.assert_close(layer.factor(0, "w1").pivots, pivots, rtol=1e-3, atol=0.0)
        layer.close()
    assert list(tmp_path.iterdir()) == []


def test_ranks_files_are_added_up(config: M2Config, tmp_path: Path) -> None:
    parts = chunks(config, (50, 3, 41, 17))
    means = mean_squares(parts, 3)
    found = []
    for split in (0, 1, 3):  # the first of two ranks may have no chunk at all
        own = [
            summed(config, p, tmp_path / f"{split}-{n}") for n, p in enumerate((parts[:split], parts[split:]))
        ]
        paths = [tmp_path / f"{split}-{rank}" for rank in range(2)]
        assert {path.stat().st_size for path in paths} == {hessians_on_disk(config)[1]}
        inputs = sum(hessians.finish() for hessians in own)
        assert isinstance(inputs, torch.Tensor)
        with closing(LayerHessians(inputs, config, CPU, paths, means)) as layer:
            found.append([*(layer.activations(e) for e in range(3)), layer.factor(0, "w1").coupling])
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(other, found[0], strict=True))


def test_activations_that_are_not_finite_are_left_out(config: M2Config, tmp_path: Path) -> None:
    parts = chunks(config, (30,))
    parts[0]["act"][0][parts[0]["rows"][0][3]] = float("inf")
    with summed(config, parts, tmp_path / "sums") as own:
        ones = torch.ones(3, 48)
        with closing(LayerHessians(own.finish(), config, CPU, [tmp_path / "sums"], ones)) as layer:
            assert layer.factor(0, "w2").pivots.isfinite().all()


def test_mean_squares_that_are_not_finite_are_named(config: M2Config, tmp_path: Path) -> None:
    nan = torch.full((3, 48), float("nan"))
    with (
        summed(config, chunks(config, (30,)), tmp_path / "sums") as own,
        closing(LayerHessians(own.finish(), config, CPU, [tmp_path / "sums"], nan)) as layer,
        pytest.raises(CalibrationError, match="Hessian of 48 channels"),
    ):
        layer.factor(0, "w2")


def test_a_file_that_cannot_be_made_or_found(config: M2Config, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Hessians(config, CPU, tmp_path / "nowhere" / "sums")
    with summed(config, chunks(config, (30,)), tmp_path / "sums") as own, pytest.raises(EnvironmentFault):
        LayerHessians(own.finish(), config, CPU, [tmp_path / "sums", tmp_path / "other"], torch.ones(3, 48))
