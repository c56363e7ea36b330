"""From what a step computes of each sequence to the tensors of one forward pass.

A sequence has rows for tokens that are not in the cache yet, then for drafts behind them.  A draft's key goes to the
slot behind the committed tokens that has its place in the proposal; it attends to all that is committed, then to its
ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.runtime.kv_cache import KvCache
from m27quant.runtime.model import Rows
from m27quant.runtime.sampling import Row
from m27quant.runtime.scheduler import Scheduled
from m27quant.runtime.sequence import Sequence
from m27quant.runtime.speculative.proposal import ROOT, Proposal


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence in a step."""

    scheduled: Scheduled
    proposal: Proposal

    @property
    def sequence(self) -> Sequence:
        return self.scheduled.sequence

    @property
    def num_rows(self) -> int:
        return self.scheduled.end - self.scheduled.begin + len(self.proposal.tokens)

    @property
    def num_choices(self) -> int:
        """Rows that a token is chosen behind: the last committed token's and every draft's, or none."""
        return 1 + len(self.proposal.tokens) if self.scheduled.is_last else 0

    def choices(self) -> list[Row]:
        """What each of these choices depends on."""
        if not self.scheduled.is_last:
            return []
        tokens = self.proposal.tokens
        paths = [[tokens[node] for node in path] for path in self.paths()]
        return [self.sequence.row([]), *(self.sequence.row(path) for path in paths)]

    def paths(self) -> list[list[int]]:
        """For every draft the nodes from the first one to itself."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.proposal.parents):
            paths.append([*([] if parent == ROOT else paths[parent]), node])
        return paths


def build_rows(parts: Many[Part], cache: KvCache, device: torch.device) -> Rows:
    """All parts one after the other, on the model's device."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sequence: list[int] = []
    context: list[int] = []
    tails: list[list[int]] = []
    for index, part in enumerate(parts):
        begin, end, tokens = part.scheduled.begin, part.scheduled.end, part.sequence.tokens
        paths = part.paths()
        ids += tokens[begin:end] + part.proposal.tokens
        positions += [*range(begin, end), *(end - 1 + len(path) for path in paths)]
        own = cache.slots(part.sequence.blocks, begin, end + len(paths))
        slots += own
        sequence += [index] * part.num_rows
        context += [*range(begin + 1, end + 1), *([end] * len(paths))]
        tails += [[] for _ in range(begin, end)]
        tails += [[own[end - begin + node] for node in path] for path in paths]
    longest = max(map(len, tails))
    padded = [tail + [-1] * (longest - len(tail)) for tail in tails] if longest else None
    blocks = [part.sequence.blocks for part in parts]
    width = max(map(len, blocks))

    def tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Rows(
        ids_T=tensor(ids, torch.int64),
        positions_T=tensor(positions, torch.int64),
        slots_T=tensor(slots, torch.int64),
        block_table_SB=tensor([b + [0] * (width - len(b)) for b in blocks], torch.int32),
        sequence_T=tensor(sequence, torch.int32),
        context_T=tensor(context, torch.int32),
        tail_TX=None if padded is None else tensor(padded, torch.int32),
    )


def wanted_rows(parts: Many[Part], device: torch.device) -> Tensor:
    """Indices, I64, of the rows that a token is chosen behind."""
    wanted: list[int] = []
    at = 0
    for part in parts:
        at += part.num_rows
        wanted += range(at - part.num_choices, at)
    return torch.tensor(wanted, dtype=torch.int64).to(device, non_blocking=True)
