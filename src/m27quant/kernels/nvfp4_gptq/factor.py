"""The triangle that GPTQ's error feedback needs: H + damping = R diag(p) R^T, R unit upper triangular, in F64.

For an error E in the weights (rows) the output error is then a sum over columns,

    tr(E (H + damping) E^T) = sum over j of p_j * |t_j|^2,    t_j = E_j + sum over i < j of E_i R_ij,

so that columns can be rounded from left to right, each towards what makes its t_j least.  It is GPTQ's update
(arXiv 2210.17323), whose Cholesky factor of the inverse is U = diag(p)^-1/2 R^-1, without the inverse.

Shapes: K channels, G = K/16 groups of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m27quant.errors import CalibrationError
from m27quant.kernels.nvfp4_pack.reference import GROUP

DAMPING = 0.01
"""What is tried first, GPTQ's own value."""
MOST_ATTEMPTS = 8
"""Each adds ten times as much as the one before; no sum of squares needs the last."""


class Factor(NamedTuple):
    """A Hessian, factorized, on its device."""

    coupling: Tensor
    """F32 [G, K, 16]: R_ij of column j = 16 g + c at [g, i, c]; 0 on and below the diagonal."""
    pivots: Tensor
    """F64 [K]: p, all positive."""
    damping: float
    """The share of the mean diagonal that was added to the diagonal."""
    attempts: int
    """1 where the first damping sufficed."""
    dead: int
    """Channels whose diagonal was 0 (never seen): nothing is fed back from or to them."""


def factorize(hessian: Tensor, *, damping: float = DAMPING) -> Factor:
    """Factorize a sum (or mean) of x x^T over inputs x, damped as often as it takes.

    `damping` times the mean of the diagonal is added to the diagonal; ten times as much, and so on, where a pivot is
    below half of that: those of a sum of squares are not.  A Hessian of zeros counts as the identity.

    Args:
        hessian: F32 or F64 [K, K], K a multiple of 16; only the upper triangle is read.

    Raises:
        CalibrationError: a NaN, Inf or negative diagonal, or a matrix that is no sum of squares.
        ValueError: dtype, shape or damping.
    """
    _check(hessian, damping)
    diagonal_K = hessian.diagonal().double()
    mean = float(diagonal_K.mean()) or 1.0
    share = damping
    for attempt in range(1, MOST_ATTEMPTS + 1):
        added = share * mean
        damped_KK = hessian.double().triu()  # a copy
        damped_KK.diagonal().add_(added)
        found = _decompose(damped_KK)
        if found is not None and bool((found[1] > added / 2).all()):
            dead = int((diagonal_K == 0).sum())
            return Factor(_by_groups(found[0]), found[1], share, attempt, dead)
        share = share * 10 if share else DAMPING
    raise CalibrationError(
        f"a Hessian of {len(hessian)} channels cannot be factorized, not even with {added / mean:g} times its "
        "mean diagonal added: it is no sum of squares of inputs",
        hint="calibrate again; where this happens twice, report it",
    )


def _decompose(a_KK: Tensor) -> tuple[Tensor, Tensor] | None:
    """R F64 [K, K] and p F64 [K] of a symmetric matrix given by its upper triangle; None where a pivot fails."""
    lower_KK, failed = torch.linalg.cholesky_ex(a_KK.flip(0, 1))  # reversed: the upper triangle lies below
    if int(failed):
        return None
    root_K = lower_KK.diagonal()
    return (lower_KK / root_K).flip(0, 1), root_K.square().flip(0)


def _by_groups(unit_KK: Tensor) -> Tensor:
    K = len(unit_KK)
    return unit_KK.triu(1).float().view(K, K // GROUP, GROUP).transpose(0, 1).contiguous()


def _check(hessian: Tensor, damping: float) -> None:
    if hessian.dtype not in (torch.float32, torch.float64) or hessian.dim() != 2:
        raise ValueError(
            f"hessian must be a float32 or float64 matrix, is {hessian.dtype} {list(hessian.shape)}"
        )
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
