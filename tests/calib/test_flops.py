"""Full-expert calibration against its plain definition: every expert over every token, then the natural pass.

Products are counted by torch itself while both run on the same weights and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from m27quant.calib.activations import MemoryRows, plan_chunks
from m27quant.calib.layer_ranges import LayerRanges
from m27quant.calib.layerwise import Dropped, ExpertWeights, run_attention, run_experts
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.runtime.layer import AttentionWeights, RouterWeights
from tests.checkpoints import Shape

CPU = torch.device("cpu")
ALLOWED = 0.70
"""Share of the plain definition's products that the pass may take; (2 E + K) / (3 E + 3 K) is what it should."""

PROPORTIONS = {
    "M2.7": Shape(hidden_size=64, intermediate_size=32, num_local_experts=256, num_experts_per_tok=8),
    "tiny-m27": Shape(hidden_size=272, intermediate_size=64, num_local_experts=16, num_experts_per_tok=4),
}


@dataclass(frozen=True)
class Layer:
    """Random weights of one layer and the hidden states of some sequences."""

    config: M2Config
    attention: AttentionWeights
    router: RouterWeights
    experts: list[ExpertWeights]
    hidden: torch.Tensor
    lengths: tuple[int, ...]


def random_layer(shape: Shape) -> Layer:
    c = parse_config(shape.config())
    lengths = (40, 31, 40, 17)

    def normal(*size: int, std: float | None = None) -> torch.Tensor:
        return (torch.randn(*size) * (size[-1] ** -0.5 if std is None else std)).bfloat16()

    def norm(size: int) -> torch.Tensor:
        return 1 + normal(size, std=0.1)

    d, i = c.hidden_size, c.intermediate_size
    attention = AttentionWeights(
        norm(d), normal(c.q_size, d), normal(c.kv_size, d), normal(c.kv_size, d), normal(d, c.q_size),
        norm(c.q_size), norm(c.kv_size),
    )  # fmt: skip
    router = RouterWeights(
        norm(d), torch.randn(c.num_local_experts, d) * d**-0.5, torch.randn(c.num_local_experts) * 0.1
    )
    experts = [ExpertWeights(e, normal(i, d), normal(d, i), normal(i, d)) for e in range(c.num_local_experts)]
    return Layer(c, attention, router, experts, normal(sum(lengths), d, std=1.0), lengths)


def ours(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, LayerRanges, int, int]:
    """(x after attention, MoE output, ranges, FLOPs of attention and router, FLOPs of the experts)."""
    c, size = layer.config, layer.hidden.shape
    chunks = plan_chunks(layer.lengths, 80)
    assert len(chunks) == 2
    rows, out = MemoryRows(*size, CPU), MemoryRows(*size, CPU)
    rows.rows.copy_(layer.hidden)
    ranges = LayerRanges()
    with FlopCounterMode(display=False) as attention:
        routed = run_attention(
            chunks, rows, layer.attention, layer.router, c, ranges, Dropped(4), lambda chunk: None
        )
    groups = [layer.experts[i : i + 16] for i in range(0, len(layer.experts), 16)]
    with FlopCounterMode(display=False) as experts:
        run_experts(
            groups, chunks, rows, out, routed, layer.router, c, ranges, full=True, tick=lambda index: None
        )
    return rows.rows, out.rows, ranges, attention.get_total_flops(), experts.get_total_flops()


def by_definition(layer: Layer, x_TD: torch.Tensor) -> tuple[torch.Tensor, float, list[float], int]:
    """(MoE output, w1's and w3's input amax, each w2's, FLOPs): top-k forced to all, then natural routing."""
    x_F32 = x_TD.float()
    x_F32 = x_F32 * torch.rsqrt(x_F32.pow(2).mean(-1, keepdim=True) + layer.config.rms_norm_eps)
    h_TD = layer.router.post_attention_layernorm * x_F32.bfloat16()
    scores = torch.sigmoid(h_TD.float() @ layer.router.gate.T)
    w13, w2 = 0.0, []
    y_TD = torch.zeros_like(h_TD)
    with FlopCounterMode(display=False) as flops:
        for e in layer.experts:
            act = F.silu(F.linear(h_TD, e.w1)) * F.linear(h_TD, e.w3)
            w13 = max(w13, float(h_TD.abs().max()))
            w2.append(float(act.abs().max()))
            F.linear(act, e.w2)  # its value goes nowhere
        chosen = (
            (scores + layer.router.e_score_correction_bias).topk(layer.config.num_experts_per_tok).indices
        )
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights /= weights.sum(1, keepdim=True)
        for e in layer.experts:
            rows = weights[:, e.index].nonzero()[:, 0]
            if len(rows):
                act = F.silu(F.linear(h_TD[rows], e.w1)) * F.linear(h_TD[rows], e.w3)
                y_TD[rows] += (F.linear(act, e.w2) * weights[rows, e.index, None]).bfloat16()
    return y_TD, w13, w2, flops.get_total_flops()


@pytest.mark.parametrize("name", PROPORTIONS)
def test_a_third_fewer_products_and_the_same_ranges(name: str) -> None:
    layer = random_layer(PROPORTIONS[name])
    x, y, ranges, attention_flops, flops = ours(layer)
    expected_y, w13, w2, plain_flops = by_definition(layer, x)
    assert ranges.w13_input_amax == w13
    assert ranges.w2_input_amax == w2
    torch.testing.assert_close(y, expected_y, rtol=0.02, atol=0.02)
    assert float(expected_y.abs().max()) > 0.1

    c, tokens = layer.config, len(layer.hidden)
    one_product = 2 * tokens * c.hidden_size * c.intermediate_size
    e, k = c.num_local_experts, c.num_experts_per_tok
    assert flops == one_product * (2 * e + k)
    assert plain_flops == one_product * (3 * e + 3 * k)
    assert flops / plain_flops <= ALLOWED
    assert (attention_flops + flops) / (attention_flops + plain_flops) <= ALLOWED, (
        "attention and router included"
    )


def test_natural_coverage_multiplies_routed_tokens_only() -> None:
    layer = random_layer(PROPORTIONS["tiny-m27"])
    c, chunks = layer.config, plan_chunks(layer.lengths, 1000)
    rows, out = MemoryRows(*layer.hidden.shape, CPU), MemoryRows(*layer.hidden.shape, CPU)
    rows.rows.copy_(layer.hidden)
    ranges = LayerRanges()
    routed = run_attention(
        chunks, rows, layer.attention, layer.router, c, ranges, Dropped(4), lambda chunk: None
    )
    with FlopCounterMode(display=False) as flops:
        run_experts(
            [layer.experts],
            chunks,
            rows,
            out,
            routed,
            layer.router,
            c,
            ranges,
            full=False,
            tick=lambda index: None,
        )
    one_product = 2 * len(layer.hidden) * c.hidden_size * c.intermediate_size
    assert flops.get_total_flops() == one_product * 3 * c.num_experts_per_tok
    assert set(ranges.w2_input_amax) == {max(ranges.w2_input_amax)}
