"""The router in Triton: the gate's product in true F32, and choice and weights of experts in one kernel.

The logits come as `kernels.linear` sums them, in segments of the hidden side; every program adds them up for one token,
so that a token's experts depend on that token alone, whether batch invariance is asked for or not.

In the kernel: b_ a tile, o_ offsets, m_ a mask; BE experts and BK slots, as powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels.linear import gpu as linear

OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _order(b):
    """int32 in the order of F32 values: both zeros equal, a NaN above all."""
    b = tl.where(b == 0.0, 0.0, b)
    b_u = b.to(tl.int32, bitcast=True)
    return tl.where(b == b, b_u ^ ((b_u >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def select_kernel(
    logits, bias, experts, weights, T, E, segments, k: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr
):
    """`experts` I64 and `weights` F32 [T, k] from `logits` F32 [segments, T, E], for the token program_id(0)."""
    t = tl.program_id(0).to(tl.int64)
    o_e, o_k = tl.arange(0, BE), tl.arange(0, BK)
    m_e = o_e < E
    b_logit = tl.zeros((BE,), tl.float32)
    for segment in range(segments):
        b_logit += tl.load(logits + (segment * T + t) * E + o_e, mask=m_e, other=0.0)
    b_score = tl.div_rn(tl.zeros_like(b_logit) + 1.0, 1.0 + tl.exp(-b_logit))
    b_wish = _order(b_score + tl.load(bias + o_e, mask=m_e, other=0.0))
    # the lower index wins among equals; -2**63 is below every key
    b_key = (b_wish.to(tl.int64) << 32) | (0x7FFFFFFF - o_e).to(tl.int64)
    b_key = tl.where(m_e, b_key, -0x8000000000000000)
    b_expert = tl.zeros((BK,), tl.int64)
    b_weight = tl.zeros((BK,), tl.float32)
    total = 0.0
    for slot in range(k):
        best = 0x7FFFFFFF - (tl.max(b_key, axis=0) & 0x7FFFFFFF)
        score = tl.sum(tl.where(o_e == best, b_score, 0.0), axis=0)
        b_key = tl.where(o_e == best, -0x8000000000000000, b_key)
        b_expert = tl.where(o_k == slot, best, b_expert)
        b_weight = tl.where(o_k == slot, score, b_weight)
        total += score
    tl.store(experts + t * k + o_k, b_expert, mask=o_k < k)
    tl.store(weights + t * k + o_k, tl.div_rn(b_weight, tl.zeros_like(b_weight) + total), mask=o_k < k)


def route(h_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See the package's `route`; invariant in any case."""
    if not len(h_TD):
        return select(h_TD.new_empty((0, len(gate_ED)), dtype=torch.float32), bias_E, k)
    return _select(linear.segment_sums(h_TD, gate_ED), bias_E, k)


def select(logits_TE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.select`."""
    return _select(logits_TE.contiguous()[None], bias_E, k)


def _select(logits_STE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    segments, T, E = logits_STE.shape
    experts = torch.empty((T, k), dtype=torch.int64, device=bias_E.device)
    weights = torch.empty((T, k), dtype=torch.float32, device=bias_E.device)
    if T:
        BE = triton.next_power_of_2(E)
        select_kernel[(T,)](
            logits_STE, bias_E.contiguous(), experts, weights, T, E, segments,
            k=k, BE=BE, BK=triton.next_power_of_2(k), num_warps=min(max(BE // 256, 1), 8), **OPTIONS,
        )  # fmt: skip
    return experts, weights
