"""Groups of 16 that make a search for block scales hard, as BF16 and FP8 weights with the amax to pack them under."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from m27quant.kernels import nvfp4_pack
from tests.kernels import packing

Case = tuple[Tensor, Tensor | None, Tensor, tuple[int, int]]
"""Weight, block scales or None, amax, rows and columns of a block."""


def _normal(g: torch.Generator, N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=g) * 0.02


def _student(g: torch.Generator, N: int, K: int) -> Tensor:
    """t with 4 degrees of freedom: heavier tails than real weights have."""
    squares = torch.randn(4, N, K, generator=g).square().sum(0) / 4
    return torch.randn(N, K, generator=g) / squares.sqrt() * 0.01


def _on_the_grid(g: torch.Generator, N: int, K: int) -> Tensor:
    """E2M1 numbers and the middles between them, times powers of two: ties of elements and of scales."""
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12])
    values = grid[torch.randint(0, 17, (N, K), generator=g)]
    return values * torch.exp2(torch.randint(-3, 3, (N, K // 16), generator=g)).repeat_interleave(16, 1)


def _one_hot(g: torch.Generator, N: int, K: int) -> Tensor:
    x = torch.zeros(N, K)
    x[:, ::16] = torch.randn(N, K // 16, generator=g)
    return x


def _equal_magnitudes(g: torch.Generator, N: int, K: int) -> Tensor:
    signs = torch.randint(0, 2, (N, K), generator=g) * 2 - 1
    return torch.randn(N, K // 16, generator=g).repeat_interleave(16, 1) * signs


def _wide_range(g: torch.Generator, N: int, K: int) -> Tensor:
    """Blocks from far below 2^-9 of a scale to the largest: the ends of E4M3, its subnormal numbers, zeros."""
    exponents = torch.randint(-24, 3, (N, K // 16), generator=g)
    x = torch.randn(N, K, generator=g) * torch.exp2(exponents).repeat_interleave(16, 1)
    x[::7] = 0
    return x


def _outliers(g: torch.Generator, N: int, K: int) -> Tensor:
    x = torch.randn(N, K, generator=g)
    return torch.where(torch.rand(N, K, generator=g) < 0.02, x * 300, x)


DISTRIBUTIONS: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "normal": _normal,
    "student": _student,
    "on the grid": _on_the_grid,
    "one hot": _one_hot,
    "equal magnitudes": _equal_magnitudes,
    "wide range": _wide_range,
    "outliers": _outliers,
}


def as_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 blocks of 128 x 128, each filling the range of E4M3, as real checkpoints have them."""
    N, K = x.shape
    blocks = x.view(N // 128, 128, K // 128, 128)
    scale = (blocks.abs().amax((1, 3)) / 448).clamp_min(1e-30)
    return (blocks / scale[:, None, :, None]).view(N, K).to(torch.float8_e4m3fn), scale


def cases(kind: str, N: int, K: int, seed: int = 0) -> Iterator[Case]:
    """One distribution in BF16 (a quarter of the rows) and FP8, under its own amax, a partner's, one that clips."""
    x = DISTRIBUTIONS[kind](torch.Generator().manual_seed(seed), N, K)
    for weight, scale in ((x[: N // 4].bfloat16(), None), as_fp8(x)):
        amax = nvfp4_pack.amax(weight, scale)
        for factor in (1.0, 1.7, 0.03):
            yield weight, scale, amax * factor, packing.BLOCK


def extreme_cases() -> Iterator[Case]:
    """Every FP8 code under every maximum, block scales from all over F32, BF16 numbers at both ends."""
    weight = packing.every_code_under_every_maximum()
    block = (weight.shape[0], weight.shape[1])
    for scale in packing.block_scales()[::5]:
        scale_inv = torch.tensor([[scale]])
        amax = nvfp4_pack.amax(weight, scale_inv, block=block)
        if 0 < amax < 1e38:
            yield weight, scale_inv, amax, block
    g = torch.Generator().manual_seed(5)
    for spread in (1e-38, 1e-30, 1e30, 3e37):
        x = (torch.randn(32, 256, generator=g).clamp(-4, 4) * spread).bfloat16()
        yield x, None, nvfp4_pack.amax(x), packing.BLOCK
    x = torch.randn(32, 256, generator=g).bfloat16()
    yield x, None, nvfp4_pack.amax(x) * 2.0**-40, packing.BLOCK
    yield torch.zeros(4, 64, dtype=torch.bfloat16), None, torch.tensor(1.0), packing.BLOCK
