"""NVFP4 products in plain torch: the specification.

    w = E2M1 * (weight_scale * weight_scale_2)                        `nvfp4_pack.unpack`
    x = E2M1 * (block_scale * input_scale) of the quantized rows      W4A4, `nvfp4_quantize.fake_quantize` in F32
    x = x, in F32                                                     W4A16
    y = sum over K of x * w, accumulated in F32, rounded once to x's dtype

The order of summation is free: backends agree within the tolerance of F32 sums, not in bits.  NaN and Inf in x
propagate as in any product (W4A4: as `nvfp4_quantize` says).

Shapes: T tokens, N out features, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.kernels.nvfp4_pack import reference as nvfp4_pack
from m27quant.kernels.nvfp4_quantize import reference as nvfp4_quantize


def prepare(packed: PackedNVFP4, activations: str) -> tuple[Tensor, ...]:
    """The checkpoint's own tensors."""
    return tuple(packed)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """F32 [N, K]."""
    return nvfp4_pack.unpack(*tensors)


def gemm(
    x_TK: Tensor,
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    activations: str,
    input_scale: Tensor | None,
    invariant: bool,
) -> Tensor:
    """y [T, N] in x's dtype."""
    x_f32 = x_TK.float()
    if activations == "nvfp4":
        assert input_scale is not None
        x_f32 = nvfp4_quantize.fake_quantize(x_TK, input_scale)
    return product(x_f32, nvfp4_pack.unpack(*tensors), invariant).to(x_TK.dtype)


def product(x_TK: Tensor, w_NK: Tensor, invariant: bool) -> Tensor:
    """x w^T of F32 matrices; `invariant`: one row at a time, as BLAS sums in another order for other heights."""
    if invariant:
        return torch.cat([x_1K @ w_NK.T for x_1K in torch.split(x_TK, 1)])
    return x_TK @ w_NK.T
