"""Paged attention in plain torch, one row at a time: the specification.

Shapes: T rows, H query heads, J key/value heads, C head_dim, S sequences, B blocks, X longest tail, N keys of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of `dtype` keeps it."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(dtype)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The F32 values that a cache's entries stand for."""
    return codes.float() * scale if codes.dtype == torch.float8_e4m3fn else codes.float()


def write_kv(
    k_TJC: Tensor,
    v_TJC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """See the package."""
    rows_N = (slots_T >= 0).nonzero()[:, 0]
    slots_N = slots_T[rows_N]
    for x_TJC, cache, scale in ((k_TJC, k_cache, k_scale), (v_TJC, v_cache, v_scale)):
        codes = encode(x_TJC[rows_N], scale, cache.dtype)
        # as bytes: torch cannot index FP8 everywhere
        cache.flatten(0, 1).view(torch.uint8).index_copy_(0, slots_N, codes.view(torch.uint8))


def row_slots(block_table_B: Tensor, context: int, tail_X: Tensor | None, block_size: int) -> Tensor:
    """The slots of one row's keys, in order, I64 [N]."""
    positions = torch.arange(context, device=block_table_B.device)
    slots = block_table_B.long()[positions // block_size] * block_size + positions % block_size
    if tail_X is None:
        return slots
    ended_X = (tail_X < 0).cumsum(0) > 0
    return torch.cat((slots, tail_X[~ended_X].long()))


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
    """See the package; F32 throughout, rounded once to q's dtype; a row by itself, so invariant in any case."""
    _, H, C = q_THC.shape
    block_size, J = k_cache.shape[1:3]
    k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out_THC = torch.zeros_like(q_THC)
    for t, (sequence, context) in enumerate(zip(sequence_T.tolist(), context_T.tolist(), strict=True)):
        tail_X = None if tail_TX is None else tail_TX[t]
        slots_N = row_slots(block_table_SB[sequence], context, tail_X, block_size)
        if not len(slots_N):
            continue
        k_NJC, v_NJC = decode(_take(k_slots, slots_N), k_scale), decode(_take(v_slots, slots_N), v_scale)
        q_JGC = q_THC[t].float().view(J, H // J, C)
        scores_JGN = torch.einsum("jgc,njc->jgn", q_JGC, k_NJC) * softmax_scale
        out_JGC = torch.einsum("jgn,njc->jgc", scores_JGN.softmax(-1), v_NJC)
        out_THC[t] = out_JGC.reshape(H, C).to(q_THC.dtype)
    return out_THC


def _take(cache: Tensor, slots_N: Tensor) -> Tensor:
    """Entries [N, J, C] of a cache; as bytes, because torch cannot index FP8 everywhere."""
    taken = cache.view(torch.uint8)[slots_N]
    return taken.view(cache.dtype)
