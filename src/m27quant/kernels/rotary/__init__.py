"""Rotary position embedding over the first dimensions of each head, alone or after MiniMax-M2's query/key norm.

Shapes: T tokens, H query heads, J key/value heads, C head_dim, R rotary_dim (even, at most C).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.rms_norm import check as check_norm
from m27quant.kernels.rotary import reference

__all__ = ["qk_norm_rope", "rotate"]


def rotate(x_THC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of every head (NeoX pairing); dimensions from R on pass.  [T, H, C] in x's dtype.

    x cos + turned(x) sin: both products and their sum are rounded to x's dtype.

    Args:
        x_THC: BF16 or F32.
        cos_T1R: [T, 1, R] in x's dtype, as `runtime.layer.rotary_table` gives it.
        sin_T1R: as cos_T1R.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    _check(x_THC, cos_T1R, sin_T1R)
    result: Tensor = _backend(x_THC).rotate(x_THC, cos_T1R, sin_T1R)
    return result


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
    """`rms_norm` over all heads together, then `rotate`: projections [T, H*C], [T, J*C] to heads [T, H, C], [T, J, C].

    The same values as one after the other, in one pass over q and k.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    for x, norm in ((q_TQ, q_norm_Q), (k_TX, k_norm_X)):
        check_norm(x, norm)
        if x.dim() != 2 or head_dim < 1 or x.shape[1] % head_dim:
            raise ValueError(f"projection {list(x.shape)} does not consist of heads of {head_dim}")
        _check(x.view(len(x), x.shape[1] // head_dim, head_dim), cos_T1R, sin_T1R)
    q_THC, k_TJC = _backend(q_TQ).qk_norm_rope(
        q_TQ, k_TX, q_norm_Q, k_norm_X, cos_T1R, sin_T1R, head_dim, eps
    )
    return q_THC, k_TJC


def _check(x_THC: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> None:
    if x_THC.dtype not in (torch.bfloat16, torch.float32) or x_THC.dim() != 3:
        raise ValueError(f"heads must be BF16 or F32 [T, H, C], are {x_THC.dtype} {list(x_THC.shape)}")
    T, _, C = x_THC.shape
    for name, table in (("cos", cos_T1R), ("sin", sin_T1R)):
        if table.dim() != 3 or table.shape[:2] != (T, 1) or table.shape[2] % 2 or table.shape[2] > C:
            raise ValueError(f"{name} must be [{T}, 1, R], R even and at most {C}; it is {list(table.shape)}")
        if table.dtype != x_THC.dtype or table.device != x_THC.device:
            raise ValueError(
                f"{name} is {table.dtype} on {table.device}, heads are {x_THC.dtype} on {x_THC.device}"
            )
    if cos_T1R.shape != sin_T1R.shape:
        raise ValueError(f"cos {list(cos_T1R.shape)} and sin {list(sin_T1R.shape)} differ")


def _backend(tensor: Tensor) -> ModuleType:
    backend = choose("rotary", tensor.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.rotary import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.rotary import gpu

        return gpu
    return reference
