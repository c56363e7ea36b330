"""Products of many tokens on sm_100: everything loaded by TMA, block scales swizzled from memory to tensor memory.

After Triton's tutorial 10 ("Block Scaled Matrix Multiplication"): scales in the 128x4 tiles of cuBLAS are loaded as
5-D blocks and reach tensor memory by `tcgen05.cp`, past the registers, which `gpu_tile.product_fp4` needs for them.

In the kernel: b_ a tile; BN rows of weights, BT tokens, BK columns in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m27quant.kernels.bits import as_bits
from m27quant.kernels.chip import Chip
from m27quant.kernels.nvfp4_gemm.gpu_tile import INTERPRET, decoded, stored
from m27quant.kernels.nvfp4_gemm.tiles import Tile
from m27quant.kernels.nvfp4_quantize import gpu as nvfp4_quantize

TILE = Tile(BN=128, BT=256, BK=256, num_warps=8, num_stages=4)
FROM_TOKENS = 512
"""Fewer tokens leave multiprocessors without a tile of this size."""


@triton.jit
def _rows_of(b_tiles, R: tl.constexpr, BK: tl.constexpr):
    """Scales [R, BK / 16] of 128x4 tiles [1, R / 128, BK / 64, 2, 256]."""
    b_tiles = b_tiles.reshape(R // 128, BK // 64, 32, 4, 4)
    return b_tiles.trans(0, 3, 2, 1, 4).reshape(R, BK // 16)


@triton.jit(do_not_specialize=["T"])
def nvfp4_gemm_tma_kernel(
    x, x_scale, w, w_scale, weight_scale_2, input_scale, y, T, N, K,
    INTERPRET: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`y` [T, N], BF16 as int16 or F32; the first four are descriptors of codes [.., K/2] and 5-D tiles of scales."""
    n, t = tl.program_id(0) * BN, tl.program_id(1) * BT
    b_acc = tl.zeros((BN, BT), tl.float32)
    for k in range(0, K, BK):
        b_w, b_x = w.load([n, k // 2]), x.load([t, k // 2])
        b_ws = _rows_of(w_scale.load([0, n // 128, k // 64, 0, 0]), BN, BK)
        b_xs = _rows_of(x_scale.load([0, t // 128, k // 64, 0, 0]), BT, BK)
        if INTERPRET:
            b_ws, b_xs = b_ws.to(tl.uint8, bitcast=True), b_xs.to(tl.uint8, bitcast=True)
            b_xv = tl.trans(decoded(b_x, b_xs, BT, BK))
            b_acc = tl.dot(decoded(b_w, b_ws, BN, BK), b_xv, b_acc, input_precision="ieee")
        else:
            b_acc = tl.dot_scaled(b_w, b_ws, "e2m1", b_x.T, b_xs, "e2m1", b_acc)
    o_n, o_t = n + tl.arange(0, BN), t.to(tl.int64) + tl.arange(0, BT)
    b_acc = b_acc * tl.load(input_scale) * tl.load(weight_scale_2)
    stored(b_acc, y + o_t[None, :] * N + o_n[:, None], (o_n < N)[:, None] & (o_t < T)[None, :], INTERPRET)


def fits(chip: Chip, T: int, K: int) -> bool:
    """Whether these sizes are for this kernel; TMA wants rows of whole 16 bytes."""
    return chip.tmem and T >= FROM_TOKENS and K % 32 == 0


def gemm(x_TK: Tensor, tensors: tuple[Tensor, ...], N: int, input_scale: Tensor) -> Tensor:
    """y [T, N] in x's dtype."""
    w, w_scale, scale_2 = tensors
    T, K = x_TK.shape
    x, x_scale = nvfp4_quantize.quantize(x_TK, input_scale, swizzled=True)
    y_TN = torch.empty((T, N), dtype=x_TK.dtype, device=x_TK.device)
    nvfp4_gemm_tma_kernel[(triton.cdiv(N, TILE.BN), triton.cdiv(T, TILE.BT))](
        TensorDescriptor.from_tensor(x, [TILE.BT, TILE.BK // 2]), _tiles(x_scale, TILE.BT),
        TensorDescriptor.from_tensor(w, [TILE.BN, TILE.BK // 2]), _tiles(w_scale, TILE.BN),
        scale_2, input_scale, as_bits(y_TN), T, N, K,
        INTERPRET=INTERPRET, **TILE._asdict(), enable_fp_fusion=False,
    )  # fmt: skip
    return y_TN


def _tiles(scale: Tensor, rows: int) -> TensorDescriptor:
    """Swizzled scales [M/128, K/64, 32, 4, 4], of which a block is the tiles of `rows` rows and TILE.BK columns."""
    tiles = scale.reshape(
        1, *scale.shape[:2], 2, 256
    )  # as E4M3: a cast in the kernel would cost the way past registers
    return TensorDescriptor.from_tensor(tiles, [1, rows // 128, TILE.BK // 64, 2, 256])
