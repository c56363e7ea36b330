"""What packing cost where columns count differently: the error that `channel_weight` lets `pack` minimise.

Shapes: N out features, K in features, R rows of a strip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_pack import SquaredError
from m27quant.kernels.nvfp4_pack.reference import E2M1_VALUES, GROUP

STRIP_ELEMENTS = 1 << 18
"""Small enough for a cache, and for any memory budget."""


def weighted_error(weight_NK: Tensor, packed: Sequence[Tensor], channel_weight_K: Tensor) -> SquaredError:
    """Sums of x * x and (x - y) * (x - y), those of column j times channel_weight[j].

    Args:
        weight_NK: bfloat16 [N, K].
        packed: the `PackedNVFP4` of it.
        channel_weight_K: F32 [K].
    """
    codes_NK2, scale_NG, weight_scale_2 = packed
    N, K = weight_NK.shape
    sums_2K = torch.zeros(2, K, dtype=torch.float64, device=weight_NK.device)
    step = max(1, STRIP_ELEMENTS // K)
    pairs = _pairs(weight_NK.device)
    for first in range(0, N, step):
        rows = slice(first, first + step)
        x_RK = weight_NK[rows].double()
        sums_2K[0] += x_RK.square().sum(0)
        y_RG16 = (
            pairs.index_select(0, codes_NK2[rows].flatten().int())
            .view(torch.float32)
            .view(len(x_RK), -1, GROUP)
        )
        y_RG16 *= (scale_NG[rows].float() * weight_scale_2)[..., None]
        x_RK -= y_RG16.flatten(1)
        sums_2K[1] += x_RK.square_().sum(0)
    signal, noise = (sums_2K @ channel_weight_K.to(sums_2K.device).double()).tolist()
    return SquaredError(signal, noise)


def _pairs(device: torch.device) -> Tensor:
    """The two F32 values of each byte of codes as one word [256]: a lookup a byte, as `unpack` has it by nibble."""
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1).view(torch.float64).flatten()
