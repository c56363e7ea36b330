"""Quantizing activations to NVFP4 with a static scale: what the input of a W4A4 product becomes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.nvfp4_pack.reference import GROUP, unpack
from m27quant.kernels.nvfp4_quantize import reference

Layout = Literal["plain", "swizzled"]
"""How block scales lie: row-major, or in the 128x4 tiles of cuBLAS and CUTLASS."""


_OVERFLOW = 2.0**128 - 2.0**103
"""From here on numbers are rounded to infinity in F32."""


class QuantizedNVFP4(NamedTuple):
    """Activations in NVFP4; they stand for E2M1(codes) * block_scale * input_scale."""

    codes: Tensor
    """U8 [T, K/2], the even element in the low half."""
    block_scale: Tensor
    """float8_e4m3fn [T, K/16]; swizzled [ceil(T/128), ceil(K/64), 32, 4, 4], zero where it is padded."""


def quantize(x_TK: Tensor, input_scale: Tensor, *, layout: Layout = "plain") -> QuantizedNVFP4:
    """Encode activations [T, K] (F32, BF16 or F16; K a multiple of 16) under `input_scale` F32 [].

    Every step is correctly rounded, so any backend can give the same bytes; the formula is `reference`'s.

    Raises:
        ValueError: shapes, dtypes, devices, a layout that does not exist; on a CPU also a scale without a finite
            positive reciprocal (reading it from an accelerator would wait for it).
    """
    _check(x_TK, input_scale)
    if layout not in ("plain", "swizzled"):
        raise ValueError(f"layout must be 'plain' or 'swizzled', not {layout!r}")
    backend = choose("nvfp4_quantize", x_TK.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.nvfp4_quantize import cpu

        return QuantizedNVFP4(*cpu.quantize(x_TK, input_scale, swizzled=layout == "swizzled"))
    if backend == "triton":
        from m27quant.kernels.nvfp4_quantize import gpu

        return QuantizedNVFP4(*gpu.quantize(x_TK, input_scale, swizzled=layout == "swizzled"))
    codes, block_scale = reference.quantize(x_TK, input_scale)
    if layout == "swizzled":
        block_scale = reference.swizzle(block_scale)
    return QuantizedNVFP4(codes, block_scale)


def fake_quantize(x_TK: Tensor, input_scale: Tensor) -> Tensor:
    """The values [T, K] that quantized activations stand for, rounded once to x's dtype; arguments as `quantize`."""
    return unpack(*quantize(x_TK, input_scale), input_scale).to(x_TK.dtype)


def is_usable(input_scale: Tensor) -> bool:
    """True for a positive finite number whose reciprocal is finite in F32."""
    if input_scale.numel() != 1:
        return False
    value = float(input_scale)
    return 0 < value < math.inf and 1 / value < _OVERFLOW


def _check(x_TK: Tensor, input_scale: Tensor) -> None:
    if x_TK.dim() != 2 or x_TK.shape[1] % GROUP or not x_TK.is_floating_point():
        raise ValueError(
            f"activations need a floating [T, K], K a multiple of {GROUP}; got {list(x_TK.shape)}"
        )
    if input_scale.device != x_TK.device:
        raise ValueError(
            f"activations are on {x_TK.device}, input_scale on {input_scale.device}: move one of them"
        )
    looked_at = input_scale.device.type == "cpu"
    if input_scale.dtype != torch.float32 or input_scale.dim() or (looked_at and not is_usable(input_scale)):
        raise ValueError("input_scale must be a positive F32 [] with a finite reciprocal")
