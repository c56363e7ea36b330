"""nvidia-modelopt's own sweep over E4M3 scales, and its export of what it chose, on a CPU.

All is modelopt's but one function: its fake quantization is a Triton kernel for CUDA, which `fake_quantize` writes
down in torch, operation by operation (modelopt/torch/kernels/quantization, 0.47).
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = 448.0,
    out_dtype: torch.dtype | None = None,
    *_: Any,
) -> Tensor:
    """`static_blockwise_fp4_fake_quant`: x [blocks, 16] under the scales that `amax` gives, rounded to E4M3."""
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel import compute_fp4_scales

    scale = compute_fp4_scales(amax, global_amax, quantize_block_scales, fp8_max_for_normalization).view(
        -1, 1
    )
    blocks = x.float().reshape(scale.numel(), -1)
    safe = torch.where((scale == 0) | ~scale.isfinite(), torch.ones_like(scale), scale)
    a = blocks.abs() / safe
    q = 0.5 * (a > 0.25) + 0.5 * (a >= 0.75) + 0.5 * (a > 1.25) + 0.5 * (a >= 1.75)
    q = q + (a > 2.5) + 1.0 * (a >= 3.5) + 2.0 * (a > 5)
    y = torch.where(blocks >= 0, q * safe, -(q * safe))
    return torch.where(scale == 0, torch.zeros_like(y), y).to(out_dtype or x.dtype).view(x.shape)


def pack(x_NK: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A BF16 weight by modelopt's `mse` with `fp8_scale_sweep`: U8 [N, K/2], E4M3 [N, K/16], F32 []."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.export import quant_utils
        from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

    blocks = x_NK.reshape(-1, 16)
    calibrator = NVFP4MSECalibrator(
        amax=blocks.abs().amax(1, keepdim=True).float(),
        global_amax=amax,
        axis=0,
        quant_func=lambda values, candidate: fake_quantize(values, candidate, amax),
    )
    calibrator.collect(blocks)
    quantizer = SimpleNamespace(
        _amax=calibrator.compute_amax(), global_amax=amax, block_sizes={-1: 16}, _num_bits=(2, 1)
    )
    scale_NG, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, x_NK)
    codes = quant_utils.to_quantized_weight(x_NK, scale_NG, quant_utils.QUANTIZATION_NVFP4, scale_2, 16)
    return codes, scale_NG, scale_2
