"""Which tokens each expert gets: a layer's routing, kept from the attention's pass for the experts'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from m27quant.calib.activations import Chunk
from m27quant.checkpoint.config import M2Config
from m27quant.runtime.layer import Assignments


class Routings:
    """Which tokens each expert gets, for consecutive chunks of a layer, in memory that is taken once.

    Small blocks that stay, between large ones that come and go with every chunk, would keep the allocator from
    using the large ones' room again: gigabytes for half a million tokens.
    """

    def __init__(self, chunks: Sequence[Chunk], config: M2Config, device: torch.device) -> None:
        self.num_experts = config.num_local_experts
        self._per_token = config.num_experts_per_tok
        self._chunks = chunks
        self._first = chunks[0].begin if chunks else 0
        count = sum(map(len, chunks)) * self._per_token
        self._rows = torch.empty(count, dtype=torch.int64, device=device)
        self._weights = torch.empty(count, dtype=torch.float32, device=device)
        self._bounds = torch.empty(len(chunks), self.num_experts + 1, dtype=torch.int64)

    def __setitem__(self, number: int, found: Assignments) -> None:
        part = self._part(number)
        self._rows[part], self._weights[part] = found.rows, found.weights
        self._bounds[number] = torch.tensor(found.bounds)

    def __getitem__(self, number: int) -> Assignments:
        part = self._part(number)
        return Assignments(self._rows[part], self._weights[part], self._bounds[number].tolist())

    def __iter__(self) -> Iterator[Assignments]:
        return (self[number] for number in range(len(self._chunks)))

    def _part(self, number: int) -> slice:
        begin = (self._chunks[number].begin - self._first) * self._per_token
        return slice(begin, begin + len(self._chunks[number]) * self._per_token)
