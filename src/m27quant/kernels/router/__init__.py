"""MiniMax-M2's router: sigmoid scores in F32, a selection bias, the k best experts of every token.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.linear import linear
from m27quant.kernels.linear.checks import check as check_product
from m27quant.kernels.router import reference

__all__ = ["route", "select"]


def route(
    h_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, k: int, *, invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights.

    Args:
        h_TD: BF16 or F32; multiplied in F32.
        gate_ED: F32.
        bias_E: F32; it helps to choose, it does not weigh.
        k: experts per token, 1 to E.
        invariant: as for `linear`.

    Returns:
        experts I64 [T, K], by descending score + bias, equal ones by ascending index (a NaN counts as largest),
        and weights F32 [T, K]: the chosen scores over their sum, added in slot order.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    if gate_ED.dtype != torch.float32:
        raise ValueError(
            f"the router's gate is {gate_ED.dtype}: it must be float32, as the checkpoint has it"
        )
    if choose("router", h_TD.device).backend == "triton":
        from m27quant.kernels.router import gpu

        check_product(h_TD, gate_ED)
        _check((len(h_TD), len(gate_ED)), h_TD.device, bias_E, k)
        return gpu.route(h_TD, gate_ED, bias_E, k)  # never in TF32, whatever torch may do in its products
    logits_TE = linear(h_TD.float(), gate_ED, invariant=invariant)
    return select(logits_TE, bias_E, k)


def select(logits_TE: Tensor, bias_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`route` from the gate's logits F32 [T, E] on; every row by itself.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    if logits_TE.dtype != torch.float32:
        raise ValueError(f"router logits must be float32, are {logits_TE.dtype}")
    _check(logits_TE.shape, logits_TE.device, bias_E, k)
    experts_TK, weights_TK = _backend(logits_TE).select(logits_TE, bias_E, k)
    return experts_TK, weights_TK


def _check(shape: Sequence[int], device: torch.device, bias_E: Tensor, k: int) -> None:
    """Refuse a bias and a number of experts that do not fit logits of a shape."""
    if len(shape) != 2 or list(bias_E.shape) != list(shape[1:]) or bias_E.device != device:
        raise ValueError(
            f"router logits {list(shape)} on {device} need a selection bias "
            f"[{shape[-1]}] there; it is {list(bias_E.shape)} on {bias_E.device}"
        )
    if bias_E.dtype != torch.float32:
        raise ValueError(f"the router's bias must be float32, is {bias_E.dtype}")
    if not 1 <= k <= shape[1]:
        raise ValueError(f"cannot choose {k} of {shape[1]} experts")


def _backend(tensor: Tensor) -> ModuleType:
    backend = choose("router", tensor.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.router import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.router import gpu

        return gpu
    return reference
