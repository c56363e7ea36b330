"""NVFP4 with error feedback by the compiled core, `_native/nvfp4_gptq.c`: the bytes of `reference`, far faster."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.nvfp4_gptq.factor import Factor
from m27quant.kernels.nvfp4_gptq.reference import channel_weights
from m27quant.kernels.nvfp4_pack.reference import GROUP

ROWS = 16
"""Computed side by side."""


def decompose(hessian: Tensor, order_K: Tensor, added: float) -> tuple[Tensor, Tensor] | None:
    """See `decomposition.decompose`."""
    K, last_first_K = len(order_K), order_K.flip(0).int()
    upper_KK = torch.empty(K, K, dtype=torch.float64)
    native.function("m27_arrange")(hessian.data_ptr(), last_first_K.data_ptr(), added, upper_KK.data_ptr(), K)
    done = native.function("m27_cholesky")(upper_KK.data_ptr(), K, added / 2)
    if done < 0:
        raise MemoryError("no memory for a panel of the Cholesky factor")
    if not done:
        return None
    coupling_GK16 = torch.empty(K // GROUP, K, GROUP)
    native.function("m27_couplings")(upper_KK.data_ptr(), K, coupling_GK16.data_ptr())
    return coupling_GK16, upper_KK.diagonal().square().flip(0)


def pack(
    weight_NK: Tensor,
    weight_scale_2: Tensor,
    factor: Factor,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `reference.pack`."""
    weight_NK, channel_G16 = weight_NK.contiguous(), channel_weights(factor)
    K = weight_NK.shape[1]
    arrays = (factor.order, factor.coupling, channel_G16, out_codes_NK2, out_scale_NG)
    arguments = (weight_NK.data_ptr(), K, float(weight_scale_2), *(array.data_ptr() for array in arrays))
    call = functools.partial(native.function("m27_gptq_pack"), *arguments)
    return bool(_least(native.over_rows(call, len(weight_NK), ROWS, K * K)))


def energies(x_NK: Tensor, factor: Factor) -> Tensor:
    """See `reference.energies`."""
    x_NK, energy_N = x_NK.contiguous(), torch.empty(len(x_NK), dtype=torch.float64)
    K = x_NK.shape[1]
    arrays = (factor.order, factor.coupling, factor.pivots, energy_N)
    call = functools.partial(
        native.function("m27_gptq_energy"), x_NK.data_ptr(), K, *(array.data_ptr() for array in arrays)
    )
    _least(native.over_rows(call, len(x_NK), ROWS, K * K))
    return energy_N


def _least(found: list[int]) -> int:
    if min(found) < 0:
        raise MemoryError("no memory for the errors of 16 rows")
    return min(found)
