"""What attention and its cache take; values that lie on an accelerator are not looked at, that would wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
"""What keys and values may be kept in."""
ROW_DTYPES = (torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_write(
    k_TJC: Tensor,
    v_TJC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Refuse what `write_kv` cannot write.

    Raises:
        ValueError: what does not fit and to what.
    """
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    wanted = (len(k_TJC), *k_cache.shape[2:])
    for name, x in (("k", k_TJC), ("v", v_TJC)):
        if x.shape != wanted or x.dtype not in ROW_DTYPES or x.device != k_cache.device:
            raise ValueError(
                f"{name} must be BF16 or F32 {list(wanted)} on {k_cache.device}, is {_describe(x)}"
            )
    if slots_T.shape != wanted[:1] or slots_T.dtype != torch.int64 or slots_T.device != k_cache.device:
        raise ValueError(f"slots must be int64 [{wanted[0]}] on {k_cache.device}, are {_describe(slots_T)}")
    if slots_T.device.type == "cpu":
        _in_range("slots", slots_T, -1, k_cache.shape[0] * k_cache.shape[1])


def check_attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_SB: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    tail_TX: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Refuse dtypes, shapes and devices that do not fit; see `check_lists` for the values.

    Raises:
        ValueError: what does not fit and to what.
    """
    _check_cache(k_cache, v_cache, k_scale, v_scale)
    J, C = k_cache.shape[2:]
    if q_THC.dim() != 3 or q_THC.dtype not in ROW_DTYPES or q_THC.device != k_cache.device:
        raise ValueError(f"q must be BF16 or F32 [T, H, C] on {k_cache.device}, is {_describe(q_THC)}")
    T, H, _ = q_THC.shape
    if q_THC.shape[2] != C or H % J:
        raise ValueError(
            f"q {list(q_THC.shape)} needs heads of {C}, a multiple of {J} of them, as the cache has"
        )
    shapes = {"block_table": (block_table_SB, (None, None)), "sequence": (sequence_T, (T,))}
    shapes["context"] = (context_T, (T,))
    if tail_TX is not None:
        shapes["tail"] = (tail_TX, (T, None))
    for name, (tensor, shape) in shapes.items():
        fits = tensor.dim() == len(shape) and all(
            wanted in (None, side) for wanted, side in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype not in INDEX_DTYPES or tensor.device != k_cache.device:
            raise ValueError(
                f"{name} must be I32 or I64 with {len(shape)} sides for {T} rows on {k_cache.device}, "
                f"is {_describe(tensor)}"
            )


def check_lists(
    k_cache: Tensor,
    block_table_SB: Tensor,
    sequence_T: Tensor,
    context_T: Tensor,
    tail_TX: Tensor | None,
) -> None:
    """Refuse lists of keys that point outside of the table or of the cache.

    Raises:
        ValueError: which, and the first such value.
    """
    num_blocks, block_size = k_cache.shape[:2]
    S, B = block_table_SB.shape
    _in_range("sequence", sequence_T, 0, S)
    _in_range("context", context_T, 0, B * block_size + 1)
    if tail_TX is not None:
        _in_range("tail", tail_TX, -1, num_blocks * block_size)
    used_S = torch.zeros(S, dtype=torch.int64)
    blocks_T = (context_T.long() + block_size - 1) // block_size
    used_S.scatter_reduce_(0, sequence_T.long(), blocks_T, "amax")
    in_use = torch.arange(B) < used_S[:, None]
    _in_range("block_table", block_table_SB[in_use], 0, num_blocks)


def _check_cache(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in CACHE_DTYPES or cache.dim() != 4 or not cache.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float8_e4m3fn, bfloat16 or float32 "
                f"[num_blocks, block_size, J, C], is {_describe(cache)}"
            )
        if 0 in cache.shape[1:]:
            raise ValueError(f"{name} has an empty side: {list(cache.shape)}")
    if (k_cache.shape, k_cache.dtype, k_cache.device) != (v_cache.shape, v_cache.dtype, v_cache.device):
        raise ValueError(f"k_cache {_describe(k_cache)} and v_cache {_describe(v_cache)} differ")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.dtype != torch.float32 or scale.dim() != 0 or scale.device != k_cache.device:
            raise ValueError(f"{name} must be float32 [] on {k_cache.device}, is {_describe(scale)}")
        if scale.device.type == "cpu" and not 0 < scale.item() < float("inf"):
            raise ValueError(f"{name} must be positive and finite, is {scale.item()}")


def _in_range(name: str, values: Tensor, first: int, end: int) -> None:
    if values.numel() and (int(values.min()) < first or int(values.max()) >= end):
        bad = values[(values < first) | (values >= end)]
        raise ValueError(f"{name} holds {int(bad[0])}: values must be from {first} to {end - 1}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
