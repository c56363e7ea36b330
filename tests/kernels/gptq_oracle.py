"""GPTQ as its paper has it (arXiv 2210.17323), in F64, by the Cholesky factor of the inverse Hessian; and what follows.

Nothing is shared with the package: the package neither inverts the Hessian nor updates weights in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_pack import PackedNVFP4

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def correlated_inputs(K: int, tokens: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """F64 [tokens, K]: few directions carry most, channels differ a hundredfold, as activations do."""
    g = torch.Generator().manual_seed(seed)
    rank = rank or K
    strength = torch.logspace(0, -2, rank, dtype=torch.float64)
    directions = torch.randn(rank, K, generator=g, dtype=torch.float64)
    channels = torch.exp(torch.randn(K, generator=g, dtype=torch.float64))
    return torch.randn(tokens, rank, generator=g, dtype=torch.float64) * strength @ directions * channels


def damped(hessian: Tensor, share: float) -> Tensor:
    mean = float(hessian.diagonal().mean())
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype) * (share * mean if mean else share)


def unpacked(packed: PackedNVFP4) -> Tensor:
    """F32 [N, K]."""
    N, G = packed.weight_scale.shape
    codes = torch.stack((packed.weight & 15, packed.weight >> 4), -1).view(N, G, 16)
    d_NG1 = (packed.weight_scale.float() * packed.weight_scale_2)[..., None]
    return (E2M1[codes.int()] * d_NG1).flatten(1)


def output_error(x_NK: Tensor, packed: PackedNVFP4, hessian: Tensor) -> float:
    """tr(E H E^T)."""
    error = x_NK.double() - unpacked(packed).double()
    return float(((error @ hessian.double()) * error).sum())


def turns(hessian: Tensor) -> Tensor:
    """The column of each turn: groups by falling sums of the diagonal, columns of a group by falling values."""
    diagonal = hessian.diagonal().tolist()
    groups = [range(first, first + 16) for first in range(0, len(diagonal), 16)]
    by_sum = sorted(groups, key=lambda group: -sum(diagonal[k] for k in group))
    return torch.tensor([k for group in by_sum for k in sorted(group, key=lambda k: -diagonal[k])])


def updated_weights(x_NK: Tensor, packed: PackedNVFP4, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What GPTQ makes of the weights if it rounds each column to what `packed` says: F64 [N, K] twice, [K].

    The first has every column as it was when its turn came, the second as it was at the first turn of its group; the
    third is how much a column's error counts, 1 / U_jj^2.
    """
    order = turns(hessian)
    back = order.argsort()
    now, y = x_NK.double()[:, order], unpacked(packed).double()[:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(hessian.double()[order][:, order]), upper=True)
    at_turn, at_group = now.clone(), now.clone()
    for j in range(now.shape[1]):
        if j % 16 == 0:
            at_group[:, j : j + 16] = now[:, j : j + 16]
        at_turn[:, j] = now[:, j]
        error = (now[:, j] - y[:, j]) / U[j, j]
        now[:, j:] -= error[:, None] * U[j, j:]
    return at_turn[:, back], at_group[:, back], (U.diagonal() ** -2)[back]
