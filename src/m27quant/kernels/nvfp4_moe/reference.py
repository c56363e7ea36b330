"""Routed experts in plain torch: the specification.

For each token and each of its experts:

    h    = x, in F32                     W4A16
    h    = fake_quantize(x, input_scale_13)   W4A4, in F32
    act  = silu(h w1^T) * (h w3^T)       in F32, rounded once to x's dtype
    act  = fake_quantize(act, input_scale_2)  W4A4, in F32
    out  = act w2^T                      in F32
    y    = sum of weight * out over the token's slots, from the first to the last, in F32, rounded once to x's dtype

A slot without expert, or with one outside of the slice, counts 0.

Shapes: T tokens, D hidden, I intermediate, C experts held, K experts per token, N tokens of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels.nvfp4_pack import GROUP, PackedNVFP4
from m27quant.kernels.nvfp4_pack import reference as nvfp4_pack
from m27quant.kernels.nvfp4_quantize import reference as nvfp4_quantize


def empty(count: int, D: int, I: int, activations: str, device: torch.device) -> tuple[Tensor, ...]:
    """Codes, block scales and global scales [C, ...] of w1, w2 and w3, then the two input scales [C]."""
    tensors: list[Tensor] = []
    for N, K in ((I, D), (D, I), (I, D)):
        tensors.append(torch.empty(count, N, K // 2, dtype=torch.uint8, device=device))
        tensors.append(torch.empty(count, N, K // GROUP, dtype=torch.float8_e4m3fn, device=device))
        tensors.append(torch.empty(count, device=device))
    return (*tensors, torch.empty(count, device=device), torch.empty(count, device=device))


def fill(
    tensors: tuple[Tensor, ...],
    index: int,
    w1: PackedNVFP4,
    w2: PackedNVFP4,
    w3: PackedNVFP4,
    input_scale_13: Tensor | None,
    input_scale_2: Tensor | None,
) -> None:
    """Copy one expert to its place."""
    for target, source in zip(tensors, (*w1, *w2, *w3, input_scale_13, input_scale_2), strict=True):
        if source is not None:
            target[index] = source.reshape(target.shape[1:])


def moe(
    x_TD: Tensor,
    tensors: tuple[Tensor, ...],
    experts_TK: Tensor,
    weights_TK: Tensor,
    first: int,
    activations: str,
    invariant: bool,
) -> Tensor:
    """y [T, D] in x's dtype."""
    T, K = experts_TK.shape
    out_TKD = torch.zeros(T, K, x_TD.shape[1], device=x_TD.device)
    local_TK = experts_TK - first
    for index in sorted(set(local_TK.flatten().tolist())):
        if 0 <= index < tensors[0].shape[0]:
            token_N, slot_N = (local_TK == index).nonzero(as_tuple=True)
            one = tuple(tensor[index] for tensor in tensors)
            out_TKD[token_N, slot_N] = expert(x_TD[token_N], one, activations, invariant)
    y_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    for slot in range(K):
        y_TD += weights_TK[:, slot, None] * out_TKD[:, slot]
    return y_TD.to(x_TD.dtype)


def expert(x_ND: Tensor, tensors: tuple[Tensor, ...], activations: str, invariant: bool) -> Tensor:
    """One expert's output F32 [N, D], not yet weighted; `invariant`: one row at a time.

    For other heights BLAS sums in another order, and torch takes other exponentials at the end of a vector.
    """
    if invariant and len(x_ND) > 1:
        return torch.cat([expert(x_1D, tensors, activations, invariant) for x_1D in torch.split(x_ND, 1)])
    w1_ID, w2_DI, w3_ID = (nvfp4_pack.unpack(*tensors[i : i + 3]) for i in (0, 3, 6))
    h_ND = _input(x_ND, tensors[9], activations)
    act_NI = F.silu(h_ND @ w1_ID.T) * (h_ND @ w3_ID.T)
    return _input(act_NI.to(x_ND.dtype), tensors[10], activations) @ w2_DI.T


def _input(x_NK: Tensor, input_scale: Tensor, activations: str) -> Tensor:
    return nvfp4_quantize.fake_quantize(x_NK, input_scale) if activations == "nvfp4" else x_NK.float()
