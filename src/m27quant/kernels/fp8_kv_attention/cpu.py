"""Paged attention by the compiled core, `_native/attention.c`.

Batch-invariant always: chunks and spans of keys are counted by position in a row's own list.

Shapes: T rows, H query heads, J key/value heads, C head_dim, S sequences, B blocks, X longest tail.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.fp8_kv_attention import reference
from m27quant.kernels.fp8_kv_attention.checks import check_lists

MAX_HEAD_DIM = 512
_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}
_QUERIES = 96
"""Queries that share decoded keys: more do not fit into the second-level cache."""
_SPAN = 1024
_HEADER = 16
_PLENTY = 1 << 30  # bytes: always worth a thread


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
    lists = (block_table_SB, sequence_T, context_T)
    T, H, C = q_THC.shape
    if C > MAX_HEAD_DIM or any(x.dtype != torch.int32 for x in lists):
        check_lists(k_cache, *lists, tail_TX)
    if C > MAX_HEAD_DIM:
        return reference.attention(q_THC, k_cache, v_cache, *lists, tail_TX, k_scale, v_scale, softmax_scale)
    q = q_THC.contiguous()
    table, sequence, context = (x.to(torch.int32).contiguous() for x in lists)
    tail = torch.empty(T, 0, dtype=torch.int64) if tail_TX is None else tail_TX.long().contiguous()
    num_blocks, block_size, J = k_cache.shape[:3]
    (S, B), X, G = table.shape, tail.shape[1], H // J
    starts, longest = torch.empty(T + 1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    found = [x.data_ptr() for x in (table, sequence, context, tail)]
    sizes = (T, S, B, X, block_size, num_blocks, max(_QUERIES // G, 1))
    groups = native.function("m27_attention_plan")(*found, *sizes, starts.data_ptr(), longest.data_ptr())
    if groups < 0:
        check_lists(k_cache, *lists, tail_TX)
    out = torch.empty_like(q)
    if not groups:
        return out

    factors = (1.0, 1.0)
    if k_cache.dtype == torch.float8_e4m3fn:
        factors = float(k_scale), float(v_scale)
    most = int((starts[1 : groups + 1] - starts[:groups]).max()) * G
    call = functools.partial(
        native.function("m27_attention"),
        q.data_ptr(), out.data_ptr(), q.dtype == torch.bfloat16,
        k_cache.data_ptr(), v_cache.data_ptr(), _KINDS[k_cache.dtype],
        *found, starts.data_ptr(), H, J, C, B, X, block_size, softmax_scale * factors[0], factors[1], most,
    )  # fmt: skip
    units, spans = groups * J, -(-int(longest) // _SPAN)
    row_bytes = int(longest) * C * k_cache.element_size() * 2
    if units >= torch.get_num_threads() or spans < 2:
        done = native.over_rows(functools.partial(call, 0, None, 0), units, 1, row_bytes)
    else:
        parts = torch.empty(units * spans * most * (_HEADER + -(-C // 16) * 16))
        done = native.over_rows(
            functools.partial(call, spans, parts.data_ptr(), 0), units * spans, 1, _PLENTY
        )
        done += native.over_rows(functools.partial(call, spans, parts.data_ptr(), 1), units, 1, 0)
    if not all(done):
        raise MemoryError("no memory for the scratch of attention")
    return out
