"""Products with NVFP4 weights: W4A4 (activations in NVFP4 too) and W4A16 (activations as they are).

`reference.py` holds the formula.  A weight is prepared once, in the layout that its device's kernel reads; each
backend (`reference`, `cpu`, `gpu`) offers the same functions on the tensors that it prepared:

    prepare(packed, activations) -> tuple of tensors
    unpack(tensors, shape) -> F32 [N, K]
    gemm(x_TK, tensors, shape, activations, input_scale, invariant) -> y_TN

Shapes: T tokens, N out features, K in features, G = K/16 groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from m27quant.kernels.dispatch import Backend, choose
from m27quant.kernels.nvfp4_gemm import checks, reference
from m27quant.kernels.nvfp4_pack import PackedNVFP4

__all__ = ["Activations", "Weight", "gemm", "prepare"]

Activations = Literal["nvfp4", "bf16"]
"""nvfp4: W4A4, activations quantized under a static scale; bf16: W4A16, activations as given (F32 too)."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [N, K] prepared for products; `prepare` makes it."""

    shape: tuple[int, int]
    activations: Activations
    backend: Backend
    """Whose layout `tensors` has."""
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the weight lies, and where activations must lie."""
        return self.tensors[0].device

    def unpack(self) -> Tensor:
        """The values F32 [N, K] that the weight stands for."""
        values: Tensor = _module(self.backend).unpack(self.tensors, self.shape)
        return values


def prepare(packed: PackedNVFP4, *, activations: Activations) -> Weight:
    """Repack a matrix, once, for products on the device where it lies; it takes as much memory as before.

    Args:
        packed: a matrix as it lies in the checkpoint, U8 [N, K/2], float8_e4m3fn [N, K/16], F32 [].
        activations: what the products' other side is to be.

    Raises:
        CheckpointError: dtypes or shapes, a NaN block scale, a NaN or infinite global scale.
    """
    checks.check_activations(activations)
    checks.check_packed(packed)
    backend = choose("nvfp4_gemm", packed.weight.device).backend
    N, K2 = packed.weight.shape
    return Weight((N, K2 * 2), activations, backend, _module(backend).prepare(packed, activations))


def gemm(
    x_TK: Tensor, weight: Weight, input_scale: Tensor | None = None, *, invariant: bool = False
) -> Tensor:
    """y [T, N] = x w^T, accumulated in F32 and rounded once to x's dtype.

    Args:
        x_TK: BF16 or F32 [T, K], T may be 0.
        weight: from `prepare`.
        input_scale: F32 [], the static scale of x (amax / 2688), where `weight.activations` is "nvfp4": x is
            then `nvfp4_quantize.quantize`d first.  Ignored where it is "bf16".
        invariant: a row's result does not depend on which or how many others are computed with it.

    Raises:
        ValueError: shapes, dtypes or devices; a missing or unusable scale (its value is looked at on a CPU alone,
            as an accelerator would have to be waited for).
    """
    checks.check_rows(x_TK, weight.shape[1], weight.device)
    if weight.activations == "nvfp4":
        checks.check_input_scale(input_scale, weight.device)
    y_TN: Tensor = _module(weight.backend).gemm(
        x_TK.contiguous(), weight.tensors, weight.shape, weight.activations, input_scale, invariant
    )
    return y_TN


def _module(backend: Backend) -> ModuleType:
    if backend == "cpu-native":
        from m27quant.kernels.nvfp4_gemm import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.nvfp4_gemm import gpu

        return gpu
    return reference
