"""A paged cache for tests, full of NaN where no key lies, and attention over it in F64.

Shapes as in kernels/fp8_kv_attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.kernels.fp8_kv_attention import attention, write_kv

Row = tuple[int, int, Sequence[int]]
"""Sequence, context, slots of the tail."""


@dataclass
class Paged:
    """Some sequences, their blocks scattered over a cache."""

    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    k_scale: Tensor
    v_scale: Tensor

    def slots(self, sequence: int, first: int, end: int) -> list[int]:
        """Of positions first to end - 1."""
        size = self.k_cache.shape[1]
        return [int(self.table[sequence, p // size]) * size + p % size for p in range(first, end)]

    def attend(
        self, q_THC: Tensor, rows: Sequence[Row], *, scale: float | None = None, invariant: bool = True
    ) -> Tensor:
        """`attention` of one row for each of q's; without tails where none has one."""
        longest = max(len(tail) for _, _, tail in rows)
        tails = [[*tail, *[-1] * (longest - len(tail))] for _, _, tail in rows]
        return attention(
            q_THC,
            self.k_cache,
            self.v_cache,
            self.table,
            torch.tensor([row[0] for row in rows], dtype=torch.int32),
            torch.tensor([row[1] for row in rows], dtype=torch.int32),
            torch.tensor(tails, dtype=torch.int32) if longest else None,
            self.k_scale,
            self.v_scale,
            softmax_scale=q_THC.shape[2] ** -0.5 if scale is None else scale,
            invariant=invariant,
        )

    def expected(self, q_THC: Tensor, rows: Sequence[Row]) -> Tensor:
        """The same in F64, from the definition."""
        T, H, C = q_THC.shape
        fp8 = self.k_cache.dtype == torch.float8_e4m3fn
        k_scale, v_scale = (float(s) if fp8 else 1.0 for s in (self.k_scale, self.v_scale))
        out = torch.zeros(T, H, C, dtype=torch.float64)
        for t, (sequence, context, tail) in enumerate(rows):
            slots = [*self.slots(sequence, 0, context), *tail]
            if not slots:
                continue
            k = self.k_cache.flatten(0, 1).double()[slots] * k_scale
            v = self.v_cache.flatten(0, 1).double()[slots] * v_scale
            for h in range(H):
                j = h // (H // k.shape[1])
                scores = k[:, j] @ q_THC[t, h].double() * C**-0.5
                out[t, h] = scores.softmax(0) @ v[:, j]
        return out


def paged(
    lengths: Sequence[int],
    *,
    J: int = 2,
    C: int = 16,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
    k_scale: float = 0.013,
    v_scale: float = 0.021,
) -> Paged:
    """Sequences of random keys and values in scattered blocks; table entries behind the last one point nowhere."""
    blocks = [-(-n // block_size) for n in lengths]
    free = (torch.randperm(sum(blocks) + 3)).tolist()
    table = torch.full((len(lengths), max([*blocks, 1]) + 2), -7777, dtype=torch.int32)
    for sequence, count in enumerate(blocks):
        for block in range(count):
            table[sequence, block] = free.pop()
    nan = torch.full((sum(blocks) + 3, block_size, J, C), torch.nan)
    cache = Paged(
        nan.to(cache_dtype), nan.to(cache_dtype), table, torch.tensor(k_scale), torch.tensor(v_scale)
    )
    for sequence, n in enumerate(lengths):
        k, v = torch.randn(2, n, J, C).to(dtype)
        slots = torch.tensor(cache.slots(sequence, 0, n), dtype=torch.int64)
        write_kv(k, v, cache.k_cache, cache.v_cache, slots, cache.k_scale, cache.v_scale)
    return cache


def as_tail(cache: Paged, row: Row, length: int) -> Row:
    """The same list of keys with its last positions told as a tail."""
    sequence, context, tail = row
    return sequence, context - length, [*cache.slots(sequence, context - length, context), *tail]


def some_rows(lengths: Sequence[int]) -> list[Row]:
    """Of each sequence the first, a middle and the last position, and the row without a key."""
    per_sequence = (
        [(s, n, ()) for n in sorted({0, 1, length // 2, length})] for s, length in enumerate(lengths)
    )
    return list(itertools.chain.from_iterable(per_sequence))
