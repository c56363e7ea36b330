"""Decoding as CUDA graphs: a step's several hundred kernels are launched at once.

A graph is captured for each size of step when it first occurs, and replayed on buffers that stay in place.  Smaller
steps are filled up with rows that belong to no sequence: they have no keys, and what they compute goes nowhere.

Shapes: T rows, S sequences, B blocks of a sequence, X longest tail of drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from m27quant.runtime.kv_cache import KvCache
from m27quant.runtime.model import Model, Rows

MAX_ROWS = 256
"""Larger steps are limited by arithmetic, not by launches."""


@dataclass(frozen=True, slots=True)
class _Captured:
    rows: Rows
    """Filled before every replay."""
    graph: torch.cuda.CUDAGraph | None
    logits: Tensor


class Graphs:
    """`logits` of decoding steps, captured on a GPU; elsewhere the same steps, filled up but not captured."""

    def __init__(self, model: Model, cache: KvCache, taps: Sequence[int]) -> None:
        self._model, self._cache, self._taps = model, cache, tuple(taps)
        self._captured: dict[tuple[int, int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def logits(self, rows: Rows) -> Tensor:
        """F32 [T, V] behind every row; valid until the next call.  At most `MAX_ROWS` rows."""
        T, B = len(rows.ids_T), rows.block_table_SB.shape[1]
        tail = 0 if rows.tail_TX is None else rows.tail_TX.shape[1]
        key = (_rows_up(T), _power_up(B), _power_up(tail) if tail else 0)
        found = self._captured.get(key)
        if found is None:
            buffers = _empty_rows(*key, self._model.device)
            _fill(buffers, rows)
            found = self._captured[key] = self._capture(buffers)
        _fill(found.rows, rows)
        if found.graph is None:
            return self._compute(found.rows)[:T]
        found.graph.replay()
        return found.logits[:T]

    def _capture(self, rows: Rows) -> _Captured:
        if self._pool is None:
            return _Captured(rows, None, torch.empty(0))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Triton compiles here, nothing may be compiled during the capture
            self._compute(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._compute(rows)
        return _Captured(rows, graph, logits)

    def _compute(self, rows: Rows) -> Tensor:
        return self._model.logits(self._model.forward(rows, self._cache, self._taps))


def _empty_rows(T: int, B: int, X: int, device: torch.device) -> Rows:
    """Buffers for T rows of at most T sequences."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Rows(
        ids_T=empty(T, dtype=torch.int64),
        positions_T=empty(T, dtype=torch.int64),
        slots_T=empty(T, dtype=torch.int64),
        block_table_SB=empty(T, B, dtype=torch.int32),
        sequence_T=empty(T, dtype=torch.int32),
        context_T=empty(T, dtype=torch.int32),
        tail_TX=empty(T, X, dtype=torch.int32) if X else None,
    )


def _fill(buffers: Rows, rows: Rows) -> None:
    """Copy a step's rows in; all others get no slot, no keys and no tail."""
    for field in fields(Rows):
        target, source = getattr(buffers, field.name), getattr(rows, field.name)
        if target is None:
            continue
        target.fill_(-1 if field.name in ("slots_T", "tail_TX") else 0)
        target[tuple(slice(side) for side in source.shape)].copy_(source)


def _rows_up(count: int) -> int:
    """The next size that graphs are made for: every filling row would load experts for nothing."""
    return count if count <= 16 else -(-count // 8) * 8


def _power_up(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
