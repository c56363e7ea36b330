"""Root-mean-square norm by the compiled core, `_native/norm.c`: the bits of `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels import native


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    D = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    norm_rope(x.reshape(-1, D), weight_D, eps, None, D, out)
    return out


def norm_rope(
    x_TX: Tensor,
    weight_X: Tensor | None,
    eps: float,
    table: tuple[Tensor, Tensor] | None,
    head_dim: int,
    out: Tensor,
) -> None:
    """Norm under a weight, then rotation by cos and sin [T, 1, R], of rows [T, X]; either may be left out."""
    x = x_TX if x_TX.stride(1) == 1 else x_TX.contiguous()
    T, X = x.shape
    weight, weight_is_bf16 = None, False
    if weight_X is not None:
        weight_X = weight_X.contiguous()
        weight, weight_is_bf16 = weight_X.data_ptr(), weight_X.dtype == torch.bfloat16
    cos = sin = None
    stride, R = 0, -1
    if table is not None:
        first, second = (side.contiguous() for side in table)
        cos, sin, stride, R = first.data_ptr(), second.data_ptr(), first.stride(0), first.shape[-1]
    core = native.function("m27_norm_rope")

    def rows(begin: int, end: int) -> None:
        core(
            x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), X, weight, weight_is_bf16, eps,
            cos, sin, stride, head_dim, R, out.data_ptr(), begin, end,
        )  # fmt: skip

    native.over_rows(rows, T, 1, 4 * X)
