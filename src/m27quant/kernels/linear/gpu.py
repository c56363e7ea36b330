"""Batch-invariant products in Triton: one tile and one order of the sum, whatever the number of rows.

K is cut into segments.  A segment is summed by itself, and the segments' sums are added in order: with few rows by
programs of their own and a second kernel, with many rows by one program after another.  Both do the same operations
in the same order, so the choice does not show in a single bit.  The weights are the left side of the product (the
M side of the tensor cores), so that 64 rows of x fill a tile and one row still reads every weight once.

BF16 weights with BF16 rows go to tensor cores and accumulate in F32; anything with F32 in it is computed in true F32,
never in TF32.  In Triton's interpreter, which cannot multiply BF16, all is F32.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BN weight rows, BT rows of x, BK features in a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels import chip
from m27quant.kernels.bits import as_bits, bf16_bits, to_f32

OPTIONS = {"num_stages": 3, "enable_fp_fusion": False}
PROGRAMS = 264
"""What is wanted of a launch: two for each of an H200's multiprocessors.  Fixed, so that no chip sums differently."""
SUM_TILE = 1024


class Plan(NamedTuple):
    """Tiles and segments of a product; depends on the weight and the dtypes alone."""

    BN: int
    BT: int
    BK: int
    segment: int
    """Features that are summed before the segments are added."""


def plan(N: int, K: int, *, tensor_cores: bool) -> Plan:
    """How a weight [N, K] is cut."""
    if not tensor_cores:
        # 32 rows: with 64 Triton 3.6 takes the tensor cores of sm_100, and TF32 with them, whatever it is told
        BN, BT, BK, least = 32, 32, 32, 128
    elif K % 64:
        BN, BT, BK, least = 64, 64, 32, 256
    else:
        BN, BT, BK, least = (128 if N >= 2048 else 64), 64, 64, 256
    wanted = -(-PROGRAMS // -(-N // BN))
    return Plan(BN, BT, BK, max(-(-K // wanted // least) * least, least))


@triton.jit
def linear_kernel(
    x, w, y, T, N, K, stride_x, stride_w,
    SEGMENT: tl.constexpr, SPLIT: tl.constexpr, F32: tl.constexpr, EVEN: tl.constexpr, BF16_OUT: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`y` [T, N]; with SPLIT the sum of segment program_id(2) to `y` F32 [segments, T, N].  BF16 as int16 if F32."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_w = w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * stride_w + o_k[None, :]
    p_x = x + tl.minimum(o_t, T - 1).to(tl.int64)[None, :] * stride_x + o_k[:, None]
    segments = tl.cdiv(K, SEGMENT)
    first = 0
    if SPLIT:
        first = tl.program_id(2)
        segments = first + 1
    b_total = tl.zeros((BN, BT), tl.float32)
    for segment in range(first, segments):
        b_sum = tl.zeros((BN, BT), tl.float32)
        for k in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, K), BK):
            if EVEN:
                b_w = tl.load(p_w + k)
                b_x = tl.load(p_x + k)
            else:
                b_w = tl.load(p_w + k, mask=(o_k < K - k)[None, :], other=0)
                b_x = tl.load(p_x + k, mask=(o_k < K - k)[:, None], other=0)
            if F32:
                b_w, b_x = to_f32(b_w), to_f32(b_x)
            b_sum = tl.dot(b_w, b_x, b_sum, input_precision="ieee")
        b_total += b_sum
    o_y = o_t.to(tl.int64)[None, :] * N + o_n[:, None]
    if SPLIT:
        o_y += tl.program_id(2).to(tl.int64) * T * N
    m_y = (o_n < N)[:, None] & (o_t < T)[None, :]
    tl.store(y + o_y, bf16_bits(b_total) if BF16_OUT else b_total, mask=m_y)


@triton.jit
def sum_segments_kernel(parts, y, elements, segments, BF16_OUT: tl.constexpr, B: tl.constexpr):
    """`y` [elements]: `parts` F32 [segments, elements], added in order."""
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    m = o < elements
    b_total = tl.zeros((B,), tl.float32)
    for _ in range(segments):
        b_total += tl.load(parts + o, mask=m, other=0.0)
        parts += elements
    tl.store(y + o, bf16_bits(b_total) if BF16_OUT else b_total, mask=m)


def linear_invariant(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """See `reference.linear_invariant`."""
    T, N = len(x_TK), len(w_NK)
    y = torch.empty((T, N), dtype=x_TK.dtype, device=x_TK.device)
    if not y.numel():
        return y
    if not x_TK.shape[1]:
        return y.zero_()
    if not _splits(x_TK, w_NK):
        _launch(x_TK, w_NK, y, split=False)
        return y
    parts = segment_sums(x_TK, w_NK)
    elements = T * N
    sum_segments_kernel[(triton.cdiv(elements, SUM_TILE),)](
        parts, as_bits(y), elements, len(parts), BF16_OUT=y.dtype == torch.bfloat16, B=SUM_TILE, **OPTIONS
    )
    return y


def segment_sums(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """The product before its last step, F32 [segments, T, N]; `linear_invariant` adds them in this order."""
    T, K = x_TK.shape
    segment = _plan(x_TK, w_NK).segment
    parts = torch.empty((-(-K // segment), T, len(w_NK)), dtype=torch.float32, device=x_TK.device)
    _launch(x_TK, w_NK, parts, split=True)
    return parts


def _splits(x_TK: Tensor, w_NK: Tensor) -> bool:
    """There are segments, and too few tiles to fill a GPU without them."""
    tiles = _plan(x_TK, w_NK)
    programs = triton.cdiv(len(x_TK), tiles.BT) * triton.cdiv(len(w_NK), tiles.BN)
    return programs < PROGRAMS and x_TK.shape[1] > tiles.segment


def _plan(x_TK: Tensor, w_NK: Tensor) -> Plan:
    return plan(*w_NK.shape, tensor_cores=x_TK.dtype == w_NK.dtype == torch.bfloat16)


def _launch(x_TK: Tensor, w_NK: Tensor, y: Tensor, *, split: bool) -> None:
    (T, K), N = x_TK.shape, len(w_NK)
    BN, BT, BK, segment = _plan(x_TK, w_NK)
    # mixed dtypes, F32, and the interpreter
    f32 = not (x_TK.dtype == w_NK.dtype == torch.bfloat16) or x_TK.device.type == "cpu"
    x, w = (m if m.stride(1) == 1 else m.contiguous() for m in (x_TK, w_NK))
    tensor_memory = (
        x.device.type != "cpu" and chip.of(x.device).tmem
    )  # it holds the sums, registers stay free
    grid = (triton.cdiv(T, BT), triton.cdiv(N, BN), triton.cdiv(K, segment) if split else 1)
    linear_kernel[grid](
        as_bits(x) if f32 else x, as_bits(w) if f32 else w, as_bits(y), T, N, K, x.stride(0), w.stride(0),
        SEGMENT=segment, SPLIT=split, F32=f32, EVEN=K % BK == 0, BF16_OUT=y.dtype == torch.bfloat16,
        BN=BN, BT=BT, BK=BK, num_warps=8 if BN == 128 and not tensor_memory else 4, **OPTIONS,
    )  # fmt: skip
