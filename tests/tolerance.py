"""The one place that says how close is close enough.

Bytes are exact: packed weights, block scales, global scales, copied tensors and files compare with `==`.
Everything else states its tolerance here, with the reason.  Loosening a figure needs a line in CHANGELOG.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_ATOL: Final = 2e-5
"""Our F32 decoder layer against transformers: the same products summed in another order."""

AMAX_BF16_STEPS: Final = 1
"""Ranges of activations against modelopt's, in steps of BF16 at that value: its batches are other chunks than ours,
and a product's last bit may depend on how many rows are multiplied at once."""

SQNR_SAME_MATH_DB: Final = 50.0
"""Two BF16 implementations of one product, each accumulating in F32: rounding the result alone gives 55.6 dB."""

SQNR_NVFP4_WEIGHT_DB: Final = 19.0
"""NVFP4 of a Gaussian matrix against the matrix itself: 20.4 dB were measured; a wrong scale or order costs more."""


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; inf when equal. Any shape; computed in F64."""
    import torch

    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.square().sum() / noise))


def relative_error(reference: Tensor, value: Tensor) -> float:
    """Largest |value - reference| over the largest |reference|; 0 for two zero tensors."""
    difference = (reference.double() - value.double()).abs().max()
    scale = reference.double().abs().max()
    return float(difference / scale) if scale else float(difference)


def bf16_steps(a: float, b: float) -> int:
    """How many BF16 numbers lie between two positive values, each rounded to BF16."""
    import torch

    bits = torch.tensor([a, b], dtype=torch.bfloat16).view(torch.int16)
    return abs(int(bits[0]) - int(bits[1]))
