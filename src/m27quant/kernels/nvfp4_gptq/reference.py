"""NVFP4 with error feedback in plain torch: the specification.

Columns are taken from left to right, the format's groups of 16 with them.  With E_i = F32(w_i - y_i) the error that
column i was left with and R of `Factor`, in F32, each operation rounded once:

    f_j = sum over i < j of E_i R_ij      by F32(f_j + F32(E_i R_ij)), i ascending
    x_j = F32(w_j + f_j)                  what column j should be now
    s   = the block scale of least sum of p_j (x_j - y_j)^2 over the group, where x_j follows as if y_i = x_i were
          stored in the columns i < j of the group: what GPTQ has made of the group when it comes to it
    y_j = E2M1(F32(x_j / d)) d            d = F32(s weight_scale_2), codes as `nvfp4_pack` has them

p_j enters relative to the largest of its group.  Rows do not depend on each other.

Shapes: N out features, R rows of a strip, K in features, G = K/16 groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m27quant.kernels.nvfp4_gptq.factor import Factor
from m27quant.kernels.nvfp4_pack import reference, scale_search
from m27quant.kernels.nvfp4_pack.reference import GROUP

ROWS = 64
"""Of a strip: what is fed back stays in a cache."""


def pack(
    weight_NK: Tensor,
    weight_scale_2: Tensor,
    factor: Factor,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """Encode BF16 weights into the two buffers; False, with undefined buffers, where a number is NaN or Inf."""
    for rows in _strips(weight_NK):
        w_RK = weight_NK[rows].float()
        fed_RK = torch.zeros_like(w_RK)
        for g, weight_16 in enumerate(channel_weights(factor)):
            group = slice(g * GROUP, (g + 1) * GROUP)
            coupling_16C = factor.coupling[g, group]
            x_R16 = _follow(w_RK[:, group], fed_RK[:, group], coupling_16C, None)[0]
            if not x_R16.isfinite().all():
                return False
            scale8_R = scale_search.least_error_scales(x_R16[:, None], weight_scale_2, weight_16[None])[:, 0]
            step_R = scale8_R.float() * weight_scale_2
            x_R16, y_R16 = _follow(w_RK[:, group], fed_RK[:, group], coupling_16C, step_R)
            out_codes_NK2[rows, g * 8 : g * 8 + 8] = reference.encode(
                x_R16[:, None], scale8_R[:, None], weight_scale_2
            )
            out_scale_NG[rows, g] = scale8_R
            error_R16 = w_RK[:, group] - y_R16
            for column, error_R in zip(range(group.start, group.stop), error_R16.unbind(1), strict=True):
                _feed(fed_RK, error_R, column, factor)
        if not fed_RK.isfinite().all():
            return False
    return True


def _follow(
    w_R16: Tensor, fed_R16: Tensor, coupling_16C: Tensor, step_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x and y of a group's columns, each with the feedback of those before it; without a step y is x."""
    fed_R16 = fed_R16.clone()
    x_R16, y_R16 = torch.empty_like(w_R16), torch.empty_like(w_R16)
    for j in range(GROUP):
        x_R16[:, j] = x_R = w_R16[:, j] + fed_R16[:, j]
        y_R16[:, j] = y_R = x_R if step_R is None else _stored(x_R, step_R)
        fed_R16 += (w_R16[:, j] - y_R)[:, None] * coupling_16C[j]
    return x_R16, y_R16


def _stored(x: Tensor, step: Tensor) -> Tensor:
    return (scale_search.rounded(x.abs() / step) * step).copysign(x)


def energies(x_NK: Tensor, factor: Factor) -> Tensor:
    """x (H + damping) x^T of every row x of F32 [N, K], F64 [N]."""
    energy_N = torch.empty(len(x_NK), dtype=torch.float64, device=x_NK.device)
    for rows in _strips(x_NK):
        fed_RK = torch.zeros_like(x_NK[rows])
        for j, x_R in enumerate(x_NK[rows].unbind(1)):
            _feed(fed_RK, x_R, j, factor)
        terms_RK = (x_NK[rows] + fed_RK).double().square() * factor.pivots
        energy_N[rows] = terms_RK.cumsum(1)[:, -1]  # cumsum, unlike sum, adds from left to right
    return energy_N


def channel_weights(factor: Factor) -> Tensor:
    """How much the columns of a group count beside each other, F32 [G, 16], the largest 1."""
    pivots_G16 = factor.pivots.view(-1, GROUP)
    return (pivots_G16 / pivots_G16.amax(1, keepdim=True)).float()


def _feed(fed_RK: Tensor, error_R: Tensor, column: int, factor: Factor) -> None:
    """Add what the error of a column asks of the later ones."""
    first = column // GROUP
    coupling_K = factor.coupling[first:, column].flatten()  # 0 up to the column itself
    fed_RK[:, first * GROUP :] += error_R[:, None] * coupling_K


def _strips(x_NK: Tensor) -> Iterator[slice]:
    for start in range(0, len(x_NK), ROWS):
        yield slice(start, min(start + ROWS, len(x_NK)))
