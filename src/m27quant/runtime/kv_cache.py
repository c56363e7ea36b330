"""Keys and values of all layers in paged blocks, and beside them the hidden states that a drafter reads.

Shapes: L layers, J key/value heads, C head_dim, K taps, D hidden; slot = block * block_size + offset in the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of a cache, known before it is made."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """float8_e4m3fn, bfloat16 or float32."""
    block_size: int
    num_taps: int
    hidden_size: int
    taps_dtype: torch.dtype
    drafter_token_bytes: int = 0
    """What a drafter keeps of each position by itself."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, its taps and what a drafter keeps of its positions included."""
        kv = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        taps = self.num_taps * self.hidden_size * self.taps_dtype.itemsize
        return self.block_size * (kv + taps + self.drafter_token_bytes)


class KvCache:
    """The tensors; which block belongs to whom is `Blocks`' business."""

    def __init__(self, shape: CacheShape, num_blocks: int, device: torch.device) -> None:
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.shape, self.num_blocks = shape, num_blocks
        self.keys = [torch.empty(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.empty(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self.taps: Tensor | None = None
        """[num_blocks * block_size + 1, K, D] by slot; what goes to slot -1 goes to the last, which nobody reads."""
        if shape.num_taps:
            taps = (num_blocks * shape.block_size + 1, shape.num_taps, shape.hidden_size)
            self.taps = torch.empty(taps, dtype=shape.taps_dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.shape.block_bytes

    def slots(self, block_table: Sequence[int], begin: int, end: int) -> list[int]:
        """The slots of positions begin to end - 1."""
        size = self.shape.block_size
        return [block_table[p // size] * size + p % size for p in range(begin, end)]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots to others, all at once, in every layer: accepted nodes of a tree become a sequence."""
        if not sources:
            return
        device = self.keys[0].device
        source, target = (torch.tensor(slots, device=device) for slots in (sources, targets))
        for cache in (*self.keys, *self.values):
            flat = cache.flatten(0, 1).view(torch.uint8)  # torch cannot index FP8 everywhere
            flat[target] = flat[source]
        if self.taps is not None:
            self.taps[target] = self.taps[source]
