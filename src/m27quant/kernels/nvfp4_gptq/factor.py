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
from typing import NamedTuple

import torch
from torch import Tensor

from m27quant.errors import CalibrationError
from m27quant.kernels import native
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
    share = damping
    for attempt in range(1, MOST_ATTEMPTS + 1):
        added = share * mean
        damped_KK = _reversed(hessian, order_K)
        damped_KK.diagonal().add_(added)
        if _decompose(damped_KK, added / 2):
            dead = int((diagonal_K == 0).sum())
            return Factor(order_K.int(), *_by_turns(damped_KK), share, attempt, dead)
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


def _decompose(a_KK: Tensor, least: float) -> bool:
    """`cholesky` by the device's backend; CUDA adds in an order of its own."""
    backend = choose("nvfp4_gptq", a_KK.device).backend
    if backend == "cpu-native":
        done: int = native.function("m27_cholesky")(a_KK.data_ptr(), len(a_KK), least)
        if done < 0:
            raise MemoryError("no memory for a panel of the Cholesky factor")
        return bool(done)
    if a_KK.device.type == "cpu":
        return cholesky(a_KK, least)
    upper_KK, failed = torch.linalg.cholesky_ex(a_KK, upper=True)
    a_KK.copy_(upper_KK)
    return not int(failed) and bool((upper_KK.diagonal().square() > least).all())


def _reversed(hessian: Tensor, order_K: Tensor) -> Tensor:
    """The matrix with the last turn first, F64, whole."""
    upper_KK = hessian.double().triu()
    upper_KK += upper_KK.triu(1).T
    last_first_K = order_K.flip(0)
    return upper_KK[last_first_K][:, last_first_K].contiguous()


def _by_turns(upper_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Coupling and pivots: reversed, row j of U is column j of R times the root of p_j."""
    K = len(upper_KK)
    root_K = upper_KK.diagonal().clone()
    coupling_KK = (upper_KK.triu_(1).div_(root_K[:, None])).float().flip(0, 1)
    return coupling_KK.view(K // GROUP, GROUP, K).transpose(1, 2).contiguous(), root_K.square().flip(0)


def _check(hessian: Tensor, damping: float) -> None:
    if hessian.dtype not in (torch.float32, torch.float64) or hessian.dim() != 2:
        found = f"{hessian.dtype} {list(hessian.shape)}"
        raise ValueError(f"hessian must be a float32 or float64 matrix, is {found}")
    K = len(hessian)
    if hessian.shape[1] != K or K == 0 or K % GROUP:
        raise ValueError(f"hessian has shape {list(hessian.shape)}, must be square, a multiple of {GROUP}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, is {damping:g}")
    bad = int((~hessian.triu().isfinite()).sum())
    if bad:
        raise CalibrationError(f"{bad} sums of a Hessian of {K} channels are NaN or infinite")
    negative = int((hessian.diagonal() < 0).sum())
    if negative:
        raise CalibrationError(f"{negative} of {K} channels of a Hessian have a negative sum of squares")
