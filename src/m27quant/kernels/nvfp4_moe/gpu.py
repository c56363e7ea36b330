"""Routed experts in Triton: sort the slots, quantize, up, down, sum; at most six launches, none waits for the host.

Which product runs where is `nvfp4_gemm.gpu`'s table; `gpu_tile` holds the kernels.  Everything that depends on
routing stays on the device, so a call can be captured in a CUDA graph.

Shapes: T tokens, D hidden, I intermediate, C experts held, K experts per token, S = T * K slots.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from m27quant.kernels import chip as chips
from m27quant.kernels.bits import as_bits
from m27quant.kernels.nvfp4_gemm import repack, tiles
from m27quant.kernels.nvfp4_gemm.gpu import OPTIONS, is_fp4
from m27quant.kernels.nvfp4_gemm.gpu_quantize import quantize_rows
from m27quant.kernels.nvfp4_gemm.gpu_tile import INTERPRET
from m27quant.kernels.nvfp4_moe.gpu_sort import sort_slots
from m27quant.kernels.nvfp4_moe.gpu_tile import (
    nvfp4_moe_down_kernel,
    nvfp4_moe_sum_kernel,
    nvfp4_moe_up_kernel,
)
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.kernels.nvfp4_quantize.reference import swizzle

MOST_TOKENS = 8192
"""Tokens computed at once: bounds the outputs of their slots, F32 [S, D] (805 MB for M2.7), before they are added."""


def empty(count: int, D: int, I: int, activations: str, device: torch.device) -> tuple[Tensor, ...]:
    """Room for C experts.

    0, 1  w1 and w3 in turns of 8 rows [C, 2I, ..] and their scales, in the layout of `nvfp4_gemm.gpu.prepare`
    2, 3  w2 [C, D, ..] and its scales
    4     weight_scale_2 of w1, w3 and w2, F32 [C, 3]
    5, 6  input scales of w1 and w3, and of w2, F32 [C]
    7     smallest and largest of the former, F32 [2] on the CPU: one scale for all needs one quantization for all
    """
    fp4 = is_fp4(chips.of(device), activations)
    tensors: list[Tensor] = []
    for N, K in ((2 * I, D), (D, I)):
        chunks = -(-K // repack.CHUNK)
        scales, dtype = (N, chunks), torch.int16
        if fp4:
            scales, dtype = (-(-N // 128), -(-K // 64), 32, 4, 4), torch.float8_e4m3fn  # type: ignore[assignment]
        width, kind = (K // 2, torch.uint8) if fp4 else (chunks * 4, torch.int32)
        tensors.append(torch.empty((count, N, width), dtype=kind, device=device))
        tensors.append(torch.empty((count, *scales), dtype=dtype, device=device))
    tensors.append(torch.empty(count, 3, device=device))
    tensors += [torch.ones(count, device=device), torch.ones(count, device=device)]
    return (*tensors, torch.tensor([math.inf, -math.inf]))


def fill(
    tensors: tuple[Tensor, ...],
    index: int,
    w1: PackedNVFP4,
    w2: PackedNVFP4,
    w3: PackedNVFP4,
    input_scale_13: Tensor | None,
    input_scale_2: Tensor | None,
) -> None:
    """Repack one expert to its place."""
    w13, w13_scale, w2_all, w2_scale, scale_2, scale_13, scale_act, bounds = tensors
    codes = repack.interleave(w1.weight, w3.weight)
    # As bytes: torch cannot stack E4M3 everywhere.
    scales = repack.interleave(w1.weight_scale.view(torch.uint8), w3.weight_scale.view(torch.uint8))
    for place, place_scale, c, s in (
        (w13, w13_scale, codes, scales.view(torch.float8_e4m3fn)),
        (w2_all, w2_scale, w2.weight, w2.weight_scale),
    ):
        if place_scale.dtype == torch.int16:
            c, s = repack.twiddle(c, s)
        else:
            s = swizzle(s)
        place[index].copy_(c)
        as_bits(place_scale[index]).copy_(as_bits(s))
    for column, packed in enumerate((w1, w3, w2)):
        scale_2[index, column].copy_(packed.weight_scale_2.reshape(()))
    if input_scale_13 is not None and input_scale_2 is not None:
        scale_13[index].copy_(input_scale_13)
        scale_act[index].copy_(input_scale_2)
        value = input_scale_13.cpu()
        bounds.copy_(torch.stack((torch.minimum(bounds[0], value), torch.maximum(bounds[1], value))))


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
    y_TD = torch.empty_like(x_TD)
    for start in range(0, x_TD.shape[0], MOST_TOKENS):
        rows = slice(start, start + MOST_TOKENS)
        _moe(
            x_TD[rows], tensors, experts_TK[rows], weights_TK[rows], first, activations, invariant, y_TD[rows]
        )
    return y_TD


def _moe(
    x_TD: Tensor,
    tensors: tuple[Tensor, ...],
    experts_TK: Tensor,
    weights_TK: Tensor,
    first: int,
    activations: str,
    invariant: bool,
    y_TD: Tensor,
) -> None:
    w13, w13_scale, w2, w2_scale, scale_2, scale_13, scale_act, bounds = tensors
    (T, D), K = x_TD.shape, experts_TK.shape[1]
    count, I, S = w13.shape[0], w13.shape[1] // 2, T * K
    device, chip = x_TD.device, chips.of(x_TD.device)
    fp4, w4a4 = w13_scale.dtype != torch.int16, activations == "nvfp4"
    f32 = x_TD.dtype == torch.float32 and not w4a4
    tokens = S / count
    tile = tiles.fp4(chip, tokens, invariant) if fp4 else tiles.bf16(chip, tokens, invariant, f32=f32)

    direct = T == 1  # each slot is a block: nothing to sort
    slots, block_expert = (
        (experts_TK, experts_TK) if direct else sort_slots(experts_TK, first, count, tile.BT)
    )
    blocks = S if direct else block_expert.numel()
    x, x_scale, by_slot = x_TD, x_TD, False
    if w4a4:
        low, high = bounds.tolist()
        by_slot = low != high
        x, x_scale = quantize_rows(
            x_TD, scale_13 if by_slot else scale_13[:1], fp4=fp4, experts=experts_TK if by_slot else None,
            first=first, topk=K,
        )  # fmt: skip
    act, act_scale = _activations(S, I, x_TD.dtype, fp4, w4a4, device)
    out_SD = torch.empty((S, D), dtype=torch.float32, device=device)
    common = {"DIRECT": direct, "FP4": fp4, "W4A4": w4a4, "INTERPRET": INTERPRET, **tile._asdict(), **OPTIONS}
    nvfp4_moe_up_kernel[(triton.cdiv(2 * I, tile.BN), blocks)](
        as_bits(x), as_bits(x_scale), w13, as_bits(w13_scale), scale_2, scale_13, scale_act,
        as_bits(act), as_bits(act_scale), slots, block_expert, S, first, count, I, D, D // 2, D // 16,
        w13.shape[2], w13_scale.shape[2], w13_scale[0].numel(),
        TOPK=K, BY_SLOT=by_slot, BF16=x_TD.dtype == torch.bfloat16, HARDWARE=fp4 and device.type != "cpu",
        EVEN=D % tile.BK == 0, **common,
    )  # fmt: skip
    nvfp4_moe_down_kernel[(triton.cdiv(D, tile.BN), blocks)](
        as_bits(act), as_bits(act_scale), w2, as_bits(w2_scale), scale_2, scale_act, out_SD, slots, block_expert,
        S, first, count, D, I, I // 2, I // 16, w2.shape[2], w2_scale.shape[2], w2_scale[0].numel(),
        EVEN=I % tile.BK == 0, **common,
    )  # fmt: skip
    BD = min(1024, triton.next_power_of_2(D))
    nvfp4_moe_sum_kernel[(T, triton.cdiv(D, BD))](
        out_SD, experts_TK, weights_TK, as_bits(y_TD), first, count, D,
        TOPK=K, INTERPRET=INTERPRET, BD=BD, num_warps=4, **OPTIONS,
    )  # fmt: skip


def _activations(
    S: int, I: int, dtype: torch.dtype, fp4: bool, w4a4: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for w2's input of every slot: codes and scales, or values (twice)."""
    if fp4:
        codes = torch.empty((S, I // 2), dtype=torch.uint8, device=device)
        return codes, torch.empty((S, I // 16), dtype=torch.float8_e4m3fn, device=device)
    values = torch.empty((S, I), dtype=torch.bfloat16 if w4a4 else dtype, device=device)
    return values, values
