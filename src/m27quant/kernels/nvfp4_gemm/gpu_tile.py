"""The inner loops of all NVFP4 products in Triton: one tile of weights by one tile of tokens.

The weights are always the left operand (rows of the matrix on the M side): with few tokens that is the only shape
that fills a tensor core, FP4 tensor cores of sm_100 want 128 rows there, and Hopper takes a left operand from
registers, where it was just unpacked.

    product_bf16   weights twiddled as in `repack`, activations BF16 (or F32, as a sum of three BF16): any chip from
                   sm_80 on.  The activations of an emulated W4A4 product are E2M1 * E4M3, exact in BF16.
    product_fp4    codes and swizzled block scales of both, `tl.dot_scaled`: Blackwell.

Both leave out global scales, and `product_bf16` a factor of 2**7 (`UNSCALE`): they belong to the epilogue.

Triton's interpreter computes BF16 on raw bits and takes E4M3 scales for E8M0 in `dot_scaled`; where `INTERPRET` is set
the same values are multiplied in F32 instead.  The rest of the code is the same.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BN rows of weights, BT tokens, BK columns in a tile, C = BK/32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from m27quant.kernels.bits import bf16_bits, e4m3_value, to_f32

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""The kernels run in Triton's interpreter (it reads the variable when it is imported)."""

UNSCALE = tl.constexpr(128.0)
"""2**7: codes carry 2**-126 and scales 2**119."""

# A word of codes ($8) and a pair of scale bytes ($9) to eight BF16 products, 18 instructions and no more: the
# results are named, not moved.  g = 0: $0 to $3, g = 1: $4 to $7.  mul.bf16x2 needs sm_90; fma with -0 is as exact.
# One word for each call (pack=1): with more, Triton would take neighbours in a thread for neighbours in the row.
_UNPACK = tl.constexpr(
    """{
    .reg .b32 a, b, c, d, e, s, t, z;
    and.b32 a, $8, 0x81C081C0;
    shf.r.wrap.b32 b, $8, $8, 6;  and.b32 b, b, 0x81C081C0;
    shl.b32 c, $8, 6;             and.b32 c, c, 0x81C081C0;
    shl.b32 d, $8, 4;             and.b32 d, d, 0x81808180;
    shr.u32 e, $8, 4;             lop3.b32 d, e, 0x00400040, d, 0xEA;
    prmt.b32 s, $9, 0, 0x4040;    mad.lo.u32 s, s, 16, 0x70007000;
    prmt.b32 t, $9, 0, 0x4141;    mad.lo.u32 t, t, 16, 0x70007000;
    mov.b32 z, 0x80008000;
    fma.rn.bf16x2 a, a, s, z;     mov.b32 {$0, $1}, a;
    fma.rn.bf16x2 b, b, s, z;     mov.b32 {$2, $3}, b;
    fma.rn.bf16x2 c, c, t, z;     mov.b32 {$4, $5}, c;
    fma.rn.bf16x2 d, d, t, z;     mov.b32 {$6, $7}, d;
    }"""
)


@triton.jit
def _unpacked(b_w, b_s, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr):
    """Weights [BN, BK], E2M1 * scale * 2**-7, of words int32 [BN, BK / 8] and scale pairs int32 [BN, C]."""
    C: tl.constexpr = BK // 32
    b_w, b_s = b_w.reshape(BN, C, 4), tl.broadcast_to(b_s[:, :, None], (BN, C, 4))
    if INTERPRET:
        b_w = b_w.to(tl.uint32, bitcast=True)
        b_p3 = ((b_w << 4) & 0x81808180) | ((b_w >> 4) & 0x00400040)
        b_g0 = tl.join(b_w & 0x81C081C0, ((b_w >> 6) | (b_w << 26)) & 0x81C081C0)  # [BN, C, t, h]
        b_g1 = tl.join((b_w << 6) & 0x81C081C0, b_p3)
        b_s0, b_s1 = (b_s & 0xFF) << 20 | 0x70000000, (b_s & 0xFF00) << 12 | 0x70000000
        b_g0 = tl.join(b_g0 << 16, b_g0 & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        b_g1 = tl.join(b_g1 << 16, b_g1 & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        b_g0 *= b_s0.to(tl.float32, bitcast=True)[:, :, :, None, None]  # [BN, C, t, h, lane]
        b_g1 *= b_s1.to(tl.float32, bitcast=True)[:, :, :, None, None]
        b_v = tl.join(b_g0, b_g1)
    else:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = tl.inline_asm_elementwise(
            _UNPACK,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            args=[b_w, b_s],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
        b_g0 = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # [BN, C, t, h, lane]
        b_g1 = tl.join(tl.join(b_4, b_6), tl.join(b_5, b_7))
        b_v = tl.join(b_g0, b_g1)
    return b_v.trans(0, 1, 5, 3, 2, 4).reshape(BN, BK)  # [BN, C, g, h, t, lane]


@triton.jit
def product_bf16(
    x, o_x, m_t, w, s, o_n, K, stride_w, stride_s,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums over K, F32 [BN, BT], without global scales and 2**7.

    `x` BF16 as int16 or F32, token t at `o_x[t]`, 0 where not `m_t`; `w`, `s` one twiddled matrix of which rows
    `o_n` are taken; `EVEN`: BK divides K.
    """
    o_k, o_w, o_c = tl.arange(0, BK), tl.arange(0, BK // 8), tl.arange(0, BK // 32)
    p_x = x + o_x[None, :] + o_k[:, None]
    p_w = w + o_n[:, None] * stride_w + o_w[None, :]
    p_s = s + o_n[:, None] * stride_s + o_c[None, :]
    b_acc = tl.zeros((BN, BT), tl.float32)
    for k in range(0, K, BK):
        if EVEN:
            b_x = tl.load(p_x, mask=m_t[None, :], other=0)
            b_w = tl.load(p_w)
            b_s = tl.load(p_s)
        else:
            b_x = tl.load(p_x, mask=m_t[None, :] & (k + o_k < K)[:, None], other=0)
            b_w = tl.load(p_w, mask=(k // 8 + o_w < stride_w)[None, :], other=0)
            b_s = tl.load(p_s, mask=(k // 32 + o_c < stride_s)[None, :], other=0)
        b_v = _unpacked(b_w, b_s.to(tl.int32), BN, BK, INTERPRET)
        if INTERPRET:
            b_acc = tl.dot(b_v, to_f32(b_x), b_acc, input_precision="ieee")
        elif b_x.dtype == tl.float32:
            # Three BF16 hold 24 bits: the product is that of F32, in three passes.
            b_high = b_x.to(tl.bfloat16)
            b_rest = b_x - b_high.to(tl.float32)
            b_mid = b_rest.to(tl.bfloat16)
            b_low = (b_rest - b_mid.to(tl.float32)).to(tl.bfloat16)
            b_acc = tl.dot(b_v, b_high, b_acc)
            b_acc = tl.dot(b_v, b_mid, b_acc)
            b_acc = tl.dot(b_v, b_low, b_acc)
        else:
            b_acc = tl.dot(b_v, b_x.to(tl.bfloat16, bitcast=True), b_acc)
        p_x += BK
        p_w += BK // 8
        p_s += BK // 32
    return b_acc


@triton.jit
def swizzled(o_row, o_group, columns):
    """Where the scale of a row and a group lies in 128x4 tiles, `columns` of them side by side."""
    o_tile = (o_row // 128)[:, None] * columns + (o_group // 4)[None, :]
    return o_tile * 512 + ((o_row % 32) * 16 + (o_row // 32 % 4) * 4)[:, None] + (o_group % 4)[None, :]


@triton.jit
def decoded(b_codes, b_scale, R: tl.constexpr, BK: tl.constexpr):
    """Values F32 [R, BK] of codes [R, BK / 2] and E4M3 bits [R, BK / 16], in the interpreter."""
    b_c = tl.join(b_codes & 15, b_codes >> 4).to(tl.int32).reshape(R, BK // 16, 16)
    b_v = (((b_c & 8) << 28) | ((b_c & 7) << 22)).to(tl.float32, bitcast=True)
    b_scale = e4m3_value(b_scale.to(tl.int32)) * 1.2676506002282294e30  # 2**100, and 2**26 more below
    return (b_v * b_scale[:, :, None]).reshape(R, BK) * 67108864.0


@triton.jit
def product_fp4(
    x, x_scale, o_t, m_t, w, w_scale, o_n, K, K2, G,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums over K, F32 [BN, BT], without global scales.

    `x` U8 [.., K/2] and `x_scale` E4M3 bits [.., K/16], of which rows `o_t` are taken where `m_t`; `w` U8 [.., K/2]
    and `w_scale` swizzled, of which rows `o_n` are taken; `EVEN`: BK divides K; `K2`, `G`: K/2 and K/16, as arguments
    because Triton then sees how far they are aligned.
    """
    o_b, o_g = tl.arange(0, BK // 2), tl.arange(0, BK // 16)
    p_x = x + o_t[None, :] * K2 + o_b[:, None]
    p_xs = x_scale + o_t[:, None] * G + o_g[None, :]
    p_w = w + o_n[:, None] * K2 + o_b[None, :]
    p_ws = w_scale + swizzled(o_n, o_g, tl.cdiv(K, 64))
    b_acc = tl.zeros((BN, BT), tl.float32)
    for k in range(0, K, BK):
        if EVEN:
            b_x = tl.load(p_x, mask=m_t[None, :], other=0)
            b_xs = tl.load(p_xs, mask=m_t[:, None], other=0)
            b_w = tl.load(p_w)
            b_ws = tl.load(p_ws)
        else:
            m_b, m_g = k // 2 + o_b < K2, k // 16 + o_g < G
            b_x = tl.load(p_x, mask=m_t[None, :] & m_b[:, None], other=0)
            b_xs = tl.load(p_xs, mask=m_t[:, None] & m_g[None, :], other=0)
            b_w = tl.load(p_w, mask=m_b[None, :], other=0)
            b_ws = tl.load(p_ws, mask=m_g[None, :], other=0)
        if INTERPRET:
            b_xv = tl.trans(decoded(tl.trans(b_x), b_xs, BT, BK))
            b_acc = tl.dot(decoded(b_w, b_ws, BN, BK), b_xv, b_acc, input_precision="ieee")
        else:
            b_xs = b_xs.to(tl.float8e4nv, bitcast=True)
            b_ws = b_ws.to(tl.float8e4nv, bitcast=True)
            b_acc = tl.dot_scaled(b_w, b_ws, "e2m1", b_x, b_xs, "e2m1", b_acc)
        p_x += BK // 2
        p_xs += BK // 16
        p_w += BK // 2
        p_ws += BK // 64 * 512
    return b_acc


@triton.jit
def stored(b, p, mask, INTERPRET: tl.constexpr):
    """Store F32 values, rounded once where `p` points to BF16 as int16."""
    if p.dtype.element_ty == tl.int16:
        if INTERPRET:
            tl.store(p, bf16_bits(b), mask=mask)
        else:
            tl.store(p, b.to(tl.bfloat16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(p, b, mask=mask)
