"""What a drafter remembers: keys and values of the whole committed history of each sequence, and how they are read.

Shapes: L layers, n committed positions, R query rows, S keys, H query heads, J key/value heads,
G query heads for each of those, C head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_CAPACITY = 256


class ContextCache:
    """Keys and values by sequence; drafted ones are never put here."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = (num_layers, 2, num_kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._buffers: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    @property
    def bytes_per_token(self) -> int:
        """The most that a position takes: a buffer has room for half as many again."""
        layers, two, heads, dim = self._shape
        return layers * two * heads * dim * self._dtype.itemsize * 3 // 2

    def length(self, sequence: int) -> int:
        """Positions that are there."""
        return self._lengths.get(sequence, 0)

    def append(self, sequence: int, kv_L2mJC: Tensor) -> None:
        """Add the m positions that follow."""
        begin = self.length(sequence)
        end = begin + kv_L2mJC.shape[2]
        buffer = self._buffers.get(sequence)
        if buffer is None or end > buffer.shape[2]:
            layers, two, heads, dim = self._shape
            capacity = max(FIRST_CAPACITY, end + end // 2)
            grown = torch.empty((layers, two, capacity, heads, dim), dtype=self._dtype, device=self._device)
            if buffer is not None:
                grown[:, :, :begin] = buffer[:, :, :begin]
            self._buffers[sequence] = buffer = grown
        buffer[:, :, begin:end] = kv_L2mJC
        self._lengths[sequence] = end

    def read(self, sequence: int) -> Tensor:
        """[L, 2, n, J, C], keys before values; a view."""
        return self._buffers[sequence][:, :, : self._lengths[sequence]]

    def forget(self, sequence: int) -> None:
        self._buffers.pop(sequence, None)
        self._lengths.pop(sequence, None)

    @property
    def nbytes(self) -> int:
        """Bytes held for all sequences."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def check_taps(sequence: int, num_tokens: int, known: int, taps: Tensor | None, width: int) -> Tensor:
    """The new taps of a request, which must continue what is known and end before the last token.

    Raises:
        ValueError: they do not; the caller breaks the contract of `DraftRequest`.
    """
    expected = (num_tokens - 1 - known, width)
    if taps is None or tuple(taps.shape) != expected:
        shape = None if taps is None else list(taps.shape)
        raise ValueError(
            f"sequence {sequence}: taps of {num_tokens} tokens after {known} known positions must have shape "
            f"{list(expected)}, not {shape}"
        )
    return taps


def attend(q_RHC: Tensor, k_SJC: Tensor, v_SJC: Tensor, seen_RS: Tensor | None = None) -> Tensor:
    """Grouped-query attention of one sequence, scale C**-0.5; keys where `seen` is False count nothing: [R, H*C].

    The G query heads of one key head are rows beside each other, so that keys and values are read once.
    """
    (R, H, C), J = q_RHC.shape, k_SJC.shape[1]
    G = H // J
    q = q_RHC.reshape(R, J, G, C).transpose(0, 1).reshape(1, J, R * G, C)
    k, v = (t.transpose(0, 1)[None] for t in (k_SJC, v_SJC))
    mask = None if seen_RS is None else seen_RS.repeat_interleave(G, dim=0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.view(J, R, G, C).transpose(0, 1).reshape(R, H * C)
