"""Which tile a product takes on which chip: sizes, warps and stages, chosen by the tokens that share a weight.

Every tile here is compiled ahead of time in the tests for every chip that may take it: the right instruction, no
spilled register, within shared and tensor memory.  None of them has been timed on a GPU yet: few tokens are bound
by reading weights, so tiles are small and many; many tokens are bound by the tensor cores, so a tile of weights is
unpacked for as many tokens as fit.
"""

from __future__ import annotations

from typing import NamedTuple

from m27quant.kernels.chip import Chip


class Tile(NamedTuple):
    """One block's share of a product, and how it runs."""

    BN: int
    """Rows of weights."""
    BT: int
    """Tokens."""
    BK: int
    """Columns in one step."""
    num_warps: int
    num_stages: int


INVARIANT_TOKENS = 32
"""Tokens in a tile where results may not depend on how many there are: little lost with one token, where a tensor
core waits for weights anyway; with thousands, weights are unpacked for 32 tokens at a time and not for 128."""


def tokens_in_tile(tokens: float, most: int, invariant: bool) -> int:
    """Tokens of a tile where about `tokens` share a weight."""
    if invariant:
        return INVARIANT_TOKENS
    for limit, tile in ((16, 16), (40, 32), (96, 64), (256, 128)):
        if tokens <= limit and tile <= most:
            return tile
    return most


def bf16(chip: Chip, tokens: float, invariant: bool, *, f32: bool = False) -> Tile:
    """The tile of `gpu_tile.product_bf16`; `f32`: activations are F32, three BF16 each."""
    BT = tokens_in_tile(tokens, 32 if f32 else 128, invariant)
    if f32:
        return Tile(64, BT, 64, 4, 2)
    if chip.arch != 90 and not chip.tmem:  # a warp multiplies alone, and keeps its sums in registers
        return {
            16: Tile(64, 16, 256, 4, 3),
            32: Tile(64, 32, 128, 4, 3),
            64: Tile(64, 64, 128, 4, 3),
            128: Tile(128, 128, 64, 8, 3),
        }[BT]
    return {
        16: Tile(64, 16, 256, 4, 4),
        32: Tile(128, 32, 128, 4, 4),
        64: Tile(128, 64, 128, 4, 3),
        128: Tile(128, 128, 64, 8, 4),
    }[BT]


def fp4(chip: Chip, tokens: float, invariant: bool) -> Tile:
    """The tile of `gpu_tile.product_fp4`; tensor memory wants 128 rows of weights."""
    BT = tokens_in_tile(tokens, 128, invariant)
    if chip.tmem:
        return {
            16: Tile(128, 16, 256, 8, 4),
            32: Tile(128, 32, 256, 4, 4),
            64: Tile(128, 64, 256, 4, 4),
            128: Tile(128, 128, 256, 4, 4),
        }[BT]
    return {
        16: Tile(64, 16, 256, 4, 4),
        32: Tile(64, 32, 256, 4, 4),
        64: Tile(128, 64, 128, 8, 3),
        128: Tile(128, 128, 128, 8, 3),
    }[BT]
