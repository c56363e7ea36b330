"""Routed experts by the compiled core, `_native/nvfp4_moe.c`: one pass over the packed weights of each expert hit.

Batch-invariant always: a token's sums have one order, whatever else is computed and on however many threads.

Shapes: T tokens, D hidden, I intermediate, C experts held, K experts per token.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import cpu_level, native
from m27quant.kernels.nvfp4_gemm import cpu as nvfp4_gemm
from m27quant.kernels.nvfp4_pack import PackedNVFP4

SCRATCH_BYTES = 1 << 28
"""Bounds what lies between the projections: more tokens are done in several passes over the weights."""


def empty(count: int, D: int, I: int, activations: str, device: torch.device) -> tuple[Tensor, ...]:
    """Codes and block scales [C, ...] of w1, w2 and w3, global scales F32 [C, 3], input scales F32 [C, 2]."""
    matrices = [t for N, K in ((I, D), (D, I), (I, D)) for t in nvfp4_gemm.empty(N, K, count)]
    return (*matrices, torch.empty(count, 3), torch.empty(count, 2))


def fill(
    tensors: tuple[Tensor, ...],
    index: int,
    w1: PackedNVFP4,
    w2: PackedNVFP4,
    w3: PackedNVFP4,
    input_scale_13: Tensor | None,
    input_scale_2: Tensor | None,
) -> None:
    """Repack one expert into its place."""
    globals_C3, input_scales_C2 = tensors[6:]
    for which, packed in enumerate((w1, w2, w3)):
        nvfp4_gemm.repack(packed, tensors[2 * which][index], tensors[2 * which + 1][index])
        globals_C3[index, which] = packed.weight_scale_2.reshape(())
    for which, scale in enumerate((input_scale_13, input_scale_2)):
        if scale is not None:
            input_scales_C2[index, which] = scale


def moe(
    x_TD: Tensor,
    tensors: tuple[Tensor, ...],
    experts_TK: Tensor,
    weights_TK: Tensor,
    first: int,
    activations: str,
    invariant: bool,
) -> Tensor:
    """See `reference.moe`."""
    D, I = (scales.shape[1] * nvfp4_gemm.ROWS for scales in (tensors[3], tensors[1]))
    step = max(SCRATCH_BYTES // (experts_TK.shape[1] * (8 * D + 8 * I) + 1), 1)
    y_TD = torch.empty_like(x_TD)
    for start in range(0, len(x_TD), step):
        rows = slice(start, start + step)
        _pass(
            x_TD[rows],
            tensors,
            experts_TK[rows].long(),
            weights_TK[rows],
            first,
            activations == "nvfp4",
            y_TD[rows],
        )
    return y_TD


def _pass(
    x_TD: Tensor,
    tensors: tuple[Tensor, ...],
    experts_TK: Tensor,
    weights_TK: Tensor,
    first: int,
    quantized: bool,
    y_TD: Tensor,
) -> None:
    (T, K), C, D, I = experts_TK.shape, len(tensors[0]), x_TD.shape[1], tensors[1].shape[1] * nvfp4_gemm.ROWS
    slots, level, is_bf16 = T * K, cpu_level.level(), x_TD.dtype == torch.bfloat16
    panels = [
        torch.empty(slots * nvfp4_gemm.panel_bytes(level, quantized, is_bf16, side), dtype=torch.uint8)
        for side in (D, I)
    ]
    factors = torch.empty(2 * slots, dtype=torch.float64)
    act, out = torch.empty(slots * I, dtype=x_TD.dtype), torch.empty(slots * D)
    words = torch.zeros(native.function("m27_nvfp4_moe_words")(slots, C), dtype=torch.int64)
    *weights, input_scales = (tensor.data_ptr() for tensor in tensors)
    arguments = (
        *(
            level,
            x_TD.data_ptr(),
            is_bf16,
            T,
            D,
            I,
            K,
            C,
            first,
            experts_TK.data_ptr(),
            weights_TK.data_ptr(),
        ),
        *weights,
        input_scales if quantized else None,
        *(buffer.data_ptr() for buffer in (*panels, factors, act, out, y_TD, words)),
    )
    work = min(slots, C) * D * I // 2
    native.together(functools.partial(native.function("m27_nvfp4_moe"), *arguments), work)
