"""What GPTQ's error feedback needs of a Hessian: in which order to round columns, and how their errors couple, in F64.

With the columns in that order, H + damping = R diag(p) R^T, R unit upper triangular.  For an error E in the weights
(rows) the error of the outputs is then a sum over columns,

    tr(E (H + damping) E^T) = sum over j of p_j * |t_j|^2,    t_j = E_j + sum over i < j of E_i R_ij,

so each column can be rounded to what makes its t_j least.  It is GPTQ's update (arXiv 2210.17323), whose Cholesky
factor of the inverse is U = diag(p)^-1/2 R^-1, without the inverse.  p_j is what of channel j the later ones cannot
make good: groups of 16 go by falling sums of squares (columns within a group, too), so that most can.

Shapes: K channels, G = K/16 groups of them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from m27quant.errors import CalibrationError
from m27quant.kernels.dispatch import choose
from m27quant.kernels.nvfp4_pack.reference import GROUP

DAMPING = 0.01
"""What is tried first, GPTQ's own value."""
MOST_ATTEMPTS = 8
"""Each adds ten times as much as the one before; no sum of squares needs the last."""


class Factor(NamedTuple):
    """A Hessian, factorized, on its device."""

    order: Tensor
    """I32 [K]: the column of each turn; each run of 16 is one of the format's groups."""
    coupling: Tensor
    """F32 [G, K, 16]: R_ij, by turns, of j = 16 g + c at [g, i, c]; 0 on and below the diagonal."""
    pivots: Tensor
    """F64 [K]: p by turns, all positive."""
    damping: float
    """The share of the mean diagonal that was added to the diagonal."""
    attempts: int
    """1 where the first damping sufficed."""
    dead: int
    """Channels whose diagonal was 0 (never seen): nothing is fed back from or to them."""


def factorize(hessian: Tensor, *, damping: float = DAMPING) -> Factor:
    """Factorize a sum (or mean) of x x^T over inputs x, damped as often as it takes.

    `damping` times the mean of the diagonal is added to the diagonal; ten times as much, and so on, where a pivot is
    below half of that: those of a sum of squares are not.  A Hessian of zeros counts as the identity.  On a CPU the
    same bits for any number of threads.

    Args:
        hessian: F32 or F64 [K, K], K a multiple of 16; only the upper triangle is read.

    Raises:
        CalibrationError: a NaN, Inf or negative diagonal, or a matrix that is no sum of squares.
        ValueError: dtype, shape or damping.
    """
    _check(hessian, damping)
    diagonal_K = hessian.diagonal().double()
    mean = float(diagonal_K.mean()) or 1.0
    order_K = column_order(diagonal_K)
    backend = _backend(hessian.device)
    hessian, share = hessian.double().contiguous(), damping
    for attempt in range(1, MOST_ATTEMPTS + 1):
        added = share * mean
        found = backend.decompose(hessian, order_K, added)
        if found is not None:
            dead = int((diagonal_K == 0).sum())
            coupling, pivots = found
            return Factor(order_K.int(), coupling, pivots, share, attempt, dead)
        share = share * 10 if share else DAMPING
    raise CalibrationError(
        f"a Hessian of {len(hessian)} channels cannot be factorized, not even with {added / mean:g} times its "
        "mean diagonal added: it is no sum of squares of inputs",
        hint="calibrate again; where this happens twice, report it",
    )


def column_order(diagonal_K: Tensor) -> Tensor:
    """Groups by falling sums, then the columns of each by falling values, the first of equal ones first; int64 [K]."""
    of_groups_G16 = diagonal_K.view(-1, GROUP)
    groups_G = of_groups_G16.sum(1).argsort(descending=True, stable=True)
    columns_G16 = of_groups_G16.argsort(dim=1, descending=True, stable=True)
    return (groups_G[:, None] * GROUP + columns_G16[groups_G]).flatten()


def _backend(device: torch.device) -> ModuleType:
    if choose("nvfp4_gptq", device).backend == "cpu-native":
        from m27quant.kernels.nvfp4_gptq import cpu

        return cpu
    from m27quant.kernels.nvfp4_gptq import decomposition

    return decomposition


def _check(hessian: Tensor, damping: float) -> None:
    if hessian.dtype not in (torch.float32, torch.float64) or hessian.dim() != 2:
        found = f"{hessian.dtype} {list(hessian.shape)}"
        raise ValueError(f"hessian must be a float32 or float64 matrix, is {found}")
    K = len(hessian)
    if hessian.shape[1] != K or K == 0 or K % GROUP:
        raise ValueError(f"hessian has shape {list(hessian.shape)}, must be square, a multiple of {GROUP}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, is {damping:g}")
    if not math.isfinite(float(hessian.triu().sum(dtype=torch.float64))):
        bad = int((~hessian.triu().isfinite()).sum())
        raise CalibrationError(f"{bad} sums of a Hessian of {K} channels are NaN or infinite")
    negative = int((hessian.diagonal() < 0).sum())
    if negative:
        raise CalibrationError(f"{negative} of {K} channels of a Hessian have a negative sum of squares")
