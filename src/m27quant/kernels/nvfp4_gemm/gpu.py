"""NVFP4 products in Triton; `gpu_tile` holds the inner loops, `repack` the layouts, `tiles` the choice of sizes.

    chip, mode                     weights      activations                     product
    FP4 tensor cores, W4A4         codes, swizzled scales   quantized           FP4, `tl.dot_scaled`
    any other, W4A4                twiddled     quantized, E2M1 * E4M3 in BF16  BF16, exact factors
    any, W4A16                     twiddled     BF16, or F32 as three BF16      BF16, exact weights

All accumulate in F32.  On FP4 tensor cores, `gpu_tma` takes many tokens on sm_100, and `M27QUANT_FP4=cublas` takes
torch's `scaled_mm` (cuBLASLt) for all but `invariant` products.
The sums of a row do not depend on other rows; with `invariant` the tile, and so their order, is one for any number.
Global scales multiply the finished sums, which have to fit in F32 before.  F32 activations below BF16's smallest
number, 2**-133, count 0 on a GPU.

Shapes: T tokens, N out features, K in features, G = K/16 groups.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from m27quant.kernels import chip as chips
from m27quant.kernels.bits import as_bits
from m27quant.kernels.nvfp4_gemm import gpu_tma, repack, tiles
from m27quant.kernels.nvfp4_gemm.gpu_quantize import quantize_rows
from m27quant.kernels.nvfp4_gemm.gpu_tile import INTERPRET, UNSCALE, product_bf16, product_fp4, stored
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.kernels.nvfp4_pack import reference as nvfp4_pack
from m27quant.kernels.nvfp4_quantize import gpu as nvfp4_quantize
from m27quant.kernels.nvfp4_quantize.reference import swizzle

OPTIONS = {"enable_fp_fusion": False}
CUBLAS_VARIABLE = "M27QUANT_FP4"


@triton.jit(do_not_specialize=["T"])
def nvfp4_gemm_kernel(
    x, x_scale, w, w_scale, weight_scale_2, input_scale, y, T, N, K, K2, G, stride_w, stride_s,
    FP4: tl.constexpr, W4A4: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`y` [T, N], BF16 as int16 or F32."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_row = tl.minimum(o_n, N - 1)
    if FP4:
        b_acc = product_fp4(x, x_scale, o_t, m_t, w, w_scale, o_row, K, K2, G, BN, BT, BK, EVEN, INTERPRET)
    else:
        b_acc = product_bf16(
            x, o_t * K, m_t, w, w_scale, o_row, K, stride_w, stride_s, BN, BT, BK, EVEN, INTERPRET
        )
        b_acc *= UNSCALE
    if W4A4:
        b_acc *= tl.load(input_scale)
    p_y = y + o_t[None, :] * N + o_n[:, None]
    stored(b_acc * tl.load(weight_scale_2), p_y, (o_n < N)[:, None] & m_t[None, :], INTERPRET)


def is_fp4(chip: chips.Chip, activations: str) -> bool:
    """Whether products of this mode run on FP4 tensor cores."""
    return activations == "nvfp4" and chips.why_not_fp4(chip, chips.triton_version()) is None


def prepare(packed: PackedNVFP4, activations: str) -> tuple[Tensor, ...]:
    """(codes, swizzled E4M3 scales, weight_scale_2) for FP4 tensor cores, else (words, int16 scale pairs, same)."""
    scale_2 = packed.weight_scale_2.reshape(())
    if is_fp4(chips.of(packed.weight.device), activations):
        return packed.weight.contiguous(), swizzle(packed.weight_scale), scale_2
    return (*repack.twiddle(packed.weight, packed.weight_scale), scale_2)


def unpack(tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """F32 [N, K]."""
    w, scale, scale_2 = tensors
    if scale.dtype == torch.int16:
        return repack.unpack(w, scale, scale_2, shape[1])
    return nvfp4_pack.unpack(w, repack.unswizzle(scale, shape[0], shape[1] // 16), scale_2)


def gemm(
    x_TK: Tensor,
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    activations: str,
    input_scale: Tensor | None,
    invariant: bool,
) -> Tensor:
    """y [T, N] in x's dtype."""
    T, (N, K) = x_TK.shape[0], shape
    w, w_scale, scale_2 = tensors
    fp4, w4a4 = w_scale.dtype != torch.int16, activations == "nvfp4"
    if fp4 and T and not invariant and _wants_cublas():
        assert input_scale is not None
        return _cublas(x_TK, tensors, input_scale)
    chip = chips.of(x_TK.device)
    if fp4 and not invariant and gpu_tma.fits(chip, T, K):
        assert input_scale is not None
        return gpu_tma.gemm(x_TK, tensors, N, input_scale)
    y_TN = torch.empty((T, N), dtype=x_TK.dtype, device=x_TK.device)
    if T == 0:
        return y_TN
    tile = (
        tiles.fp4(chip, T, invariant)
        if fp4
        else tiles.bf16(chip, T, invariant, f32=x_TK.dtype == torch.float32 and not w4a4)
    )
    x, x_scale = x_TK, scale_2  # a pointer that is never read
    if w4a4:
        assert input_scale is not None
        x, x_scale = quantize_rows(x_TK, input_scale, fp4=fp4)
    grid = (triton.cdiv(N, tile.BN), triton.cdiv(T, tile.BT))
    nvfp4_gemm_kernel[grid](
        as_bits(x), as_bits(x_scale), w, as_bits(w_scale), scale_2, input_scale if w4a4 else scale_2,
        as_bits(y_TN), T, N, K, K // 2, K // 16, w.shape[-1], w_scale.shape[-1],
        FP4=fp4, W4A4=w4a4, EVEN=K % tile.BK == 0, INTERPRET=INTERPRET, **tile._asdict(), **OPTIONS,
    )  # fmt: skip
    return y_TN


def _wants_cublas() -> bool:
    wish = os.environ.get(CUBLAS_VARIABLE, "")
    if wish not in ("", "triton", "cublas"):
        raise ValueError(f"{CUBLAS_VARIABLE} may be 'triton' or 'cublas'")
    return wish == "cublas"


def _cublas(x_TK: Tensor, tensors: tuple[Tensor, ...], input_scale: Tensor) -> Tensor:
    """The same product by cuBLASLt, through torch."""
    codes, w_scale, scale_2 = tensors
    x, x_scale = nvfp4_quantize.quantize(x_TK, input_scale, swizzled=True)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    swizzles = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    y_TN: Tensor = F.scaled_mm(
        x.view(torch.float4_e2m1fn_x2), codes.view(torch.float4_e2m1fn_x2).t(),
        [x_scale.flatten(), input_scale], recipe, [w_scale.flatten(), scale_2], recipe,
        swizzle_a=swizzles, swizzle_b=swizzles, output_dtype=x_TK.dtype,
    )  # fmt: skip
    return y_TN
