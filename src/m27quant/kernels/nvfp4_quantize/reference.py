"""NVFP4 activations in plain torch: the specification.

TransformerEngine's formula, which is FlashInfer's with FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1: only correctly
rounded F32 operations, in this order (vLLM's default takes approximate reciprocals, which no CPU can repeat):

    S           = 1 / input_scale                     2688 / amax of calibration
    block_scale = E4M3(a * (S * F32(1/6)))            a = max|x| of the group of 16, saturating at 448; may be 0
    y           = x * min(1 / (block_scale * (1 / S)), largest F32)
    code        = E2M1(y)                             nearest, ties to even, saturating at 6; the sign is x's, of 0 too

Where a block scale is 0 the codes saturate or are 0: the group stands for zeros.  NaN makes its group NaN.

Shapes: T tokens, K features, G = K/16 groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels.nvfp4_pack.reference import E2M1_MAX, E4M3_MAX, e2m1_codes, groups, unpack

F32_MAX = torch.finfo(torch.float32).max


def quantize(x_TK: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes U8 [T, K/2] and block scales E4M3 [T, G] of activations under `input_scale` F32 []."""
    # Tensors, not Python numbers: torch multiplies by the reciprocal of a number on CUDA.
    one = torch.ones((), device=x_TK.device)
    S = one / input_scale
    sixth = one / torch.full((), E2M1_MAX, device=x_TK.device)
    x_TG16 = groups(x_TK.float())
    amax_TG = x_TG16.abs().amax(-1)
    scale8_TG = (amax_TG * (S * sixth)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    factor_TG = (one / (scale8_TG.float() * (one / S))).clamp(max=F32_MAX)
    magnitude_TK = e2m1_codes((x_TG16 * factor_TG[..., None]).abs()).flatten(1)
    codes_TK = magnitude_TK | (x_TK.signbit().to(torch.uint8) << 3)
    return codes_TK[:, 0::2] | (codes_TK[:, 1::2] << 4), scale8_TG


def swizzle(scale_TG: Tensor) -> Tensor:
    """Block scales [T, G] as [ceil(T/128), ceil(G/4), 32, 4, 4], the 128x4 tiles that cuBLAS reads; padded with 0.

    Row t, group g lies at [t // 128, g // 4, t % 32, t // 32 % 4, g % 4]: "1D block scaling factors layout" in the
    documentation of cuBLAS.
    """
    T, G = scale_TG.shape
    rows, columns = -(-T // 128), -(-G // 4)
    padded = F.pad(scale_TG.view(torch.uint8), (0, columns * 4 - G, 0, rows * 128 - T))
    tiles = padded.view(rows, 4, 32, columns, 4).permute(0, 3, 2, 1, 4)
    return tiles.contiguous().view(scale_TG.dtype)


def fake_quantize(x_TK: Tensor, input_scale: Tensor) -> Tensor:
    """The F32 [T, K] values that the quantized activations stand for."""
    return unpack(*quantize(x_TK, input_scale), input_scale)
