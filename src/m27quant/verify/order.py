"""What statistics can tell without the source: block scales in kernels' order, nibbles in the wrong one.

Trained matrices have rows and columns of different size, and a mistake in the order tears them apart.  A matrix that
has no such structure (random weights, few columns) gives no evidence, and nothing is said about it.

Shapes: N out features, G groups of 16 in features, R rows of a tile, J pairs of neighbouring in features, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TILE_ROWS, TILE_COLUMNS = 128, 4
"""Of kernels' layout (`difference.swizzle`): in a tile row r = 32 a + b of column c lies at 16 b + 4 a + c."""
SIGMAS, LEAST_GAIN = 10.0, 0.02
"""What undoing a swizzle must explain in addition: of the variance, and in standard deviations of chance.

Measured on [1536, 3072] and its transpose: undoing what was never done gains at most 0.001, of 128 rows of 16 groups at
most 0.015 where 0.083 is needed; rows that differ by 5% gain 0.04, by 10% 0.13, columns by 20% 0.03 to 0.04.
"""
Z = 6.0
"""Standard deviations: by chance one matrix in a billion."""
SAMPLE_ROWS, SAMPLE_GROUPS = 32, 64


class Explained(NamedTuple):
    """Shares of the variance of block scales (of their codes, which are nearly logarithms) by rows and columns."""

    stored: float
    unswizzled: float
    needed: float
    """More than `stored` by this is no chance."""

    @property
    def looks_swizzled(self) -> bool:
        """Undoing a swizzle brings rows and columns to light."""
        return self.unswizzled - self.stored > self.needed


def explained(scale_NG: Bytes) -> Explained | None:
    """By the first tiles of E4M3 codes [N, G]; None where they fill no tiles or are all the same."""
    n, g = scale_NG.shape
    if n % TILE_ROWS or g % TILE_COLUMNS or g < 2 * TILE_COLUMNS:
        return None
    x_RG = scale_NG[:TILE_ROWS].astype(np.float32)
    x_RG -= x_RG.mean()
    total = float(np.dot(x_RG.ravel(), x_RG.ravel()))
    if not total:
        return None
    tiles = x_RG.reshape(
        g // TILE_COLUMNS, TILE_ROWS, TILE_COLUMNS
    )  # column of tiles, row within, column within
    of_tile, of_rows, of_row = (np.ones(n, np.float32) for n in (TILE_COLUMNS, TILE_ROWS, g))
    # sums as products: numpy's own take ten times as long
    stored = _square(of_rows @ x_RG) / TILE_ROWS + _square(x_RG @ of_row) / g
    unswizzled = _square(of_rows @ tiles) / TILE_ROWS + _square((tiles @ of_tile).sum(0)) / g
    chance = math.sqrt(2 * (TILE_ROWS + g)) / (TILE_ROWS * g)
    return Explained(stored / total, unswizzled / total, max(LEAST_GAIN, SIGMAS * chance))


def _square(x: Floats) -> float:
    return float(np.dot(x.ravel(), x.ravel()))


def row_pairs(scale_NG: Bytes) -> npt.NDArray[np.float16]:
    """[N/2]: how much larger the even row of a pair is than the odd one, by the codes of its block scales."""
    sample_NG = scale_NG[:, :SAMPLE_GROUPS].astype(np.float32)
    level_N = sample_NG @ np.full(sample_NG.shape[1], 1 / sample_NG.shape[1], np.float32)
    even = len(level_N) // 2 * 2
    result: npt.NDArray[np.float16] = (level_N[0:even:2] - level_N[1:even:2]).astype(np.float16)
    return result


def pairs(energy_2J: npt.NDArray[np.uint32]) -> Floats:
    """[J]: how much larger the column of the low nibble is, as a logarithm; they share their block scales."""
    low_J, high_J = energy_2J.astype(np.float32) + 4
    result: Floats = np.log(low_J / high_J)
    return result


def deviations(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The correlation of two series in standard deviations of chance; 0 where one is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(np.dot(x, x)) * float(np.dot(y, y)))
    return float(np.dot(x, y)) / norm * math.sqrt(x.size) if norm else 0.0
