"""NVFP4 packing with error feedback (GPTQ): what rounding a column does to the outputs, later columns make good.

`factor.py` prepares the Hessian of the inputs, once for all weights that read them; `reference.py` specifies the rest.
Shapes: N out features, K in features.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from m27quant.errors import CalibrationError
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.dispatch import choose
from m27quant.kernels.fp8_dequant import BLOCK
from m27quant.kernels.nvfp4_gptq import reference
from m27quant.kernels.nvfp4_gptq.factor import DAMPING, Factor, factorize
from m27quant.kernels.nvfp4_pack import PackedNVFP4, checks

__all__ = ["DAMPING", "Factor", "energy", "factorize", "pack"]


def pack(
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    amax: Tensor,
    factor: Factor,
    block: tuple[int, int] = BLOCK,
    out: tuple[Tensor, Tensor] | None = None,
) -> PackedNVFP4:
    """Encode a weight in NVFP4 so that its products with the inputs behind `factor` change least, column by column.

    Rows are independent: the same bytes however they are cut, and on a CPU for any number of threads.

    Args:
        weight: as for `nvfp4_pack.pack`, as are `scale_inv`, `amax`, `block`, `out` and `weight_scale_2` of the result.
        factor: of the inputs' Hessian [K, K], on the weight's device.

    Raises:
        CheckpointError: as for `nvfp4_pack.pack`.
        CalibrationError: feedback that leaves F32.
        ValueError: an `amax`, `out` or `factor` that does not fit.
    """
    checks.check_weight(weight, scale_inv, block)
    checks.check_amax(amax)
    _check_factor(factor, weight)
    weight_scale_2 = nvfp4_pack.reference.global_scale(amax.to(weight.device))
    codes, scale = nvfp4_pack.buffers(weight, out)
    x_NK = weight if scale_inv is None else fp8_dequant.dequantize(weight, scale_inv, block=block)
    if not _backend(weight.device).pack(x_NK, weight_scale_2, factor, codes, scale):
        if not bool(x_NK.isfinite().all()):
            raise checks.nonfinite_error(weight, scale_inv, block)
        raise CalibrationError(
            f"error feedback over {weight.shape[1]} channels overflows F32: their Hessian is nearly singular",
            hint="use a larger damping",
        )
    return PackedNVFP4(codes, scale, weight_scale_2)


def energy(x: Tensor, factor: Factor) -> float:
    """tr(x (H + damping) x^T) of F32 or BF16 [N, K]: of a weight, or of the error of one, in squares of outputs."""
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 2:
        raise ValueError(f"x must be a float32 or bfloat16 matrix, is {x.dtype} {list(x.shape)}")
    _check_factor(factor, x)
    return math.fsum(_backend(x.device).energies(x.float(), factor).tolist())


def _backend(device: torch.device) -> ModuleType:
    backend = choose("nvfp4_gptq", device).backend
    if backend == "cpu-native":
        from m27quant.kernels.nvfp4_gptq import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.nvfp4_gptq import gpu

        return gpu
    return reference


def _check_factor(factor: Factor, weight: Tensor) -> None:
    K = weight.shape[1]
    if len(factor.pivots) != K or factor.pivots.device != weight.device:
        raise ValueError(
            f"factor has {len(factor.pivots)} channels on {factor.pivots.device}, the weight {K} on {weight.device}"
        )
