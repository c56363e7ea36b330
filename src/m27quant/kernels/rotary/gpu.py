"""Rotary embedding, and the query/key norm before it, in Triton: the bits of `reference`.

One program a row of q or of k: the row is read once, normed over all its heads, turned and written.  A row lies in
three tiles: the first halves of the pairs, their second halves, and what passes.

In the kernels: b_ a tile, o_ offsets, m_ a mask; BH heads, BR pairs and BP passed dimensions, as powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels.bits import as_bits, bf16_bits, rounded, to_f32
from m27quant.kernels.rms_norm.gpu import OPTIONS, scale_of_mean


@triton.jit
def _square_sum(b):
    b = b.to(tl.float64)
    return tl.sum(tl.sum(b * b, axis=1), axis=0)


@triton.jit
def _normed(b_x, scale, weight, o, m, BF16: tl.constexpr):
    return rounded(to_f32(tl.load(weight + o, mask=m, other=0)) * rounded(b_x * scale, BF16), BF16)


@triton.jit
def _store(y, o, b, m, BF16: tl.constexpr):
    tl.store(y + o, bf16_bits(b) if BF16 else b, mask=m)


@triton.jit
def _row(
    x, weight, cos, sin, y, eps, H, C: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, BF16: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """`x`, `y` [H, C], `weight` [H, C], `cos` and `sin` [R] of one row."""
    o_h, o_r, o_p = tl.arange(0, BH)[:, None], tl.arange(0, BR)[None, :], tl.arange(0, BP)[None, :]
    half: tl.constexpr = R // 2
    o_1 = o_h * C + o_r
    o_2 = o_1 + half
    o_3 = o_h * C + R + o_p
    m_r = o_r < half
    m_1 = (o_h < H) & m_r
    m_3 = (o_h < H) & (o_p < C - R)
    b_1 = to_f32(tl.load(x + o_1, mask=m_1, other=0))
    b_2 = to_f32(tl.load(x + o_2, mask=m_1, other=0))
    b_3 = to_f32(tl.load(x + o_3, mask=m_3, other=0))
    if NORM:
        scale = scale_of_mean(_square_sum(b_1) + _square_sum(b_2) + _square_sum(b_3), H * C, eps)
        b_1 = _normed(b_1, scale, weight, o_1, m_1, BF16)
        b_2 = _normed(b_2, scale, weight, o_2, m_1, BF16)
        b_3 = _normed(b_3, scale, weight, o_3, m_3, BF16)
    b_c1 = to_f32(tl.load(cos + o_r, mask=m_r, other=0))
    b_c2 = to_f32(tl.load(cos + o_r + half, mask=m_r, other=0))
    b_s1 = to_f32(tl.load(sin + o_r, mask=m_r, other=0))
    b_s2 = to_f32(tl.load(sin + o_r + half, mask=m_r, other=0))
    _store(y, o_1, rounded(b_1 * b_c1, BF16) + rounded(-b_2 * b_s1, BF16), m_1, BF16)
    _store(y, o_2, rounded(b_2 * b_c2, BF16) + rounded(b_1 * b_s2, BF16), m_1, BF16)
    _store(y, o_3, b_3, m_3, BF16)


@triton.jit
def norm_rope_kernel(
    q, k, q_norm, k_norm, cos, sin, q_out, k_out, H, J, stride_q, stride_k, stride_cos, stride_sin, eps,
    C: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, BF16: tl.constexpr,
    BH: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of q [T, H, C], or of k [T, J, C] where program_id(1) is 1; BF16 as int16."""
    t = tl.program_id(0).to(tl.int64)
    cos += t * stride_cos
    sin += t * stride_sin
    if tl.program_id(1) == 0:
        _row(
            q + t * stride_q, q_norm, cos, sin, q_out + t * H * C, eps, H, C, R, NORM, BF16, BH, BR, BP
        )  # fmt: skip
    else:
        _row(
            k + t * stride_k, k_norm, cos, sin, k_out + t * J * C, eps, J, C, R, NORM, BF16, BJ, BR, BP
        )  # fmt: skip


def rotate(x_THC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """See `reference.rotate`."""
    return _launch(x_THC, None, None, None, cos_T1R, sin_T1R, 0.0)[0]


def qk_norm_rope(
    q_TQ: Tensor,
    k_TX: Tensor,
    q_norm_Q: Tensor,
    k_norm_X: Tensor,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.qk_norm_rope`."""
    q_THC, k_TJC = (x.reshape(len(x), x.shape[1] // head_dim, head_dim) for x in (q_TQ, k_TX))
    return _launch(q_THC, k_TJC, q_norm_Q, k_norm_X, cos_T1R, sin_T1R, eps)


def _launch(
    q_THC: Tensor,
    k_TJC: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_T1R: Tensor,
    sin_T1R: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    T, H, C = q_THC.shape
    R = cos_T1R.shape[-1]
    one = k_TJC is None
    q = _rows(q_THC)
    k = q if k_TJC is None else _rows(k_TJC)
    J = k.shape[1]
    q_norm, k_norm = (
        q if norm is None else norm.contiguous() for norm in (q_norm, k_norm)
    )  # never read without norm
    cos, sin = _rows(cos_T1R), _rows(sin_T1R)
    q_out = torch.empty((T, H, C), dtype=q.dtype, device=q.device)
    k_out = q_out if one else torch.empty((T, J, C), dtype=q.dtype, device=q.device)
    if T and H * J:
        BH, BJ, BR, BP = (triton.next_power_of_2(max(n, 1)) for n in (H, J, R // 2, C - R))
        elements = BH * (2 * BR + BP)
        norm_rope_kernel[(T, 1 if one else 2)](
            *map(as_bits, (q, k, q_norm, k_norm, cos, sin, q_out, k_out)),
            H, J, q.stride(0), k.stride(0), cos.stride(0), sin.stride(0), eps,
            C=C, R=R, NORM=not one, BF16=q.dtype == torch.bfloat16, BH=BH, BJ=BJ, BR=BR, BP=BP,
            num_warps=min(max(elements // 1024, 1), 8), **OPTIONS,
        )  # fmt: skip
    return q_out, k_out


def _rows(x: Tensor) -> Tensor:
    """x itself where everything but its first side lies together, else a copy."""
    return x if x[:1].is_contiguous() else x.contiguous()
