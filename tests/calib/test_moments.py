"""Second moments against loops in float64, and what they do to the choice of block scales."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from m27quant.calib.moments import SMOOTHING_TOKENS, Moments, squares
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.kernels import nvfp4_pack
from m27quant.kernels.nvfp4_pack import scale_search
from m27quant.kernels.nvfp4_pack.reference import groups
from m27quant.kernels.nvfp4_pack.weighted import weighted_error
from tests.checkpoints import Shape

CPU = torch.device("cpu")
RTOL = 2.0**-22
"""A sum of F64 rounded to F32, and the grid of 2**-36."""


@pytest.fixture(scope="module")
def config() -> M2Config:
    shape = Shape(hidden_size=32, intermediate_size=48, num_local_experts=3)
    return replace(parse_config(shape.config()), hidden_size=32, intermediate_size=48)


def chunks(config: M2Config, sizes: tuple[int, ...]) -> list[dict[str, list[torch.Tensor] | torch.Tensor]]:
    """Inputs, activations and routed rows of each expert by chunk."""
    torch.manual_seed(1)
    D, I, E = config.hidden_size, config.intermediate_size, config.num_local_experts
    spread = torch.logspace(-6, 3, D)
    return [
        {
            "h": (torch.randn(size, D) * spread).bfloat16(),
            "act": [(torch.randn(size, I) * 10.0 ** (2 * e)).bfloat16() for e in range(E)],
            "rows": [torch.randperm(size)[: size // (e + 2)] if e < 2 else torch.tensor([], dtype=torch.int64)
                     for e in range(E)],
        }
        for size in sizes
    ]  # fmt: skip


def added(config: M2Config, parts: list[dict[str, object]]) -> Moments:
    moments = Moments(config, CPU)
    for part in parts:
        h, act, rows = part["h"], part["act"], part["rows"]
        moments.add_inputs(h)
        for expert in range(config.num_local_experts):
            routed = rows[expert]
            moments.add(expert, h[routed], act[expert], act[expert][routed])
    return moments


def test_against_a_loop_over_tokens(config: M2Config) -> None:
    parts = chunks(config, (300, 7, 1))
    tokens = sum(len(p["h"]) for p in parts)
    counts = [sum(len(p["rows"][e]) for p in parts) for e in range(3)]
    assert counts[2] == 0
    found = added(config, parts).weights(counts, tokens)
    for expert in range(3):
        for projection, weights in found.of(expert).items():
            total = torch.zeros(len(weights), dtype=torch.float64)
            everything = torch.zeros_like(total)
            for part in parts:
                x = part["act"][expert] if projection == "w2" else part["h"]
                chosen = set(part["rows"][expert].tolist())
                for number, row in enumerate(x.double()):
                    everything += row * row
                    total += row * row * (number in chosen)
            smoothed = (total + SMOOTHING_TOKENS * everything / tokens) / (counts[expert] + SMOOTHING_TOKENS)
            torch.testing.assert_close(weights.double(), smoothed, rtol=RTOL, atol=2.0**-36)


def test_a_cold_expert_gets_the_average_of_all_tokens(config: M2Config) -> None:
    parts = chunks(config, (64,))
    found = added(config, parts).weights([32, 21, 0], 64)
    mean = parts[0]["h"].double().square().mean(0)
    torch.testing.assert_close(found.of(2)["w1"].double(), mean, rtol=RTOL, atol=2.0**-36)
    assert found.of(2)["w1"].equal(found.of(2)["w3"])
    assert not found.of(0)["w1"].equal(found.of(2)["w1"])


def test_neither_order_nor_owner_of_chunks_changes_a_bit(config: M2Config) -> None:
    parts = chunks(config, (50, 3, 41, 17, 64, 5, 30))
    whole = added(config, parts)
    for seed in range(5):
        mixed = random.Random(seed).sample(parts, len(parts))
        ranks = [added(config, mixed[:3]), added(config, mixed[3:])]
        assert (ranks[0].sums + ranks[1].sums).equal(whole.sums)
    one, two = (m.weights([9, 9, 0], 210) for m in (whole, added(config, parts[::-1])))
    assert one.sha256 == two.sha256
    assert one.sha256 != whole.weights([9, 8, 0], 210).sha256


def test_rows_that_are_not_finite_are_left_out() -> None:
    x = torch.randn(600, 16).bfloat16()
    good = torch.ones(600, dtype=torch.bool)
    for row, bad in ((0, float("nan")), (299, float("inf")), (599, -float("inf"))):
        x[row, row % 16], good[row] = bad, False
    assert squares(x).equal(squares(x[good]))


def test_huge_and_tiny_values_stay_finite_and_in_order(config: M2Config) -> None:
    moments = Moments(config, CPU)
    h = torch.full((4, config.hidden_size), 3e38).bfloat16()
    h[:, 1], h[:, 2] = 1e-30, 1e6
    moments.add_inputs(h)
    moments.add_inputs(h)
    weights = moments.weights([0, 0, 0], 8).of(0)["w1"]
    assert weights.isfinite().all()
    assert weights[1] == 0 < weights[2] < weights[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_block_has_more_weighted_error_than_by_max_or_mse(seed: int) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(64, 96) * torch.logspace(-2, 0, 64)[:, None]).bfloat16()
    m = torch.randn(96).mul(3).exp()
    amax = nvfp4_pack.amax(weight)
    packed = {
        "awmse": nvfp4_pack.pack(weight, amax=amax, scales="mse", channel_weight=m),
        "mse": nvfp4_pack.pack(weight, amax=amax, scales="mse"),
        "max": nvfp4_pack.pack(weight, amax=amax),
    }
    errors = {name: by_block(weight, p, m) for name, p in packed.items()}
    assert (errors["awmse"] <= errors["mse"]).all()
    assert (errors["awmse"] <= errors["max"]).all()
    assert (errors["awmse"] < errors["mse"]).float().mean() > 0.2
    for name, p in packed.items():
        found = weighted_error(weight, p, m)
        assert found.noise == pytest.approx(float(errors[name].sum()), rel=1e-12)
        assert found.signal == pytest.approx(float((weight.double().square() * m.double()).sum()), rel=1e-12)


def by_block(weight: torch.Tensor, packed: nvfp4_pack.PackedNVFP4, m: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every block of 16, F64 [N, K/16], in the order of the specification."""
    difference = weight.double() - nvfp4_pack.unpack(packed).double()
    return scale_search._halved(groups(difference.square()) * m.double().view(-1, 16))


def test_weights_of_one_expert_and_scales_of_moments_do_not_matter() -> None:
    """Only ratios within a block decide, so counts of tokens common to a matrix cancel."""
    torch.manual_seed(3)
    weight, m = torch.randn(32, 64).bfloat16(), torch.rand(64) + 0.1
    amax = nvfp4_pack.amax(weight)
    one, two = (
        nvfp4_pack.pack(weight, amax=amax, scales="mse", channel_weight=m * factor)
        for factor in (1, 2.0**-40)
    )
    assert one.weight.equal(two.weight)
    assert one.weight_scale.view(torch.uint8).equal(two.weight_scale.view(torch.uint8))
