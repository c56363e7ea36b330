"""Paged attention in Triton: one kernel for prefill, decoding and draft trees, and one that joins chunks.

A program has some rows of one key/value head: ROWS query tokens times their G query heads, as the M side of the
products.  It walks over each sequence's keys in tiles; rows of one sequence share a tile.  Where a row's list ends in a
tail of its own, its last tiles are walked for it alone, with the same instructions on the same shapes, so that it does
not matter whether a key came through the block table or the tail.

A row's keys are cut into chunks by their place in its list: 16 chunks of BASE keys, 16 of twice as many, and so on.
Every chunk has its own softmax, and chunks are merged in order: by the joining kernel, where chunks are spread over
programs (few rows), or at once in the same program (many).  Both merge by the same operations.  With `invariant` BASE
and tiles are fixed, and rows of other lists in a tile add exact zeros: a row's bits depend on its own list alone.

Values: an FP8 cache is multiplied in F16, which holds every E4M3 number; queries are brought to F16 under a power of
two of their row, probabilities are rounded to F16.  A BF16 cache is multiplied in BF16, with probabilities in BF16.
Anything in F32 is computed in true F32.  Sums, scores and softmax are F32 in any case.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels import chip
from m27quant.kernels.bits import as_bits, bf16_bits, e4m3_bits, to_f32
from m27quant.kernels.fp8_kv_attention.gpu_tile import attention_kernel, join_kernel

OPTIONS = {"enable_fp_fusion": False}
LOG2_E = 1.4426950408889634
CHUNKS_OF_A_SIZE = 16
PROGRAMS = 264
"""With fewer programs than this the keys are spread over more."""
PARTS_BYTES = 256 << 20
"""More than this is not kept for chunks; a long enough launch has programs enough."""


@triton.jit
def write_kv_kernel(
    k, v, k_cache, v_cache, slots, k_scale, v_scale,
    k_stride_t, k_stride_j, v_stride_t, v_stride_j, J, C,
    COPY: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Token program_id(0) into its slot of both caches [slots, J, C]; BF16 as int16, E4M3 as uint8."""
    t = tl.program_id(0)
    slot = tl.load(slots + t)
    o_j, o_c = tl.arange(0, BJ)[:, None], tl.arange(0, BC)[None, :]
    o_cache = slot * J * C + o_j * C + o_c
    m = (o_j < J) & (o_c < C) & (o_cache >= 0)  # below 0 for slot -1
    b_k = tl.load(k + t.to(tl.int64) * k_stride_t + o_j * k_stride_j + o_c, mask=m, other=0)
    b_v = tl.load(v + t.to(tl.int64) * v_stride_t + o_j * v_stride_j + o_c, mask=m, other=0)
    if not COPY:
        b_k, b_v = to_f32(b_k), to_f32(b_v)
        if k_cache.dtype.element_ty == tl.uint8:
            b_k = e4m3_bits(tl.div_rn(b_k, tl.zeros_like(b_k) + tl.load(k_scale))).to(tl.uint8)
            b_v = e4m3_bits(tl.div_rn(b_v, tl.zeros_like(b_v) + tl.load(v_scale))).to(tl.uint8)
        if k_cache.dtype.element_ty == tl.int16:
            b_k, b_v = bf16_bits(b_k), bf16_bits(b_v)
    tl.store(k_cache + o_cache, b_k, mask=m)
    tl.store(v_cache + o_cache, b_v, mask=m)


def write_kv(
    k_TJC: Tensor,
    v_TJC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """See `reference.write_kv`."""
    T, J, C = k_TJC.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_TJC, v_TJC))
    if k.dtype != v.dtype:
        k, v = k.float(), v.float()
    if T:
        BJ, BC = triton.next_power_of_2(J), triton.next_power_of_2(C)
        write_kv_kernel[(T,)](
            *map(as_bits, (k, v, k_cache, v_cache)), slots_T.contiguous(), k_scale, v_scale,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), J, C,
            COPY=k.dtype == k_cache.dtype, BJ=BJ, BC=BC, num_warps=min(max(BJ * BC // 512, 1), 8), **OPTIONS,
        )  # fmt: skip


class Plan(NamedTuple):
    """How a launch is cut; with `invariant` all but ROWS and split depends on the model and the dtypes alone."""

    BM: int
    BK: int
    ROWS: int
    BASE: int
    chunks: int
    split: bool
    num_warps: int
    num_stages: int


def plan(
    T: int, S: int, J: int, G: int, C: int, keys: int, *, f32: bool, fp8: bool, wide: bool, invariant: bool
) -> Plan:
    """Tiles for T rows of S sequences, of which none has more than `keys` keys.

    wide: the chip multiplies from shared memory (wgmma, tcgen05); others keep both factors in registers.
    """
    GP = triton.next_power_of_2(G)
    rows = triton.next_power_of_2(-(-T // max(S, 1)))
    if f32:  # 16 rows: with 64 Triton 3.6 takes the tensor cores of sm_100, and TF32 with them, whatever it is told
        BM, BK, warps, stages = 16, 16, 8, 1
    elif invariant or 16 < rows * GP <= 64:
        BM, BK, warps, stages = 64, 64, 8, 2
    elif rows * GP <= 16:
        BM, BK, warps, stages = 16, 64, 4, 3
    else:
        BM, BK, warps, stages = 128, 64, 8, 2
    if not wide and BM >= 64:
        BM, BK, warps = (32, 32, 4) if invariant else (64, 32, 8)
    elif not fp8 and BM >= 64:  # a BF16 tile is twice as large
        BK = 32
    BM = max(BM, GP)
    ROWS = min(BM // GP, rows)
    BASE = 256
    programs = triton.cdiv(T, ROWS) * J
    chunks = _num_chunks(keys, BASE)
    parts = T * J * G * chunks * (C + 2) * 4
    split = programs < PROGRAMS and chunks > 1 and parts <= PARTS_BYTES
    if not split and not invariant:
        BASE = 1 << 26  # one chunk
    return Plan(BM, BK, ROWS, BASE, chunks, split, warps, stages)


def _num_chunks(keys: int, BASE: int) -> int:
    """`num_chunks` on the host."""
    last = -(-keys // BASE) - 1
    level = (last // CHUNKS_OF_A_SIZE + 1).bit_length() - 1
    return level * 16 + ((last - (16 << level) + 16) >> level) + 1 if keys > 0 else 0


def attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_SB: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    tail_TX: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    *,
    invariant: bool = False,
) -> Tensor:
    """See `reference.attention`; sizes of the launch come from shapes alone, so that a CUDA graph can hold it."""
    T, H, C = q_THC.shape
    page, J = k_cache.shape[1:3]
    S, B = block_table_SB.shape
    X = 0 if tail_TX is None else tail_TX.shape[1]
    y = torch.empty((T, H, C), dtype=q_THC.dtype, device=q_THC.device)
    if not y.numel():
        return y
    q = q_THC if q_THC.stride(2) == 1 else q_THC.contiguous()
    interpreted = q.device.type == "cpu"
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    f16 = fp8 and q.dtype == torch.bfloat16
    f32 = not f16 and (interpreted or not q.dtype == k_cache.dtype == torch.bfloat16)
    arch = 90 if interpreted else chip.of(q.device).arch
    native_fp8 = f16 and not interpreted and arch >= 89
    p = plan(T, S, J, H // J, C, B * page + X, f32=f32, fp8=fp8, wide=90 <= arch < 120, invariant=invariant)
    chunks = p.chunks if p.split else 0
    part_ml = torch.empty((T, H, chunks, 2), dtype=torch.float32, device=q.device)
    part_acc = torch.empty((T, H, chunks, C), dtype=torch.float32, device=q.device)
    rows = [x.contiguous() for x in (sequence_T, context_T, context_T if tail_TX is None else tail_TX)]
    both: dict[str, Any] = {
        "BASE": p.BASE,
        "TAIL": X > 0,
        "FP8": fp8,
        "BF16_OUT": y.dtype == torch.bfloat16,
        "C": C,
    }
    both |= {"CP": max(triton.next_power_of_2(C), 16), "XP": triton.next_power_of_2(max(X, 1))}
    caches = (k_cache, v_cache) if native_fp8 or not (fp8 or f32) else (as_bits(k_cache), as_bits(v_cache))
    attention_kernel[(triton.cdiv(T, p.ROWS), J, max(chunks, 1))](
        q if not (f32 or f16) else as_bits(q), *caches, block_table_SB.contiguous(), *rows, k_scale, v_scale,
        as_bits(y), part_ml, part_acc, T, B, X, chunks, q.stride(0), q.stride(1), softmax_scale * LOG2_E,
        J=J, G=H // J, PAGE=page, SPLIT=p.split, ONE=p.split or p.BASE > 256, F16=f16, F32=f32, ROWS=p.ROWS, BM=p.BM,
        GP=triton.next_power_of_2(H // J), BK=p.BK, num_warps=p.num_warps, num_stages=p.num_stages, **both, **OPTIONS,
    )  # fmt: skip
    if p.split:
        BH = 4
        join_kernel[(T, triton.cdiv(H, BH))](
            part_ml,
            part_acc,
            *rows[1:],
            v_scale,
            as_bits(y),
            X,
            chunks,
            H=H,
            BH=BH,
            num_warps=4,
            **both,
            **OPTIONS,
        )
    return y
