"""The kernels of routed experts in Triton: up (gate, up, SwiGLU, quantization), down, and the weighted sum.

A program of `up` and `down` takes one tile of one expert's rows and one block of its slots (`gpu_sort`).  Rows of w1
and w3 lie in turns of 8 (`repack.interleave`), so that one product gives both gate and up of a feature.  Every slot
has an output of its own, and a token's are added in the order of its slots: no atomics, the same sum every time.

Counts of tokens are not specialized (`do_not_specialize`): a new one never waits for a compiler.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BN rows of weights, BT slots, BK columns in a tile, BH = BN / 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m27quant.kernels.bits import e4m3_value, rounded
from m27quant.kernels.nvfp4_gemm.gpu_quantize import exact_value
from m27quant.kernels.nvfp4_gemm.gpu_tile import UNSCALE, product_bf16, product_fp4, stored
from m27quant.kernels.nvfp4_quantize.gpu import block_scales, e2m1_pairs


@triton.jit
def _block(slots, block_expert, num_slots, first, count, DIRECT: tl.constexpr, BT: tl.constexpr):
    """Expert of this program's block, from 0 on, -1 for none, and its slots int64 [BT], `num_slots` for none.

    DIRECT: block b is slot b alone and `block_expert` the routing itself.
    """
    b = tl.program_id(1)
    o_t = tl.arange(0, BT)
    if DIRECT:
        e = (tl.load(block_expert + b) - first).to(tl.int32)
        e = tl.where((e >= 0) & (e < count), e, -1)
        o_slot = tl.where(o_t == 0, b, num_slots)
    else:
        e = tl.load(block_expert + b)
        o_slot = tl.load(slots + b * BT + o_t)
    return e.to(tl.int64), o_slot.to(tl.int64)


@triton.jit
def _product(
    x, x_scale, o_row, m_t, w, w_scale, e, o_n, N, K, K2, G, stride_w, stride_s, stride_se,
    FP4: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """F32 [BN, BT] of expert e's rows `o_n` of N, without global scales."""
    w += e * N * stride_w
    w_scale += e * stride_se
    o_n = tl.minimum(o_n, N - 1)
    if FP4:
        b_acc = product_fp4(x, x_scale, o_row, m_t, w, w_scale, o_n, K, K2, G, BN, BT, BK, EVEN, INTERPRET)
    else:
        b_acc = product_bf16(
            x, o_row * K, m_t, w, w_scale, o_n, K, stride_w, stride_s, BN, BT, BK, EVEN, INTERPRET
        )
        b_acc *= UNSCALE
    return b_acc


@triton.jit(do_not_specialize=["num_slots", "first", "count"])
def nvfp4_moe_up_kernel(
    x, x_scale, w, w_scale, scale_2, input_scale_13, input_scale_2, act, act_scale, slots, block_expert,
    num_slots, first, count, I, D, D2, DG, stride_w, stride_s, stride_se,
    TOPK: tl.constexpr, BY_SLOT: tl.constexpr, DIRECT: tl.constexpr, FP4: tl.constexpr, W4A4: tl.constexpr,
    BF16: tl.constexpr, HARDWARE: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of each slot, rounded to BF16 where BF16 is set, then as w2's product takes it.

    `act` and `act_scale` [num_slots, ..]: W4A16 values, W4A4 with FP4 codes and E4M3 bits, else E2M1 * E4M3 in BF16.
    BY_SLOT: `x` has a row for each slot, else for each token.
    """
    BH: tl.constexpr = BN // 2
    e, o_slot = _block(slots, block_expert, num_slots, first, count, DIRECT, BT)
    if e >= 0:
        m_t = o_slot < num_slots
        o_row = o_slot if BY_SLOT else o_slot // TOPK
        o_n = tl.program_id(0) * BN + tl.arange(0, BN)
        b_acc = _product(
            x, x_scale, o_row, m_t, w, w_scale, e, o_n, 2 * I, D, D2, DG, stride_w, stride_s, stride_se,
            FP4, BN, BT, BK, EVEN, INTERPRET,
        )  # fmt: skip
        gate_scale, up_scale = tl.load(scale_2 + e * 3), tl.load(scale_2 + e * 3 + 1)
        if W4A4:
            b_acc *= tl.load(input_scale_13 + e)
        b_gate, b_up = tl.split(b_acc.reshape(BN // 16, 2, 8, BT).trans(0, 2, 3, 1))
        b_gate = b_gate.reshape(BH, BT) * gate_scale
        b_act = b_gate / (1.0 + tl.exp(-b_gate)) * (b_up.reshape(BH, BT) * up_scale)
        b_act = rounded(b_act, BF16)

        o_f = tl.program_id(0) * BH
        o_i = o_f + tl.arange(0, BH)
        p_act, m_act = act + o_slot[None, :] * I + o_i[:, None], (o_i < I)[:, None] & m_t[None, :]
        if not W4A4:
            stored(b_act, p_act, m_act, INTERPRET)
        else:
            b_a = b_act.reshape(BH // 16, 16, BT)
            b_bits = b_a.to(tl.int32, bitcast=True)
            b_amax = tl.max(b_bits & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
            b_is = tl.zeros((BH // 16, BT), tl.float32) + tl.load(input_scale_2 + e)
            b_code, b_factor = block_scales(b_amax, b_is)
            b_y, b_sign = b_a * b_factor[:, None, :], (b_bits >> 28) & 8
            if FP4:
                b_y = b_y.reshape(BH // 2, 2, BT).trans(0, 2, 1)
                b_bytes = e2m1_pairs(b_y, b_sign.reshape(BH // 2, 2, BT).trans(0, 2, 1), HARDWARE)
                o_b, o_g = o_f // 2 + tl.arange(0, BH // 2), o_f // 16 + tl.arange(0, BH // 16)
                m_b, m_g = (o_b < I // 2)[:, None] & m_t[None, :], (o_g < I // 16)[:, None] & m_t[None, :]
                tl.store(act + o_slot[None, :] * (I // 2) + o_b[:, None], b_bytes.to(tl.uint8), mask=m_b)
                tl.store(
                    act_scale + o_slot[None, :] * (I // 16) + o_g[:, None], b_code.to(tl.uint8), mask=m_g
                )
            else:
                b_value = exact_value(b_y, b_sign, e4m3_value(b_code)[:, None, :])
                stored(b_value.reshape(BH, BT), p_act, m_act, INTERPRET)


@triton.jit(do_not_specialize=["num_slots", "first", "count"])
def nvfp4_moe_down_kernel(
    act, act_scale, w, w_scale, scale_2, input_scale_2, out, slots, block_expert,
    num_slots, first, count, D, I, I2, IG, stride_w, stride_s, stride_se,
    DIRECT: tl.constexpr, FP4: tl.constexpr, W4A4: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out` F32 [num_slots, D]: each slot's output, not yet weighted; slots without expert stay as they are."""
    e, o_slot = _block(slots, block_expert, num_slots, first, count, DIRECT, BT)
    if e >= 0:
        m_t = o_slot < num_slots
        o_n = tl.program_id(0) * BN + tl.arange(0, BN)
        b_acc = _product(
            act, act_scale, o_slot, m_t, w, w_scale, e, o_n, D, I, I2, IG, stride_w, stride_s, stride_se,
            FP4, BN, BT, BK, EVEN, INTERPRET,
        )  # fmt: skip
        if W4A4:
            b_acc *= tl.load(input_scale_2 + e)
        p_out = out + o_slot[None, :] * D + o_n[:, None]
        tl.store(p_out, b_acc * tl.load(scale_2 + e * 3 + 2), mask=(o_n < D)[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["first", "count"])
def nvfp4_moe_sum_kernel(
    out, experts, weights, y, first, count, D, TOPK: tl.constexpr, INTERPRET: tl.constexpr, BD: tl.constexpr
):
    """`y` [T, D] in BF16 as int16 or F32: weight * out over the slots of token `program`, in their order."""
    t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_y = tl.zeros((BD,), tl.float32)
    for k in tl.static_range(TOPK):
        slot = t * TOPK + k
        e = tl.load(experts + slot) - first
        if (e >= 0) & (e < count):
            b_y += tl.load(weights + slot) * tl.load(out + slot * D + o_d, mask=m_d, other=0.0)
    stored(b_y, y + t * D + o_d, m_d, INTERPRET)
