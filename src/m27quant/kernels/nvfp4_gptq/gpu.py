"""NVFP4 with error feedback on CUDA: a product for what earlier groups feed back, a Triton kernel for each group.

The kernel repeats `reference` operation by operation; the product adds in an order of its own, so that bytes may differ
from a CPU's where two choices are equally good up to F32.

In the kernel: b_ a tile, o_ offsets; BN rows, 16 columns by turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels.nvfp4_gptq.factor import Factor
from m27quant.kernels.nvfp4_gptq.reference import channel_weights
from m27quant.kernels.nvfp4_pack import scale_search
from m27quant.kernels.nvfp4_pack.gpu import OPTIONS, halved, rounded
from m27quant.kernels.nvfp4_pack.reference import GROUP

ROWS = 16


def pack(
    weight_NK: Tensor,
    weight_scale_2: Tensor,
    factor: Factor,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `reference.pack`."""
    N, K = weight_NK.shape
    weight_NK, channel_G16 = weight_NK.contiguous(), channel_weights(factor)
    candidates = scale_search.candidates(weight_NK.device)
    error_NK = torch.empty(N, K, dtype=torch.float32, device=weight_NK.device)
    nonfinite = torch.zeros((), dtype=torch.int32, device=weight_NK.device)
    outputs = (error_NK, out_codes_NK2, out_scale_NG.view(torch.uint8), nonfinite)
    for turn in range(K // GROUP):
        first = turn * GROUP
        fed_N16 = error_NK[:, :first] @ factor.coupling[turn, :first]
        inputs = (weight_NK, fed_N16, factor.order, factor.coupling, channel_G16, weight_scale_2, candidates)
        gptq_group_kernel[(triton.cdiv(N, ROWS),)](*inputs, *outputs, first, N, K, BN=ROWS, **OPTIONS)
    return not int(nonfinite)


def energies(x_NK: Tensor, factor: Factor) -> Tensor:
    """See `reference.energies`; sums as a product of matrices has them."""
    K = x_NK.shape[1]
    x_NK = x_NK[:, factor.order.long()]
    coupling_KK = factor.coupling.transpose(0, 1).reshape(K, K)
    return (x_NK + x_NK @ coupling_KK).double().square() @ factor.pivots


@triton.jit
def gptq_group_kernel(
    weight, fed, order, coupling, channel, weight_scale_2, candidates, error, codes, scales, nonfinite,
    first, N, K, BN: tl.constexpr,
):  # fmt: skip
    """The group whose turns begin at `first`: its block scale, codes, and the errors it leaves.

    `weight` BF16 [N, K], `fed` F32 [N, 16] from earlier groups, `order` I32 [K], `coupling` F32 [G, K, 16], `channel`
    F32 [K] by turns; `error` F32 [N, K] by turns, `codes` U8 [N, K/2], `scales` U8 [N, K/16]; `nonfinite` int32 []
    becomes 1 at a NaN or Inf.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.arange(0, 16)
    m_n = (o_n < N)[:, None]
    o_k = tl.load(order + first + o_c)
    b_w = tl.load(weight + o_n[:, None] * K + o_k[None, :], mask=m_n, other=0.0).to(tl.float32)
    b_fed = tl.load(fed + o_n[:, None] * 16 + o_c[None, :], mask=m_n, other=0.0)
    within = coupling + (first // 16).to(tl.int64) * K * 16 + first * 16
    ws2 = tl.load(weight_scale_2)

    b_x, _ = _follow(b_w, b_fed, within, tl.zeros((BN,), tl.float32), False, BN)
    tl.store(nonfinite, 1, mask=_any_nonfinite(b_x))
    b_e4m3 = _least_error(tl.abs(b_x), tl.load(channel + first + o_c).to(tl.float64), candidates, ws2, BN)
    b_normal = ((b_e4m3 << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    b_d = tl.where(b_e4m3 < 8, b_e4m3.to(tl.float32) * 0.001953125, b_normal) * ws2
    b_x, b_y = _follow(b_w, b_fed, within, b_d, True, BN)
    tl.store(nonfinite, 1, mask=_any_nonfinite(b_x))
    tl.store(error + o_n[:, None] * K + first + o_c[None, :], b_w - b_y, mask=m_n)

    b_a = tl.div_rn(tl.abs(b_x), tl.broadcast_to(b_d[:, None], (BN, 16)))
    b_q = rounded(b_a)  # 0, 1/2, 1, 3/2, 2, 3, 4, 6
    b_code = tl.where(b_q <= 2.0, b_q * 2.0, tl.where(b_q < 6.0, b_q + 2.0, 7.0)).to(tl.int32)
    b_code |= ((b_x < 0.0) & (b_a > 0.0)).to(tl.int32) << 3
    m_place = (o_k % 16)[:, None] == o_c[None, :]
    b_code = tl.sum(tl.where(m_place[None, :, :], b_code[:, :, None], 0), axis=1)  # from turns to places
    b_low, b_high = tl.split(tl.reshape(b_code, (BN, 8, 2)))
    group = tl.load(order + first) // 16
    o_byte = o_n[:, None] * (K // 2) + group * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes + o_byte, (b_low | (b_high << 4)).to(tl.uint8), mask=m_n)
    tl.store(scales + o_n * (K // 16) + group, b_e4m3.to(tl.uint8), mask=o_n < N)


@triton.jit
def _follow(b_w, b_fed, within, b_d, STORED: tl.constexpr, BN: tl.constexpr):
    """x and y of a group's turns, each with the feedback of those before it; y is x unless STORED."""
    o_c = tl.arange(0, 16)
    b_x, b_y = tl.zeros((BN, 16), tl.float32), tl.zeros((BN, 16), tl.float32)
    for j in range(16):
        m_j = (o_c == j)[None, :]
        b_wj = tl.sum(tl.where(m_j, b_w, 0.0), axis=1)
        b_xj = b_wj + tl.sum(tl.where(m_j, b_fed, 0.0), axis=1)
        b_yj = b_xj
        if STORED:
            b_yj = rounded(tl.div_rn(tl.abs(b_xj), b_d)) * b_d
            b_yj = tl.where(b_xj < 0.0, -b_yj, b_yj)
        b_x = tl.where(m_j, b_xj[:, None], b_x)
        b_y = tl.where(m_j, b_yj[:, None], b_y)
        b_fed += (b_wj - b_yj)[:, None] * tl.load(within + j * 16 + o_c)[None, :]
    return b_x, b_y


@triton.jit
def _least_error(b_x, b_weight, candidates, ws2, BN: tl.constexpr):
    """The E4M3 codes of the best scales, as `scale_search` finds them; b_x magnitudes, b_weight F64 [16]."""
    b_least = tl.full((BN,), float("inf"), tl.float64)
    b_e4m3 = tl.full((BN,), 1, tl.int32)
    for index in range(126):
        d = tl.load(candidates + index) * ws2
        b_r = b_x.to(tl.float64) - (rounded(tl.div_rn(b_x, tl.zeros_like(b_x) + d)) * d).to(tl.float64)
        b_r = b_r * b_r * b_weight[None, :]
        b_error = tl.reshape(halved(tl.reshape(b_r, (BN, 1, 16)), BN, 1), (BN,))
        b_better = b_error < b_least
        b_least = tl.where(b_better, b_error, b_least)
        b_e4m3 = tl.where(b_better, index + 1, b_e4m3)
    return b_e4m3


@triton.jit
def _any_nonfinite(b_x):
    b_exponent = b_x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.max(tl.max(b_exponent, axis=1), axis=0) == 0x7F800000
