"""The calibration pass on one layer with random weights: FLOP/s, as a share of what a plain product reaches.

The pass is the product's own: attention and router for all tokens, w1 and w3 of every expert over all tokens, w2
over the routed ones.  Weights are made on the device; packing and disks have no part in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.synthetic import Size
from m27quant.calib.activations import Chunk, MemoryRows, plan_chunks
from m27quant.calib.layer_ranges import LayerRanges
from m27quant.calib.layerwise import Dropped, ExpertWeights, run_attention, run_experts
from m27quant.calib.memory import CHUNK_TOKENS
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.runtime.layer import AttentionWeights, RouterWeights

GROUP = 16
ROW = 512
"""Tokens of a calibration row."""


def flops(size: Size, tokens: int, row: int) -> float:
    """Of one layer's pass over `tokens` tokens in rows of `row` tokens; attention counts its lower triangle."""
    c = parse_config(size.config())
    projections = 2.0 * c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
    core = 4.0 * c.q_size * row / 2
    router = 2.0 * c.hidden_size * c.num_local_experts
    products = 2 * c.num_local_experts + c.num_experts_per_tok
    return tokens * (projections + core + router + products * 2.0 * c.hidden_size * c.intermediate_size)


def measure(size: Size, device: torch.device, *, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Time attention and experts over `tokens` tokens, after a pass over one chunk that warms up."""
    c = parse_config(size.config())
    torch.manual_seed(seed)
    chunk = min(CHUNK_TOKENS[device.type], tokens)
    row = min(ROW, chunk)
    weights = _Weights(c, device)
    _run(c, weights, [row] * (chunk // row), chunk, device)
    lengths = [row] * (tokens // row)
    attention_s, experts_s = _run(c, weights, lengths, chunk, device)
    rate = flops(size, sum(lengths), row) / (attention_s + experts_s)
    same = machine.gemm_rate(device, chunk, c.hidden_size, c.intermediate_size)
    square = min(8192 if device.type == "cuda" else 2048, 4 * c.hidden_size)
    peak = max(same, machine.gemm_rate(device, square, square, square))
    return {
        "tokens": sum(lengths),
        "chunk_tokens": chunk,
        "attention_seconds": round(attention_s, 3),
        "experts_seconds": round(experts_s, 3),
        "flop_per_s": rate,
        "product_of_this_shape_flop_per_s": same,
        "bf16_peak_flop_per_s": peak,
        "share_of_peak": round(rate / peak, 3),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def describe(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("tokens", f"{found['tokens']:,} in chunks of {found['chunk_tokens']:,}"),
        ("attention and router", f"{found['attention_seconds']:.2f} s"),
        ("experts", f"{found['experts_seconds']:.2f} s"),
        ("the pass", tera(found["flop_per_s"])),
        ("one product of its shape", tera(found["product_of_this_shape_flop_per_s"])),
        ("BF16 peak, measured", tera(found["bf16_peak_flop_per_s"])),
        ("share of the peak", f"{found['share_of_peak']:.0%}"),
    ]
    if found["peak_device_bytes"]:
        lines.append(("device memory", f"{found['peak_device_bytes'] / 2**30:.1f} GiB"))
    return lines


def tera(rate: float) -> str:
    return f"{rate / 1e12:.2f} TFLOP/s"


class _Weights:
    """One layer in BF16; experts share the memory of one group, which changes no product's speed."""

    def __init__(self, c: M2Config, device: torch.device) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).bfloat16()

        def norm(width: int) -> torch.Tensor:
            return torch.ones(width, dtype=torch.bfloat16, device=device)

        d, i = c.hidden_size, c.intermediate_size
        self.attention = AttentionWeights(
            input_layernorm=norm(d),
            q_proj=normal(c.q_size, d),
            k_proj=normal(c.kv_size, d),
            v_proj=normal(c.kv_size, d),
            o_proj=normal(d, c.q_size),
            q_norm=norm(c.q_size),
            k_norm=norm(c.kv_size),
        )
        gate = torch.randn(c.num_local_experts, d, device=device) * d**-0.5
        self.router = RouterWeights(norm(d), gate, torch.zeros(c.num_local_experts, device=device))
        self._num_experts = c.num_local_experts
        self._matrices = [
            (normal(i, d), normal(d, i), normal(i, d)) for _ in range(min(GROUP, self._num_experts))
        ]

    def groups(self) -> Iterator[Sequence[ExpertWeights]]:
        for first in range(0, self._num_experts, GROUP):
            members = range(first, min(first + GROUP, self._num_experts))
            yield [ExpertWeights(e, *m) for e, m in zip(members, self._matrices, strict=False)]


def _run(
    c: M2Config, weights: _Weights, lengths: Sequence[int], chunk: int, device: torch.device
) -> tuple[float, float]:
    """(seconds of attention and router, seconds of the experts)."""
    chunks: list[Chunk] = plan_chunks(lengths, chunk)
    rows, out = (MemoryRows(sum(lengths), c.hidden_size, device) for _ in range(2))
    for part in chunks:
        rows.write(part, torch.randn(len(part), c.hidden_size, device=device).bfloat16())
    ranges = LayerRanges()
    with torch.inference_mode():
        started = _now(device)
        routed = run_attention(
            chunks, rows, weights.attention, weights.router, c, ranges, Dropped(len(lengths)), lambda _: None
        )
        between = _now(device)
        run_experts(
            weights.groups(),
            chunks,
            rows,
            out,
            routed,
            weights.router,
            c,
            ranges,
            full=True,
            tick=lambda _: None,
        )
        ended = _now(device)
    assert all(0 < amax < float("inf") for amax in ranges.w2_input_amax)
    return between - started, ended - between


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
