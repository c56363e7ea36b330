"""Sums of x x^T over tokens, exactly: the same bits for any order of tokens, number of threads, and split over ranks.

Each channel of a piece of rows is rounded to multiples of a power of two: 2**-BITS of its largest value there, or
2**-18 where that is less.  Products are whole multiples then, and F64 adds them without rounding as long as they stay
below 2**53 of them, in whatever order a matrix product takes; by |sum x y|^2 <= sum x^2 sum y^2 it is enough to look
at the squares.  Before a channel could grow beyond that, all that is pending goes over into two whole numbers.

Shapes: T tokens, C channels.  Only panels on and above the diagonal are kept: rows [first, end), columns [first, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from m27quant.calib.moments import HIGH, LOW

LOWS = int(HIGH / LOW)
BITS = 18
"""A value keeps so many bits below the largest of its channel; BF16 has 8 in all."""
FINEST = 2.0**-18
"""Its square is LOW, what the second whole number counts."""
LARGEST = 2.0**24
"""Values beyond it count as this: sums of squares over 2**60 tokens still fit."""
EXACT = 2.0**52
"""Half of what F64 counts without rounding."""
NO_UNIT = 2.0**60
"""Of a channel that is all zero in a piece: it limits nothing."""
PANEL = 128
PIECE_ROWS = {"cpu": 512, "cuda": 4096}
"""Rows whose F64 values are in memory at a time; at most EXACT / 2**(2 BITS) = 65,536."""
PIECE_SUMS = 1 << 18
"""Sums that are made whole at a time."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows [first, end) and columns from `first` on of a symmetric matrix, at `offset` among all panels' numbers."""

    first: int
    end: int
    width: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its numbers [end - first, width] among those of all."""
        return flat[self.offset : self.offset + self.size].view(self.end - self.first, self.width)

    @property
    def size(self) -> int:
        return (self.end - self.first) * self.width


def panels(channels: int) -> Iterator[Panel]:
    """From the top down."""
    offset = 0
    for first in range(0, channels, PANEL):
        panel = Panel(first, min(first + PANEL, channels), channels - first, offset)
        yield panel
        offset += panel.size


def num_sums(channels: int) -> int:
    """Numbers in all panels: a little more than half of C * C."""
    return sum(panel.size for panel in panels(channels))


class Gram:
    """The sum of x x^T over the rows that were added."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.channels = channels
        self._pending = torch.zeros(num_sums(channels), dtype=torch.float64, device=device)
        self._whole = torch.zeros(2, len(self._pending), dtype=torch.int64, device=device)
        self._squares_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self._unit_C = torch.full_like(self._squares_C, NO_UNIT)

    def clear(self) -> None:
        """Forget all rows."""
        self._pending.zero_()
        self._whole.zero_()
        self._begin()

    def add(self, x_TC: torch.Tensor) -> None:
        """Rows of BF16 values; those that are NaN or Inf somewhere are left out."""
        for x in torch.split(x_TC, PIECE_ROWS[x_TC.device.type]):
            self._add(x.double())

    def whole(self) -> torch.Tensor:
        """The sums as whole numbers, int64 [2, n], of HIGH and of LOW: add those of other ranks' rows to them."""
        self._settle()
        return self._whole

    def _add(self, x_TC: torch.Tensor) -> None:
        finite_T = x_TC.isfinite().all(1)
        if not bool(finite_T.all()):
            x_TC = x_TC[finite_T]
        if not len(x_TC):
            return
        x_TC.clamp_(-LARGEST, LARGEST)
        largest_C = x_TC.abs().amax(0)
        unit_C = torch.ldexp(torch.ones_like(largest_C), torch.frexp(largest_C).exponent - BITS)
        unit_C = torch.where(largest_C > 0, unit_C.clamp(min=FINEST), NO_UNIT)
        x_TC.div_(unit_C).round_().mul_(unit_C)
        squares_C = x_TC.square().sum(0)
        finest_C = torch.minimum(self._unit_C, unit_C)
        if bool((self._squares_C + squares_C > EXACT * finest_C.square()).any()):
            self._settle()
            finest_C = unit_C
        self._squares_C += squares_C
        self._unit_C = finest_C
        for panel in panels(self.channels):
            panel.of(self._pending).addmm_(x_TC[:, panel.first : panel.end].T, x_TC[:, panel.first :])

    def _settle(self) -> None:
        """Make what is pending whole."""
        parts = (torch.split(sums, PIECE_SUMS) for sums in (self._pending, *self._whole))
        for pending, high, low in zip(*parts, strict=True):
            above = (pending / HIGH).floor_()
            high += above.long()
            low += (pending - above.mul_(HIGH)).div_(LOW).long()
            pending.zero_()
        self._begin()

    def _begin(self) -> None:
        self._squares_C.zero_()
        self._unit_C = torch.full_like(self._unit_C, NO_UNIT)


def symmetric(whole: torch.Tensor, channels: int) -> torch.Tensor:
    """The matrix F64 [C, C] that whole sums stand for, on their device, each rounded once."""
    found_CC = torch.empty(channels, channels, dtype=torch.float64, device=whole.device)
    for panel in panels(channels):
        high, low = (panel.of(part) for part in whole)
        carried = torch.div(low, LOWS, rounding_mode="floor")  # sums of parts carry as the sum of all would
        values = (high + carried).double().mul_(HIGH)
        values += (low - carried * LOWS).double().mul_(LOW)
        found_CC[panel.first : panel.end, panel.first :] = values
        found_CC[panel.first :, panel.first : panel.end] = values.T
    return found_CC


def gram_bytes(channels: int) -> int:
    """What a `Gram` holds."""
    return 3 * 8 * num_sums(channels)


def piece_bytes(channels: int, device: torch.device) -> int:
    """What adding to one, or making it whole, takes beside it."""
    return 3 * 8 * max(PIECE_ROWS[device.type] * channels, PIECE_SUMS)
