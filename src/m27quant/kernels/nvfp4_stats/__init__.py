"""Statistics of packed E2M1 codes: how many blocks are zero, how many codes are at the format's limit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m27quant.kernels import native
from m27quant.kernels.dispatch import choose

BLOCK_BYTES = 8
"""Sixteen codes."""
MAGNITUDES = np.uint64(0x7777777777777777)
ONES = np.uint64(0x1111111111111111)
MOST_ROWS = 400
_SQUARES = np.array([0, 1, 4, 9, 16, 36, 64, 144], np.uint16)
_STRIP = 1 << 15  # words: the intermediates stay in the cache


class CodeCounts(NamedTuple):
    """Of a run of whole blocks of 16 codes."""

    blocks: int
    zero: int
    """Blocks whose 16 codes are all zero, of either sign."""
    largest: int
    """Codes of magnitude 6, the format's largest."""
    reached: int
    """Blocks that hold such a code: all that are not zero, where scales come from block maxima."""


def count_codes(codes: npt.NDArray[np.uint8]) -> CodeCounts:
    """Count in contiguous U8 [n], n a multiple of 8.

    Raises:
        ValueError: not whole blocks, or not contiguous.
    """
    if codes.size % BLOCK_BYTES or not codes.flags.c_contiguous:
        raise ValueError("needs contiguous bytes in whole blocks of 8")
    blocks = codes.size // BLOCK_BYTES
    if choose("nvfp4_stats", "cpu").backend == "cpu-native":
        counts = np.empty(3, np.int64)
        native.function("m27_count_codes")(codes.ctypes.data, blocks, counts.ctypes.data)
        return CodeCounts(blocks, *counts.tolist())
    return CodeCounts(blocks, *reference(codes))


def reference(codes: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """(zero, largest, reached) in plain numpy."""
    zero = largest = reached = 0
    words = codes.view("<u8")
    for begin in range(0, words.size, _STRIP):
        x = words[begin : begin + _STRIP]
        seven = x & (x >> np.uint64(1)) & (x >> np.uint64(2)) & ONES
        zero += int(np.count_nonzero((x & MAGNITUDES) == 0))
        largest += int(np.unpackbits(seven.view(np.uint8)).sum(dtype=np.int64))
        reached += int(np.count_nonzero(seven))
    return zero, largest, reached


def zero_blocks(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Indices of the blocks whose codes are all zero."""
    return np.flatnonzero((codes.view("<u8") & MAGNITUDES) == 0)


def column_energy(codes_RJ: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """U16 [2, J]: sums of (2 E2M1)^2 over the rows, of low nibbles and of high ones.

    Raises:
        ValueError: not contiguous, or more than `MOST_ROWS` rows, whose sums would not fit.
    """
    rows, columns = codes_RJ.shape
    if rows > MOST_ROWS or not codes_RJ.flags.c_contiguous:
        raise ValueError(f"needs contiguous bytes in at most {MOST_ROWS} rows")
    if choose("nvfp4_stats", "cpu").backend == "cpu-native":
        energy_2J = np.empty((2, columns), np.uint16)
        low, high = (row.ctypes.data for row in energy_2J)
        native.function("m27_column_energy")(codes_RJ.ctypes.data, rows, columns, low, high)
        return energy_2J
    halves = (_SQUARES[codes_RJ & 7], _SQUARES[codes_RJ >> 4 & 7])
    return np.stack([half.sum(0, dtype=np.uint16) for half in halves])


def any_nonfinite(numbers: npt.NDArray[np.uint16] | npt.NDArray[np.uint32], exponent: int) -> bool:
    """Whether a number, given as its contiguous bits, has all bits of `exponent` set: NaN or infinity."""
    if choose("nvfp4_stats", "cpu").backend == "cpu-native":
        core = native.function(f"m27_nonfinite{8 * numbers.itemsize}")
        return bool(core(numbers.ctypes.data, numbers.size, exponent))
    return bool(((numbers & exponent) == exponent).any())
