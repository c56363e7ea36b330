"""Products with BF16 or F32 weights: projections, router, head; as `F.linear`, or batch-invariant.

Shapes: T rows, K in features, N out features.
"""

from __future__ import annotations

from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.linear import reference
from m27quant.kernels.linear.checks import check

__all__ = ["linear"]


def linear(x_TK: Tensor, w_NK: Tensor, *, invariant: bool = False) -> Tensor:
    """x w^T, summed in F32 and rounded once to x's dtype, [T, N].

    Args:
        x_TK: BF16 or F32.
        w_NK: BF16 or F32, on the same device; no bias, MiniMax-M2 has none.
        invariant: a row's result depends on that row and the weights alone, bit for bit: not on T, on the other
            rows, or on the number of threads.  Without it the product is torch's, which sums in F32 too (on CUDA
            as `torch.backends.cuda.matmul` allows) but in an order that depends on T.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.
    """
    check(x_TK, w_NK)
    if not invariant:
        return reference.linear(x_TK, w_NK)
    backend = choose("linear", x_TK.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.linear import cpu

        return cpu.linear_invariant(x_TK, w_NK)
    if backend == "triton":
        from m27quant.kernels.linear import gpu

        return gpu.linear_invariant(x_TK, w_NK)
    return reference.linear_invariant(x_TK, w_NK)
