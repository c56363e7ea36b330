"""NVFP4 with error feedback in plain torch: the specification.

Columns have their turn in the order of `Factor`, 16 of one group after another.  Of turn j let w_j be the weights and
E_j = F32(w_j - y_j) the error they were stored with.  In F32, each operation rounded once:

    f_j = sum over i < j of E_i R_ij      by F32(f_j + F32(E_i R_ij)), i ascending
    x_j = F32(w_j + f_j)                  what column j should be now
    s   = the block scale of least sum of p_j (x_j - y_j)^2 over the group, where x_j follows as if y_i = x_i were
          stored for the turns i < j of the group: what GPTQ has made of the group when it comes to it
    y_j = E2M1(F32(x_j / d)) d            d = F32(s weight_scale_2), codes as `nvfp4_pack` has them

s is chosen as `nvfp4_pack.scale_search` says, columns by turns, p_j as a share of the largest of its group.  Rows do
not depend on each other.

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
    weight_G16 = channel_weights(factor)
    order_G16 = factor.order.long().view(-1, GROUP)
    for rows in _strips(weight_NK):
        w_RG16 = weight_NK[rows].float()[:, order_G16]
        fed_RG16 = torch.zeros_like(w_RG16)
        for turn, order_16 in enumerate(order_G16):
            w_R16, fed_R16 = w_RG16[:, turn], fed_RG16[:, turn]
            coupling_1616 = factor.coupling[turn, turn * GROUP : (turn + 1) * GROUP]
            x_R16, _ = _follow(w_R16, fed_R16, coupling_1616, None)
            if not x_R16.isfinite().all():
                return False
            scale8_R = scale_search.least_error_scales(
                x_R16[:, None], weight_scale_2, weight_G16[None, turn]
            )[:, 0]
            x_R16, y_R16 = _follow(w_R16, fed_R16, coupling_1616, scale8_R.float() * weight_scale_2)
            if not x_R16.isfinite().all():
                return False
            group = int(order_16[0]) // GROUP
            in_place_R16 = x_R16[:, order_16.argsort()]
            out_codes_NK2[rows, group * 8 : group * 8 + 8] = reference.encode(
                in_place_R16[:, None], scale8_R[:, None], weight_scale_2
            )
            out_scale_NG[rows, group] = scale8_R
            feed(fed_RG16, w_R16 - y_R16, turn, factor)
    return True


def energies(x_NK: Tensor, factor: Factor) -> Tensor:
    """x (H + damping) x^T of every row x of F32 [N, K], F64 [N]: p_j t_j t_j of the turns from first to last."""
    energy_N = torch.empty(len(x_NK), dtype=torch.float64, device=x_NK.device)
    for rows in _strips(x_NK):
        x_RG16 = x_NK[rows][:, factor.order.long().view(-1, GROUP)]
        fed_RG16 = torch.zeros_like(x_RG16)
        for turn in range(x_RG16.shape[1]):
            feed(fed_RG16, x_RG16[:, turn], turn, factor)
        terms_RK = (x_RG16 + fed_RG16).flatten(1).double().square() * factor.pivots
        energy_N[rows] = terms_RK.cumsum(1)[:, -1]  # cumsum, unlike sum, adds from left to right
    return energy_N


def channel_weights(factor: Factor) -> Tensor:
    """How much the columns of a group count beside each other, F32 [G, 16] by turns, the largest 1."""
    pivots_G16 = factor.pivots.view(-1, GROUP)
    return (pivots_G16 / pivots_G16.amax(1, keepdim=True)).float()


def feed(fed_RG16: Tensor, error_R16: Tensor, turn: int, factor: Factor) -> None:
    """Add what the errors of a group ask of it and of later ones."""
    for j, error_R in enumerate(error_R16.unbind(1), start=turn * GROUP):
        fed_RG16[:, turn:] += error_R[:, None, None] * factor.coupling[turn:, j]


def _follow(
    w_R16: Tensor, fed_R16: Tensor, coupling_1616: Tensor, step_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x and y of a group's turns, each with the feedback of those before it; without a step y is x."""
    fed_R16 = fed_R16.clone()
    x_R16, y_R16 = torch.empty_like(w_R16), torch.empty_like(w_R16)
    for j in range(GROUP):
        x_R16[:, j] = x_R = w_R16[:, j] + fed_R16[:, j]
        y_R16[:, j] = y_R = x_R if step_R is None else _stored(x_R, step_R)
        fed_R16 += (w_R16[:, j] - y_R)[:, None] * coupling_1616[j]
    return x_R16, y_R16


def _stored(x: Tensor, step: Tensor) -> Tensor:
    return (scale_search.rounded(x.abs() / step) * step).copysign(x)


def _strips(x_NK: Tensor) -> Iterator[slice]:
    for start in range(0, len(x_NK), ROWS):
        yield slice(start, min(start + ROWS, len(x_NK)))
