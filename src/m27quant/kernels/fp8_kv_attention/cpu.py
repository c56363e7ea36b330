"""Paged attention by the compiled core, `_native/attention.c`.

Batch-invariant always: chunks and spans of keys are counted by position in a row's own list.

Shapes: T rows, H query heads, J key/value heads, C head_dim, S sequences, B blocks, X longest tail.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.fp8_kv_attention import reference
from m27quant.kernels.fp8_kv_attention.checks import check_lists

MAX_HEAD_DIM = 512
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}
_QUERIES = 96
"""Of a unit of work: their states, with keys and values of a chunk, fit into the second-level cache."""
_SPAN = 1024
_HEADER = 16


def write_kv(
    k_TJC: Tensor,
    v_TJC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """See `reference.write_kv`."""
    slots_T = slots_T.contiguous()
    T = len(slots_T)
    if not T:
        return
    for x, cache, scale in ((k_TJC, k_cache, k_scale), (v_TJC, v_cache, v_scale)):
        x = x if x[0].is_contiguous() else x.contiguous()
        n = x[0].numel()
        rows = (x.data_ptr(), x.dtype == torch.bfloat16, x.stride(0), n, slots_T.data_ptr())
        to = (_KINDS[cache.dtype], float(scale), cache.data_ptr())
        native.over_rows(functools.partial(native.function("m27_write_kv"), *rows, *to), T, 1, 4 * n)


def attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_SB: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    tail_TX: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    softmax_scale: float,
    *,
    invariant: bool = False,
) -> Tensor:
    """See `reference.attention`.

    Raises:
        ValueError: a list of keys that points outside of the table or of the cache.
    """
    C = q_THC.shape[2]
    lists = (block_table_SB, sequence_T, context_T, tail_TX)
    if C > MAX_HEAD_DIM or any(x.dtype != torch.int32 for x in (block_table_SB, sequence_T, context_T)):
        check_lists(k_cache, *lists)
    if C > MAX_HEAD_DIM:
        return reference.attention(q_THC, k_cache, v_cache, *lists, k_scale, v_scale, softmax_scale)
    q = q_THC.contiguous()
    out = torch.empty_like(q)
    keys = _Keys.of(q, k_cache, *lists)
    if not keys.groups:
        return out
    factors = (1.0, 1.0)
    if k_cache.dtype == torch.float8_e4m3fn:
        factors = float(k_scale), float(v_scale)
    work = _Work.of(keys, q, k_cache)
    call = functools.partial(
        native.function("m27_attention"),
        q.data_ptr(), out.data_ptr(), q.dtype == torch.bfloat16,
        k_cache.data_ptr(), v_cache.data_ptr(), _KINDS[k_cache.dtype], *keys.pointers(),
        *q.shape[1:2], *k_cache.shape[2:], keys.table.shape[1], keys.tail.shape[1], k_cache.shape[1], work.heads,
        softmax_scale * factors[0], factors[1], work.queries,
    )  # fmt: skip
    if not work.spans:
        done = native.over_rows(functools.partial(call, 0, None, 0), work.units, 1, work.unit_bytes)
    else:
        stretch = 64 // k_cache.element_size()
        state = _HEADER + -(-C // stretch) * stretch
        parts = torch.empty(work.units * work.spans * work.queries * state)
        span, join = (functools.partial(call, work.spans, parts.data_ptr(), step) for step in (0, 1))
        done = native.over_rows(span, work.units * work.spans, 1, work.unit_bytes // work.spans)
        done += native.over_rows(join, work.units, 1, 0)
    if not all(done):
        raise MemoryError("no memory for the scratch of attention")
    return out


class _Keys(NamedTuple):
    """Every row's list of keys as the core takes it, and neighbouring rows of one sequence in groups."""

    table: Tensor
    sequence: Tensor
    context: Tensor
    tail: Tensor
    starts: Tensor
    """I64 [groups + 1]: the rows of a group."""
    groups: int
    longest: int
    """Keys in a row's list."""

    def pointers(self) -> list[int]:
        return [x.data_ptr() for x in self[:5]]

    @staticmethod
    def of(
        q_THC: Tensor,
        k_cache: Tensor,
        block_table_SB: Tensor,
        sequence_T: Tensor,
        context_T: Tensor,
        tail_TX: Tensor | None,
    ) -> _Keys:
        T, H, _ = q_THC.shape
        table, sequence, context = (
            x.to(torch.int32).contiguous() for x in (block_table_SB, sequence_T, context_T)
        )
        tail = torch.empty(T, 0, dtype=torch.int64) if tail_TX is None else tail_TX.long().contiguous()
        num_blocks, block_size, J = k_cache.shape[:3]
        starts, longest = torch.empty(T + 1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        groups = native.function("m27_attention_plan")(
            *(x.data_ptr() for x in (table, sequence, context, tail)),
            T, *table.shape, tail.shape[1], block_size, num_blocks, max(_QUERIES // (H // J), 1),
            starts.data_ptr(), longest.data_ptr(),
        )  # fmt: skip
        if groups < 0:
            check_lists(k_cache, block_table_SB, sequence_T, context_T, tail_TX)
        return _Keys(table, sequence, context, tail, starts, groups, int(longest))


class _Work(NamedTuple):
    """How the work is cut for the threads; it does not show in the result."""

    heads: int
    """Key/value heads of a unit."""
    units: int
    queries: int
    """Most of a unit."""
    spans: int
    """Spans of a unit that are computed apart from each other, or 0."""
    unit_bytes: int

    @staticmethod
    def of(keys: _Keys, q_THC: Tensor, k_cache: Tensor) -> _Work:
        J, C = k_cache.shape[2:]
        G, threads = q_THC.shape[1] // J, torch.get_num_threads()
        rows = int(keys.starts[: keys.groups + 1].diff().max())
        heads, spans = max(min(_QUERIES // (rows * G), J), 1), -(-keys.longest // _SPAN)
        # neighbouring heads lie together in memory, but each thread needs something to do
        while heads > 1 and keys.groups * -(-J // heads) * max(spans, 1) < threads:
            heads = -(-heads // 2)
        units = keys.groups * -(-J // heads)
        if units >= threads or spans < 2:
            spans = 0
        nbytes = 2 * keys.longest * heads * C * k_cache.element_size() * rows
        return _Work(heads, units, rows * heads * G, spans, nbytes)
