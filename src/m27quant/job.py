"""What the units of one run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from m27quant.calib.activations import Chunk
from m27quant.calib.data import Sequences
from m27quant.calib.input_ranges import InputRange
from m27quant.calib.layerwise import Dropped
from m27quant.calib.memory import MemoryPlan
from m27quant.checkpoint.source import Source
from m27quant.distributed.ranks import Ranks
from m27quant.plan import Plan
from m27quant.progress import ProgressCallback


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that the units of one run share."""

    source: Source
    plan: Plan
    sequences: Sequences
    chunks: list[Chunk]
    """This rank's."""
    memory: MemoryPlan
    device: torch.device
    work: Path
    """The folder of what is durable but not yet part of a checkpoint."""
    ranks: Ranks
    dropped: Dropped
    input_range: InputRange
    packs: bool
    """False where only ranges are wanted."""
    progress: ProgressCallback
    stop: Callable[[], None]
    """Raises where the run should end: `Interrupted`, or another rank's fault."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank's chunks."""
        return sum(map(len, self.chunks))

    @property
    def first_token(self) -> int:
        return self.chunks[0].begin if self.chunks else 0
