"""H + damping = R diag(p) R^T in plain torch: the specification of what `factor.py` calls for.

Reversed, with the last turn first, it is Cholesky's H + damping = U^T U: row j of U is column j of R times the root of
p_j.  CUDA's own factor is taken where there is one; it adds in an order of its own.

Shapes: K channels, L of them still to come, G = K/16 groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_pack.reference import GROUP


def decompose(hessian: Tensor, order_K: Tensor, added: float) -> tuple[Tensor, Tensor] | None:
    """Coupling F32 [G, K, 16] and pivots F64 [K] by turns; None where a pivot is not above half of `added`.

    Args:
        hessian: F64 [K, K]; only the upper triangle is read.
        order_K: the column of each turn.
        added: to the diagonal.
    """
    upper_KK = hessian.triu()
    upper_KK += upper_KK.triu(1).T
    last_first_K = order_K.flip(0)
    a_KK = upper_KK[last_first_K][:, last_first_K]
    a_KK.diagonal().add_(added)
    if not _cholesky(a_KK, added / 2):
        return None
    K = len(a_KK)
    root_K = a_KK.diagonal().clone()
    coupling_KK = (a_KK.triu(1) / root_K[:, None]).float().flip(0, 1)
    return coupling_KK.view(K // GROUP, GROUP, K).transpose(1, 2).contiguous(), root_K.square().flip(0)


def cholesky(a_KK: Tensor, least: float) -> bool:
    """a = U^T U in place, F64, U upper; False where a pivot is not above `least`.  What is below the diagonal is lost.

    Each element loses its products one by one, in the order of rows, each product and difference rounded once.
    """
    for k in range(len(a_KK)):
        pivot = float(a_KK[k, k])
        if not pivot > least:
            return False
        a_KK[k, k:] /= math.sqrt(pivot)  # torch's root of an F64 tensor may be off by a bit
        row_L = a_KK[k, k + 1 :]
        a_KK[k + 1 :, k + 1 :] -= row_L[:, None] * row_L
    return True


def _cholesky(a_KK: Tensor, least: float) -> bool:
    if a_KK.device.type == "cpu":
        return cholesky(a_KK, least)
    upper_KK, failed = torch.linalg.cholesky_ex(a_KK, upper=True)
    a_KK.copy_(upper_KK)
    return not int(failed) and bool((upper_KK.diagonal().square() > least).all())
