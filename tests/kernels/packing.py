"""Weights that are hard to pack, and nvidia-modelopt as the judge of the bytes."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)


@cache
def _modelopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and modelopt, the untested transformers
        from modelopt.torch.export import quant_utils
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    return SimpleNamespace(export=quant_utils, NVFP4=NVFP4QTensor)


def modelopt_pack(x_NK: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What modelopt's export writes for a BF16 weight: U8 [N, K/2], E4M3 [N, K/16], F32 []."""
    modelopt = _modelopt()
    scale_2 = modelopt.NVFP4.get_weights_scaling_factor_2_from_quantizer(SimpleNamespace(_amax=amax))
    scale_NG = modelopt.NVFP4.get_weights_scaling_factor(x_NK, 16, scale_2)[0]
    codes_NK2 = modelopt.export.to_quantized_weight(
        x_NK, scale_NG, modelopt.export.QUANTIZATION_NVFP4, scale_2, 16
    )
    return codes_NK2, scale_NG, scale_2


def modelopt_unpack(packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """modelopt's own F32 values of packed bytes."""
    codes_NK2, scale_NG, scale_2 = packed
    shape = torch.Size((codes_NK2.shape[0], codes_NK2.shape[1] * 2))
    tensor = _modelopt().NVFP4(shape, torch.float32, codes_NK2)
    return tensor.dequantize(torch.float32, scale=scale_NG, double_scale=scale_2, block_sizes={-1: 16})


def assert_same_bytes(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Shape, dtype and bits of each tensor; the message counts the bytes that differ."""
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        differ = a.reshape(-1).view(torch.uint8) != e.reshape(-1).view(torch.uint8)
        assert not differ.any(), (
            f"tensor {index}: {int(differ.sum())} bytes differ, first {int(differ.int().argmax())}"
        )


def dequantized(weight_NK: Tensor, scale_inv_IJ: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """The BF16 values, written down a second time and independently of the package."""
    N, K = weight_NK.shape
    scale_NK = scale_inv_IJ.repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    return (weight_NK.float() * scale_NK).to(torch.bfloat16)


def scale_grid(N: int, K: int, block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    return -(-N // block[0]), -(-K // block[1])


def random_fp8(N: int, K: int, seed: int = 0, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """A Gaussian matrix quantized to FP8 blocks, each filling the range, as real checkpoints are."""
    g = torch.Generator().manual_seed(seed)
    scale_IJ = torch.rand(scale_grid(N, K, block), generator=g) * 1e-4 + 2e-5
    codes = torch.randn(N, K, generator=g) * 100
    return codes.clamp(-448, 448).to(FP8), scale_IJ


def random_codes(N: int, K: int, seed: int = 0) -> Tensor:
    """Any finite FP8 code with the same probability, both zeros and all subnormal numbers among them."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (N, K), generator=g)
    return (codes + (codes >= 127)).to(torch.uint8).view(FP8)  # leaves out 0x7f and 0xff


def every_code_under_every_maximum() -> Tensor:
    """FP8 [16, K]: for each code m from 0 to 126, groups whose maximum is m and that hold every code up to m.

    Signs alternate, and both signs of each magnitude occur.
    """
    groups = []
    for m in range(127):
        codes = [sign | c for c in range(m + 1) for sign in (0, 128)]
        codes += [0] * (-len(codes) % 15)
        groups += [[*codes[i : i + 15], m] for i in range(0, len(codes), 15)]
    groups += [[0] * 16] * (-len(groups) % 16)
    return torch.tensor(groups, dtype=torch.uint8).view(16, -1).view(FP8)


def block_scales() -> list[float]:
    """Block scales from the ends and the middle of F32: powers of two, subnormal, random, zero."""
    g = torch.Generator().manual_seed(7)
    powers = [2.0**e for e in (-149, -140, -133, -127, -126, -90, -20, -9, 0, 5, 60, 118)]
    near_powers = [1.0 + 2**-23, 1.0 - 2**-24, 1.5 - 2**-23, 2**-7 * (1 + 2**-8), 2**-126 * (1 - 2**-10)]
    spread = (torch.rand(14, generator=g) * 240 - 125).exp2()
    usual = torch.rand(14, generator=g) * 3e-4 + 1e-5
    return [0.0, *powers, *near_powers, *spread.tolist(), *usual.tolist(), 7.5e35]
