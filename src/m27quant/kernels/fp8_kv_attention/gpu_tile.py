"""The kernels of paged attention: one for rows and keys, one that joins chunks; `gpu` launches them and explains.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BM rows times heads, GP heads of a group, BK keys, CP head_dim, XP
tail (powers of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from m27quant.kernels.bits import bf16_bits, to_f32


@triton.jit
def chunk_start(chunk, BASE: tl.constexpr):
    """The first key of a chunk."""
    return ((16 << (chunk // 16)) - 16 + ((chunk % 16) << (chunk // 16))) * BASE


@triton.jit
def num_chunks(keys, BASE: tl.constexpr):
    """How many chunks hold some keys."""
    last = (keys + BASE - 1) // BASE - 1
    level = ((last // 16 + 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(keys > 0, level * 16 + ((last - (16 << level) + 16) >> level) + 1, 0)


@triton.jit
def merged(b_m, b_l, b_acc, b_m2, b_l2, b_acc2):
    """Two softmax sums with their maxima (base 2) as one; rows on the first side, -inf and zeros where empty."""
    b_top = tl.maximum(b_m, b_m2)
    b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_a, b_b = tl.exp2(b_m - b_ref), tl.exp2(b_m2 - b_ref)
    return b_top, b_l * b_a + b_l2 * b_b, b_acc * b_a[:, None] + b_acc2 * b_b[:, None]


@triton.jit
def _e4m3_to_f16(b):
    """E4M3, or its bits on chips without it, as F16; exact."""
    if b.dtype == tl.uint8:
        b_h = b.to(tl.int16)
        b_v = (((b_h & 0x80) << 8) | ((b_h & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((b_h & 0x7F) == 0x7F, float("nan"), b_v).to(tl.float16)
    return b.to(tl.float16)


@triton.jit
def _attend(
    b_q, b_scale, b_m, b_l, b_acc, k_cache, v_cache, o_slot, m_key, o_key, b_end,
    C: tl.constexpr, STRIDE: tl.constexpr, F16: tl.constexpr, F32: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax; row m sees the keys before b_end[m]."""
    o_c = tl.arange(0, CP)
    o_cache = o_slot[:, None] * STRIDE + o_c[None, :]
    m_cache = m_key[:, None] & (o_c < C)[None, :]
    b_k = tl.load(k_cache + o_cache, mask=m_cache, other=0.0)
    b_v = tl.load(v_cache + o_cache, mask=m_cache, other=0.0)
    if F32:
        b_k, b_v = to_f32(b_k), to_f32(b_v)
    if F16:
        b_k, b_v = _e4m3_to_f16(b_k), _e4m3_to_f16(b_v)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_scale[:, None]
    b_s = tl.where(o_key[None, :] < b_end[:, None], b_s, float("-inf"))
    b_top = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_p = tl.exp2(b_s - b_ref[:, None])
    b_a = tl.exp2(b_m - b_ref)
    b_l = b_l * b_a + tl.sum(b_p, axis=1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_a[:, None], input_precision="ieee")
    return b_top, b_l, b_acc


@triton.jit
def _chunk(
    b_q, b_scale, s, b_shared, b_len, o_r, chunk, k_cache, v_cache, table, context, tail,
    t_first, T, B, X, C: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, BASE: tl.constexpr, TAIL: tl.constexpr,
    F16: tl.constexpr, F32: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """The softmax sums of one chunk of sequence s: maxima (base 2), sums and weighted values."""
    start, stop = chunk_start(chunk, BASE), chunk_start(chunk + 1, BASE)
    b_m = tl.full((BM,), float("-inf"), tl.float32)
    b_l = tl.zeros((BM,), tl.float32)
    b_acc = tl.zeros((BM, CP), tl.float32)
    b_end = tl.minimum(b_shared, stop)
    hi = tl.max(b_end, axis=0)
    for k0 in range(start, hi, BK):
        o_key = k0 + tl.arange(0, BK)
        m_key = o_key < hi
        o_slot = table_slots(table, s, B, o_key, m_key, PAGE)
        b_m, b_l, b_acc = _attend(
            b_q, b_scale, b_m, b_l, b_acc, k_cache, v_cache, o_slot, m_key, o_key, b_end, C, STRIDE, F16, F32, CP
        )  # fmt: skip
    if TAIL:
        for r in range(ROWS):
            t = tl.minimum(t_first + r, T - 1)
            n = tl.load(context + t).to(tl.int32)
            keys = tl.max(tl.where(o_r == r, b_len, 0), axis=0)
            hi = tl.where(keys > n, tl.minimum(keys, stop), 0)
            b_end = tl.where(o_r == r, hi, 0)
            for k0 in range(tl.maximum(start, n // BK * BK), hi, BK):
                o_key = k0 + tl.arange(0, BK)
                m_key = o_key < hi
                o_slot = table_slots(table, s, B, o_key, m_key & (o_key < n), PAGE)
                o_tail = t.to(tl.int64) * X + o_key - n
                b_own = tl.load(tail + o_tail, mask=m_key & (o_key >= n), other=0).to(tl.int64)
                o_slot = tl.where(o_key < n, o_slot, b_own)
                b_m, b_l, b_acc = _attend(
                    b_q, b_scale, b_m, b_l, b_acc, k_cache, v_cache, o_slot, m_key, o_key, b_end, C, STRIDE, F16, F32,
                    CP,
                )  # fmt: skip
    return b_m, b_l, b_acc


@triton.jit
def attention_kernel(
    q, k_cache, v_cache, table, sequence, context, tail, k_scale, v_scale, y, part_ml, part_acc,
    T, B, X, chunks, stride_t, stride_h, softmax_scale,
    J: tl.constexpr, G: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, BASE: tl.constexpr,
    SPLIT: tl.constexpr, ONE: tl.constexpr, TAIL: tl.constexpr, FP8: tl.constexpr, F16: tl.constexpr,
    F32: tl.constexpr, BF16_OUT: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, GP: tl.constexpr,
    BK: tl.constexpr, CP: tl.constexpr, XP: tl.constexpr,
):  # fmt: skip
    """`y` [T, H, C]; with SPLIT chunk program_id(2): `part_ml` F32 [T, H, chunks, 2], `part_acc` [T, H, chunks, C].

    ONE: there is one chunk to do, nothing to merge.
    """
    H: tl.constexpr = J * G
    STRIDE: tl.constexpr = J * C
    # the rows with most keys come last in a prefill: start with them
    t_first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    j = tl.program_id(1)
    o_m = tl.arange(0, BM)
    o_r = o_m // GP
    o_t = t_first + o_r
    m_m = (o_r < ROWS) & (o_t < T) & (o_m % GP < G)
    b_sequence = tl.load(sequence + o_t, mask=m_m, other=-1).to(tl.int32)
    b_context = tl.load(context + o_t, mask=m_m, other=0).to(tl.int32)
    b_shared, b_len = b_context, b_context
    if TAIL:
        b_tail = tail_length(tail, o_t, m_m, X, XP)
        b_len = b_context + b_tail
        b_shared = tl.where(b_tail > 0, b_context // BK * BK, b_context)
    first = 0
    if SPLIT:
        first = tl.program_id(2)
        if first >= num_chunks(tl.max(b_len, axis=0), BASE):
            return

    o_c = tl.arange(0, CP)
    h = j * G + o_m % GP
    o_q = o_t.to(tl.int64)[:, None] * stride_t + h[:, None] * stride_h + o_c[None, :]
    b_q = tl.load(q + o_q, mask=m_m[:, None] & (o_c < C)[None, :], other=0.0)
    b_scale = tl.zeros((BM,), tl.float32) + softmax_scale
    if FP8:
        b_scale *= tl.load(k_scale)
    if F32:
        b_q = to_f32(b_q)
    if F16:
        b_q, b_power = _to_f16(to_f32(b_q))
        b_scale *= b_power
    k_cache += j * C
    v_cache += j * C

    for r in range(ROWS):
        s = tl.load(sequence + tl.minimum(t_first + r, T - 1)).to(tl.int32)
        b_same = m_m & (b_sequence == s)
        # a sequence is walked once, for the first of its rows, and written before the next: a NaN stays in it
        if (t_first + r < T) & (tl.min(tl.where(b_same, o_r, BM), axis=0) == r):
            r_shared, r_len = tl.where(b_same, b_shared, 0), tl.where(b_same, b_len, 0)
            # the first chunk apart from the loop: fewer registers
            b_m, b_l, b_acc = _chunk(
                b_q, b_scale, s, r_shared, r_len, o_r, first, k_cache, v_cache, table, context, tail,
                t_first, T, B, X, C, STRIDE, PAGE, BASE, TAIL, F16, F32, ROWS, BM, BK, CP,
            )  # fmt: skip
            if not ONE:
                for chunk in range(1, num_chunks(tl.max(r_len, axis=0), BASE)):
                    c_m, c_l, c_acc = _chunk(
                        b_q, b_scale, s, r_shared, r_len, o_r, chunk, k_cache, v_cache, table, context, tail,
                        t_first, T, B, X, C, STRIDE, PAGE, BASE, TAIL, F16, F32, ROWS, BM, BK, CP,
                    )  # fmt: skip
                    b_m, b_l, b_acc = merged(b_m, b_l, b_acc, c_m, c_l, c_acc)
            o_y = o_t.to(tl.int64) * H + h
            if SPLIT:
                o_y = o_y * chunks + first
                m_y = b_same & (chunk_start(first, BASE) < b_len)
                tl.store(part_ml + o_y * 2, b_m, mask=m_y)
                tl.store(part_ml + o_y * 2 + 1, b_l, mask=m_y)
                tl.store(
                    part_acc + o_y[:, None] * C + o_c[None, :], b_acc, mask=m_y[:, None] & (o_c < C)[None, :]
                )
            else:
                b_y = finished(b_l, b_acc, b_len, v_scale, FP8)
                b_y = bf16_bits(b_y) if BF16_OUT else b_y
                tl.store(y + o_y[:, None] * C + o_c[None, :], b_y, mask=b_same[:, None] & (o_c < C)[None, :])


@triton.jit
def tail_length(tail, o_t, m_t, X, XP: tl.constexpr):
    """How many slots each row's tail has before its first -1."""
    o_x = tl.arange(0, XP)
    o_tail = o_t.to(tl.int64)[:, None] * X + o_x[None, :]
    b_tail = tl.load(tail + o_tail, mask=m_t[:, None] & (o_x < X)[None, :], other=-1)
    return tl.min(tl.where(b_tail < 0, o_x[None, :], XP), axis=1)


@triton.jit
def table_slots(table, s, B, o_key, m_key, PAGE: tl.constexpr):
    """The slots (int64) of positions of sequence s."""
    b_block = tl.load(table + s.to(tl.int64) * B + o_key // PAGE, mask=m_key, other=0)
    return b_block.to(tl.int64) * PAGE + o_key % PAGE


@triton.jit
def _to_f16(b_q):
    """Rows in F16 with a largest magnitude from 1 to 4, and the power of two that each was divided by."""
    b_field = tl.max(b_q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1) >> 23
    b_field = tl.where(
        b_field > 253, tl.where(b_field == 255, 127, 253), b_field
    )  # Inf and NaN stay what they are
    b_down = ((254 - b_field) << 23).to(tl.float32, bitcast=True)
    return (b_q * b_down[:, None]).to(tl.float16), (b_field << 23).to(tl.float32, bitcast=True)


@triton.jit
def finished(b_l, b_acc, b_len, v_scale, FP8: tl.constexpr):
    """Softmax sums to results; zeros for rows without keys."""
    b_y = tl.div_rn(b_acc, tl.zeros_like(b_acc) + b_l[:, None])
    if FP8:
        b_y *= tl.load(v_scale)
    return tl.where((b_len > 0)[:, None], b_y, 0.0)


@triton.jit
def join_kernel(
    part_ml, part_acc, context, tail, v_scale, y, X, chunks,
    H: tl.constexpr, C: tl.constexpr, BASE: tl.constexpr, TAIL: tl.constexpr, FP8: tl.constexpr,
    BF16_OUT: tl.constexpr, BH: tl.constexpr, CP: tl.constexpr, XP: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of BH heads of row program_id(0)."""
    t = tl.program_id(0)
    o_h, o_c = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, CP)
    m_h = o_h < H
    m_hc = m_h[:, None] & (o_c < C)[None, :]
    b_len = tl.zeros((BH,), tl.int32) + tl.load(context + t).to(tl.int32)
    if TAIL:
        b_len += tail_length(tail, t + tl.zeros((BH,), tl.int32), o_h >= 0, X, XP)
    o = (t.to(tl.int64) * H + o_h) * chunks
    b_m = tl.full((BH,), float("-inf"), tl.float32)
    b_l = tl.zeros((BH,), tl.float32)
    b_acc = tl.zeros((BH, CP), tl.float32)
    for _ in range(num_chunks(tl.max(b_len, axis=0), BASE)):
        c_m = tl.load(part_ml + o * 2, mask=m_h, other=float("-inf"))
        c_l = tl.load(part_ml + o * 2 + 1, mask=m_h, other=0.0)
        c_acc = tl.load(part_acc + o[:, None] * C + o_c[None, :], mask=m_hc, other=0.0)
        b_m, b_l, b_acc = merged(b_m, b_l, b_acc, c_m, c_l, c_acc)
        o += 1
    b_y = finished(b_l, b_acc, b_len, v_scale, FP8)
    o_y = (t.to(tl.int64) * H + o_h)[:, None] * C + o_c[None, :]
    tl.store(y + o_y, bf16_bits(b_y) if BF16_OUT else b_y, mask=m_hc)
