"""Attention over a paged key/value cache in FP8 E4M3, BF16 or F32; plain, chunked, or with drafted tails.

Shapes: T rows (query tokens), H query heads, J key/value heads, C head_dim, S sequences, B blocks of a sequence's
table, X longest tail.  A cache is [num_blocks, block_size, J, C]; slot = block * block_size + offset in the block.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.fp8_kv_attention import reference
from m27quant.kernels.fp8_kv_attention.checks import CACHE_DTYPES, check_attention, check_lists, check_write

__all__ = ["CACHE_DTYPES", "attention", "write_kv"]


def write_kv(
    k_TJC: Tensor,
    v_TJC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Put the keys (after norm and rotation) and values of T tokens into their slots.

    Args:
        k_TJC: BF16 or F32.
        v_TJC: as k_TJC.
        k_cache: contiguous float8_e4m3fn (gets E4M3(k / k_scale), to the nearest, ties to even, saturating at 448;
            a NaN stays one), bfloat16 or float32 (gets k itself, in that dtype).
        v_cache: as k_cache.
        slots_T: I64 [T], all different; -1 leaves the token out.
        k_scale: F32 [], positive; only an FP8 cache looks at it.
        v_scale: as k_scale.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit; on a CPU also a slot outside of the cache (nothing
            is written then).
    """
    check_write(k_TJC, v_TJC, k_cache, v_cache, slots_T, k_scale, v_scale)
    _backend(k_cache).write_kv(k_TJC, v_TJC, k_cache, v_cache, slots_T, k_scale, v_scale)


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
    *,
    softmax_scale: float,
    invariant: bool = False,
) -> Tensor:
    """softmax(q k^T * softmax_scale) v of every row over its own list of keys, [T, H, C] in q's dtype.

    Row t belongs to sequence s = sequence_T[t].  Its keys are positions 0 to context_T[t] - 1 of s, found through
    block_table_SB[s], then the slots tail_TX[t, 0], tail_TX[t, 1], ... up to the first -1.  Prefill and plain
    decoding have no tail and context_T[t] = own position + 1; a row of a draft tree has the committed length as
    context and as tail its ancestors in order of depth, itself last.  A row without keys (padding) gives zeros.
    Slots that no row lists are never looked at, whatever they hold.

    Args:
        q_THC: BF16 or F32; query head h looks at key/value head h // (H // J).
        k_cache: contiguous, as `write_kv` fills it.
        v_cache: as k_cache, same dtype and shape.
        block_table_SB: I32 or I64; entries behind a sequence's last used block may be anything.
        sequence_T: I32 or I64.
        context_T: I32 or I64.
        tail_TX: I32 or I64, or None.
        k_scale: F32 [], the value of a code is E4M3 * k_scale; only an FP8 cache looks at it.
        v_scale: as k_scale.
        softmax_scale: usually C ** -0.5.
        invariant: a row's result depends on its query and its list of keys alone, bit for bit: not on the other
            rows, on how its keys divide into context and tail, on where they lie, or on the number of threads.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit; on a CPU also a sequence, context, block or tail slot
            that does not exist.
    """
    check_attention(q_THC, k_cache, v_cache, block_table_SB, sequence_T, context_T, tail_TX, k_scale, v_scale)
    backend = _backend(q_THC)
    if backend is reference and q_THC.device.type == "cpu":
        check_lists(k_cache, block_table_SB, sequence_T, context_T, tail_TX)
    result: Tensor = backend.attention(
        q_THC,
        k_cache,
        v_cache,
        block_table_SB,
        sequence_T,
        context_T,
        tail_TX,
        k_scale,
        v_scale,
        softmax_scale,
        invariant=invariant,
    )
    return result


def _backend(tensor: Tensor) -> ModuleType:
    backend = choose("fp8_kv_attention", tensor.device).backend
    if backend == "cpu-native":
        from m27quant.kernels.fp8_kv_attention import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.fp8_kv_attention import gpu

        return gpu
    return reference
