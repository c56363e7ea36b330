"""The one place that says how close is close enough.

Bytes are exact: packed weights, block scales, global scales, copied tensors and files compare with `==`.
Everything else states its tolerance here, with the reason.  Loosening a figure needs a line in CHANGELOG.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOGIT_ATOL: Final = 2e-5
"""Our F32 decoder layer against transformers: the same products summed in another order."""

DRAFTER_ATOL: Final = 1e-5
"""Hidden states of a drafter in F32 against float64: values of order one, sums of a few dozen terms."""

F64: Final = 1e-10
"""Loss and gradient behind a head in float64 against a second derivation, values up to some tens: only the order of
summation differs."""

TRAINING_F64: Final = 1e-6
"""Losses and gradients of whole drafters in float64 against a second derivation: angles and tables of the rotation are
F32, as they are at inference.  Measured: 1e-8."""

GRADIENT_BF16_DB: Final = 25.0
"""Gradients of a small drafter computed in BF16 against float64, all parameters together: a few dozen roundings of
2**-9 each, one after the other, of activations and of what comes back; a wrong term costs all signal."""

AMAX_BF16_STEPS: Final = 1
"""Ranges of activations against modelopt's, in steps of BF16 at that value: its batches are other chunks than ours,
and a product's last bit may depend on how many rows are multiplied at once."""

SQNR_SAME_MATH_DB: Final = 50.0
"""Two BF16 implementations of one product, each accumulating in F32: rounding the result alone gives 55.6 dB."""

SQNR_OTHER_ORDER_DB: Final = 30.0
"""Logits of the fast mode, the same tokens cut into other pieces: BF16 sums in another order tip roundings of the cache
and of NVFP4 activations, layer by layer; a wrong position or a forgotten key costs all signal."""

SQNR_NVFP4_WEIGHT_DB: Final = 19.0
"""NVFP4 of a Gaussian matrix against the matrix itself: 20.4 dB were measured; a wrong scale or order costs more."""


SUM_F32: Final = 1e-6
"""A product accumulated in F32 against F64, as a share of the sum of its terms' magnitudes: the order of summation is
free.  Measured: 1e-7 for blocks of 16 of 3072 terms, up to 6e-7 for a BLAS that adds 272 terms one by one."""

F32_FEEDBACK: Final = 1e-5
"""GPTQ's updated weights in F32 against F64, as a share of the largest: a sum of a few hundred terms of that size, and
couplings rounded to 24 bits.  Codes and scales that F64 finds worse by more than this were chosen wrongly."""

SUM_FLOOR: Final = 2.0**-147
"""Beside it, for each 1 of activation: a weight below F32's normal numbers is rounded to steps of 2**-149."""

FLUSHED: Final = 2.0**-126
"""For each term of a BF16 product: the dot products of AVX512_BF16 take numbers below the normal ones for zero."""

HALF_STEP_BF16: Final = 2.0**-8
"""Rounding to BF16 once, as a share of the value; 2**-134 below its normal numbers."""

ROUTER_WEIGHT_STEPS: Final = 12
"""A router's weight against F64, in units of 2**-24 of it: sigmoids within two, K of them summed, one division."""

NORM_F32: Final = 2.0**-22
"""A normed F32 value against F64, as a share of it: mean, root, reciprocal and two products are rounded once each."""

NORM_UNLIKE_TORCH: Final = 2e-5
"""Share of BF16 values that differ between a norm whose squares are summed in F64 and torch's in F32; 2.4e-6 were
measured."""

ATTENTION_F32: Final = 4e-6
"""Attention in F32 against F64, as a share of the largest value: scores of order ten, each off by some 1e-6, and a sum
of some thousand terms.  Measured: 1.2e-6."""

SQNR_MOE_DB: Final = 45.0
"""Experts against F64: between the projections the activation is rounded to BF16, to NVFP4 or to both, and a last bit
before it may tip one number in some thousand to its neighbour."""


def product_bound(x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """How far y [T, N] = x [T, K] w^T [K, N], all F64, may be missed in F32, then rounded to `dtype`."""
    import torch

    magnitude = x.abs() @ w.abs().T
    bound = SUM_F32 * magnitude + SUM_FLOOR * x.abs().sum(1, keepdim=True) + 2.0**-149
    return bound + HALF_STEP_BF16 * (y.abs() + bound) + 2.0**-134 if dtype == torch.bfloat16 else bound


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


def gram_rtol(rows: int) -> float:
    """Of a sum of x y over `rows` tokens in |x| |y|: each value is off by at most 2**-18 of its channel's largest one
    (calib/gram.py), so each column by sqrt(rows) times that of its length at most, and both factors are."""
    return float(2 * rows**0.5 * 2.0**-18)


TRAINING_RTOL: Final = 2e-4
"""Losses and gradient norms of an F32 training whose batches are split otherwise, over a handful of steps: sums in
another order, through an optimizer that divides by small second moments.  Measured: up to 1e-5."""

TRAINING_ATOL: Final = 2.0**-8
"""BF16 weights of order one half, after such a training: one step of BF16, where F32 masters lie beside a tie."""

COVERAGE_OF_95: Final = (0.91, 0.985)
"""Share of 95 % intervals that hold the true value, of 400 simulated texts: chance alone moves it by 0.011 (one
standard error), and a bootstrap of few or skewed windows is a little short."""

EVALUATION_RTOL: Final = 1e-3
"""KL divergences and perplexities from our F32 logits and from transformers': logits differ by LOGIT_ATOL, of which a
KL divergence of some 1e-2 nats, which is their second order, keeps up to 1e-4 of its size."""
