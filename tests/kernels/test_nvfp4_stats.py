"""Counts of packed codes: the compiled core, plain numpy and a count code by code agree."""

from __future__ import annotations

import numpy as np
import pytest

from m27quant.kernels.nvfp4_stats import (
    CodeCounts,
    any_nonfinite,
    column_energy,
    count_codes,
    reference,
    zero_blocks,
)


def by_hand(codes: np.ndarray) -> CodeCounts:
    nibbles = np.stack((codes & 15, codes >> 4), -1).reshape(-1, 16) & 7
    largest = nibbles == 7
    return CodeCounts(
        len(nibbles),
        int((nibbles == 0).all(1).sum()),
        int(largest.sum()),
        int(largest.any(1).sum()),
    )


def some_codes(blocks: int) -> np.ndarray:
    generator = np.random.default_rng(blocks)
    codes = generator.integers(0, 256, (blocks, 8), np.uint8)
    codes[generator.random(blocks) < 0.2] = 0
    codes[generator.random(blocks) < 0.1] = 0x88  # minus zero
    codes[generator.random(blocks) < 0.1] &= 0xBB
    return codes.ravel()


@pytest.mark.parametrize("blocks", [0, 1, 7, 100, 40_000])
@pytest.mark.parametrize("kernels", ["", "reference"])
def test_counts(blocks: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        monkeypatch.setenv("M27QUANT_KERNELS", kernels)
    codes = some_codes(blocks)
    assert count_codes(codes) == by_hand(codes)
    assert reference(codes) == by_hand(codes)[1:]
    assert len(zero_blocks(codes)) == by_hand(codes).zero


def test_every_byte() -> None:
    for byte in range(256):
        codes = np.full(8, byte, np.uint8)
        assert count_codes(codes) == by_hand(codes)


def test_what_is_no_whole_block_is_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        count_codes(np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        count_codes(np.zeros(32, np.uint8)[::2])


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize(
    ("dtype", "exponent"), [(np.uint16, 0x7F80), (np.uint16, 0x7C00), (np.uint32, 0x7F800000)]
)
def test_a_nan_is_found_wherever_it_is(
    kernels: str, dtype: type, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M27QUANT_KERNELS", kernels)
    lowest = exponent & -exponent
    for size in (1, 7, 1000):
        numbers = np.random.default_rng(0).integers(0, exponent, size).astype(dtype)
        assert not any_nonfinite(numbers, exponent)
        numbers[size // 2] = exponent - lowest  # the largest finite ones
        assert not any_nonfinite(numbers, exponent)
        for at in {0, size // 2, size - 1}:
            wrong = numbers.copy()
            wrong[at] = exponent | 1 << (8 * numbers.itemsize - 1)  # minus infinity
            assert any_nonfinite(wrong, exponent)


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("rows", [1, 32, 400])
def test_column_energy(kernels: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M27QUANT_KERNELS", kernels)
    codes = np.random.default_rng(rows).integers(0, 256, (rows, 37)).astype(np.uint8)
    codes[:, 0] = 0xFF  # 400 times the largest: the sums just fit
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = np.stack([4 * (values[half] ** 2).sum(0) for half in (codes & 7, codes >> 4 & 7)])
    assert column_energy(codes).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="at most 400 rows"):
        column_energy(np.zeros((401, 2), np.uint8))
