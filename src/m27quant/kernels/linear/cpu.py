"""Batch-invariant products by the compiled core, `_native/linear.c`: one order of the sum for every output.

Shapes: T rows, K in features, N out features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import cpu_level, native

_STRETCH = 32
_TILE_ROWS = 6
_F32, _BF16, _BF16_PAIRS = range(3)  # how x and w lie in memory, by the core's numbers


def linear_invariant(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """See `reference.linear_invariant`."""
    (T, K), N = x_TK.shape, len(w_NK)
    y_TN = torch.empty(T, N, dtype=x_TK.dtype)
    x, w = _rows(x_TK), _rows(w_NK)
    bf16 = x.dtype == torch.bfloat16, w.dtype == torch.bfloat16
    if all(bf16) and cpu_level.LEVELS[cpu_level.level()] == "avx512-bf16":
        kind = _BF16_PAIRS
    else:
        kind = _BF16 if bf16[1] else _F32
        x = _prepared(x, w.dtype)
    arguments = (
        kind,
        x.data_ptr(),
        x.stride(0),
        w.data_ptr(),
        w.stride(0),
        y_TN.data_ptr(),
        bf16[0],
        T,
        N,
        K,
    )
    core = functools.partial(native.function("m27_linear"), *arguments)
    native.over_rows(core, N, _TILE_ROWS, K * w.element_size() * max(T // 4, 1))
    return y_TN


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with the elements of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _prepared(x_TK: Tensor, w_dtype: torch.dtype) -> Tensor:
    """x in F32, its elements in the order in which the core meets those of the weights."""
    T, K = x_TK.shape
    padded = -(-K // _STRETCH) * _STRETCH
    out = torch.empty(T, padded)
    bf16 = x_TK.dtype == torch.bfloat16, w_dtype == torch.bfloat16
    native.function("m27_linear_rows")(
        x_TK.data_ptr(), bf16[0], x_TK.stride(0), T, K, bf16[1], padded, out.data_ptr()
    )
    return out
