"""Sums of x x^T: whole numbers, so equal to Python's, whatever the order, the threads and the owners of the rows."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch

from m27quant.calib import gram
from m27quant.calib.gram import BITS, FINEST, LARGEST, Gram, num_sums, panels, symmetric
from tests.tolerance import gram_rtol

CPU = torch.device("cpu")


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def added(parts: Sequence[torch.Tensor]) -> Gram:
    found = Gram(parts[0].shape[1], CPU)
    for part in parts:
        found.add(part)
    return found


def matrix(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return symmetric(added(parts).whole(), parts[0].shape[1])


def rounded(x: torch.Tensor) -> list[list[Fraction]]:
    """Each channel in multiples of 2**-BITS of the power of two above its largest value."""
    columns = []
    for column in x.double().T.tolist():
        column = [max(-LARGEST, min(LARGEST, value)) for value in column]
        largest = max(map(abs, column))
        unit = Fraction(max(FINEST, 2.0 ** (math.frexp(largest)[1] - BITS)))
        columns.append([round(Fraction(value) / unit) * unit for value in column])
    return columns


def exactly(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in rational numbers, each sum rounded to F64 once."""
    channels = parts[0].shape[1]
    total = [[Fraction(0)] * channels for _ in range(channels)]
    for part in parts:
        columns = rounded(part)
        for i, a in enumerate(columns):
            for j, b in enumerate(columns):
                total[i][j] += sum(x * y for x, y in zip(a, b, strict=True))
    return torch.tensor([[float(value) for value in row] for row in total], dtype=torch.float64)


def hard_parts() -> list[torch.Tensor]:
    """Channels from 1e-6 to 1e5, one that is all zero, chunks that are a thousand times the others."""
    torch.manual_seed(0)
    scale = torch.logspace(-6, 5, 12)
    scale[4] = 0
    return [
        (torch.randn(rows, 12) * scale * 1000.0 ** (number % 3)).bfloat16()
        for number, rows in enumerate((9, 1, 30, 17, 4, 21))
    ]


def test_equal_to_rational_numbers() -> None:
    parts = hard_parts()
    assert matrix(parts).equal(exactly(parts))


def test_bf16_values_near_their_largest_are_not_rounded_at_all() -> None:
    torch.manual_seed(1)
    x = (torch.rand(200, 40) + 0.01).bfloat16()
    expected = torch.tensor(
        [[math.fsum((a * b).tolist()) for b in x.double().T] for a in x.double().T], dtype=torch.float64
    )
    assert matrix([x]).equal(expected)


def test_many_panels_against_a_product() -> None:
    torch.manual_seed(2)
    x = (torch.randn(700, 300) * torch.logspace(-2, 2, 300)).bfloat16()
    found, plain = matrix([x]), x.double().T @ x.double()
    size = plain.diagonal().sqrt()
    assert ((found - plain).abs() / (size[:, None] * size)).max() < gram_rtol(700)
    assert found.equal(found.T)
    assert sum(panel.size for panel in panels(300)) == num_sums(300) < 300 * 300


@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_owner_nor_threads_change_a_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "PANEL", 5)
    parts = hard_parts()
    expected = matrix(parts)
    mixed = random.Random(seed).sample(parts, len(parts))
    with num_threads(1 + seed):
        assert matrix(mixed).equal(expected)
    apart = added(mixed[:2]).whole() + added(mixed[2:]).whole()
    assert symmetric(apart, 12).equal(expected)


def test_large_products_are_not_split_among_threads_with_other_sums() -> None:
    """Few channels and many rows: what matrix products cut along the sum."""
    torch.manual_seed(3)
    x = (torch.randn(5000, 16) * 3).bfloat16()
    found = []
    for threads in (1, 2):
        with num_threads(threads):
            found.append(matrix([x]))
    assert found[0].equal(found[1])


def test_rows_that_are_not_finite_are_left_out() -> None:
    x = torch.randn(600, 16).bfloat16()
    good = torch.ones(600, dtype=torch.bool)
    for row, bad in ((0, float("nan")), (299, float("inf")), (511, -float("inf"))):
        x[row, row % 16], good[row] = bad, False
    assert matrix(list(torch.split(x, 512))).equal(matrix([x[:512][good[:512]], x[512:]]))
    assert not matrix([torch.full((3, 16), float("nan")).bfloat16()]).any()
    assert not matrix([x[:0]]).any()


def test_huge_and_tiny_values_stay_finite_and_in_order() -> None:
    x = torch.full((4, 16), 3e38).bfloat16()
    x[:, 1], x[:, 2] = 1e-30, 1e6
    found = matrix([x] * 300)
    assert found.isfinite().all()
    assert found[1, 1] == 0 < found[2, 2] < found[0, 0]


def test_cleared_is_as_new() -> None:
    parts = hard_parts()
    found = added(parts[:3])
    found.whole()
    found.add(parts[4])
    found.clear()
    found.add(parts[5])
    assert symmetric(found.whole(), 12).equal(matrix(parts[5:]))
