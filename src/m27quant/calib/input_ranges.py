"""Input ranges of experts that are not the largest value seen: a percentile of it, or some headroom above it.

A W4A4 product gives each block of 16 inputs an E4M3 scale under `input_scale`, range / 2688.  A block whose largest
value is above the range saturates: its scale would pass 448, so its largest values are clipped.  A larger range
clips less and leaves small blocks fewer bits.  The percentile is one of the blocks' largest values, so that P says
which share of blocks saturates; blocks of zeros do not count.

BF16 has 2**15 magnitudes, so the blocks are simply counted by theirs: exactly, whatever the order of chunks and ranks.

Shapes: E experts, T tokens of a chunk, C channels, B = T C / 16 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m27quant.checkpoint.config import GROUP_SIZE, M2Config
from m27quant.errors import UsageError

MAGNITUDES = 0x7F80
"""Finite non-negative BF16 numbers; their bits are their order."""
LOWEST_HEADROOM, HIGHEST_HEADROOM = 0.01, 100.0
PIECE_ROWS = {"cpu": 512, "cuda": 16384}
"""Rows whose maxima are in memory at a time."""


@dataclass(frozen=True, slots=True)
class InputRange:
    """What range an input gets: `headroom` times the `percentile` of its blocks' largest values."""

    headroom: float = 1.0
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if not LOWEST_HEADROOM <= self.headroom <= HIGHEST_HEADROOM:
            raise UsageError(
                f"--input-scale-headroom {self.headroom:g}: not from {LOWEST_HEADROOM:g} to {HIGHEST_HEADROOM:g}",
                hint="1 takes the range as measured",
            )
        if not 0 < self.percentile <= 100:
            raise UsageError(
                f"--input-scale-percentile {self.percentile:g}: not above 0 and up to 100",
                hint="100 is the maximum",
            )

    @property
    def is_maximum(self) -> bool:
        """Whether nothing has to be counted."""
        return self.headroom == 1.0 and self.percentile == 100.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The ranges of one layer's inputs."""

    w13: float
    w2: list[float]
    """By expert."""
    saturated: dict[str, float]
    """Of w1's and w3's, and of all experts' w2's input, the share of blocks above the range."""


class BlockMaxima:
    """How many blocks of one layer's inputs have which largest value, over the chunks that were added."""

    def __init__(self, config: M2Config, device: torch.device) -> None:
        self.sums = torch.zeros(1 + config.num_local_experts, MAGNITUDES, dtype=torch.int64, device=device)
        """Counts: the MoE's input, then each expert's activation.  Add other ranks' to them."""

    def add_inputs(self, h_TD: torch.Tensor) -> None:
        """A chunk of the MoE's input."""
        self._add(0, h_TD)

    def add(self, expert: int, routed_h: torch.Tensor, act: torch.Tensor, routed_act: torch.Tensor) -> None:
        """A chunk through one expert; its activation on all tokens that count for ranges is looked at."""
        self._add(1 + expert, act)

    def done(self, experts: Sequence[int]) -> None:
        """Nothing: all experts' counts are kept."""

    def _add(self, row: int, x_TC: torch.Tensor) -> None:
        for x in torch.split(x_TC, PIECE_ROWS[x_TC.device.type]):
            largest_B = x.abs().reshape(-1, GROUP_SIZE).amax(1)
            bits_B = largest_B.view(torch.int16).long() & 0x7FFF
            self.sums[row] += torch.bincount(bits_B, minlength=1 << 15)[:MAGNITUDES]

    def limits(self, wanted: InputRange, *, shared: bool) -> Limits:
        """The ranges that `wanted` makes of the counts; `shared` gives all experts' w2 one."""
        counts = self.sums.cpu()
        counts[:, 0] = 0
        inputs, experts = counts[:1], counts[1:]
        if shared:
            experts = experts.sum(0, keepdim=True)
        values = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).double()
        (w13,), w13_share = _limits(inputs, values, wanted)
        w2, w2_share = _limits(experts, values, wanted)
        if shared:
            w2 = w2 * (len(counts) - 1)
        return Limits(w13, w2, {"w13": w13_share, "w2": w2_share})


def _limits(counts: torch.Tensor, values: torch.Tensor, wanted: InputRange) -> tuple[list[float], float]:
    """The range of every row of counts, 0 for an empty one, and which share of all blocks lies above theirs."""
    found, above, blocks = [], 0, int(counts.sum())
    for row in counts:
        upto = row.cumsum(0)
        needed = math.ceil(int(upto[-1]) * wanted.percentile / 100)
        limit = wanted.headroom * float(values[int((upto < needed).sum())]) if needed else 0.0
        above += int(row[values > limit].sum())
        found.append(limit)
    return found, float(f"{above / blocks:.6g}") if blocks else 0.0


def block_maxima_bytes(config: M2Config, device: torch.device) -> int:
    """The most that `BlockMaxima` and what is made of them take at a time."""
    counts = 8 * (1 + config.num_local_experts) * MAGNITUDES
    pieces = 6 * PIECE_ROWS[device.type] * max(config.hidden_size, config.intermediate_size)
    return 3 * counts + pieces


def block_maxima_on_disk(config: M2Config) -> int:
    """Bytes of one rank's counts."""
    return 8 * (1 + config.num_local_experts) * MAGNITUDES
