"""NVFP4 packing by the compiled core, `_native/nvfp4_pack.c`: the bytes of `reference`, far faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.fp8_dequant import cpu as fp8_dequant
from m27quant.kernels.nvfp4_pack.reference import GROUP, strips


def amax(weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> Tensor:
    """See `reference.amax`."""
    weight_NK, scale_inv_IJ = _plain(weight_NK, scale_inv_IJ, block)
    core = native.function("m27_amax_bf16" if scale_inv_IJ is None else "m27_amax_fp8")
    source = _source(weight_NK, scale_inv_IJ, block)
    maxima = _over_rows(functools.partial(core, *source), weight_NK, step=_step(scale_inv_IJ, block))
    if min(maxima) < 0:
        raise MemoryError("no memory for one row of weights")
    return torch.tensor(math.nan if any(map(math.isnan, maxima)) else max(maxima), dtype=torch.float32)


def pack(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `reference.pack`."""
    weight_NK, scale_inv_IJ = _plain(weight_NK, scale_inv_IJ, block)
    core = native.function("m27_pack_bf16" if scale_inv_IJ is None else "m27_pack_fp8")
    arguments = (
        *_source(weight_NK, scale_inv_IJ, block),
        float(weight_scale_2),
        out_codes_NK2.data_ptr(),
        out_scale_NG.data_ptr(),
    )
    finite = min(_over_rows(functools.partial(core, *arguments), weight_NK, step=_step(scale_inv_IJ, block)))
    if finite < 0:
        raise MemoryError("no memory for the table of block scales")
    return bool(finite)


def pack_least_error(
    weight_NK: Tensor,
    scale_inv_IJ: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    channel_weight_K: Tensor | None,
    out_codes_NK2: Tensor,
    out_scale_NG: Tensor,
) -> bool:
    """See `scale_search.pack`."""
    weight_NK, scale_inv_IJ = _plain(weight_NK, scale_inv_IJ, block)
    core = native.function("m27_search_bf16" if scale_inv_IJ is None else "m27_search_fp8")
    arguments = (
        *_source(weight_NK, scale_inv_IJ, block),
        float(weight_scale_2),
        None if channel_weight_K is None else channel_weight_K.data_ptr(),
        out_codes_NK2.data_ptr(),
        out_scale_NG.data_ptr(),
    )
    finite = min(_over_rows(functools.partial(core, *arguments), weight_NK, step=_step(scale_inv_IJ, block)))
    if finite < 0:
        raise MemoryError("no memory for the tables of the scale search")
    return bool(finite)


def row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See `reference.row_errors`: the same additions in the same order."""
    codes_NK2, scale_NG, weight_scale_2 = packed[0].contiguous(), packed[1].contiguous(), float(packed[2])
    K = weight_NK.shape[1]
    signal_N, noise_N = torch.empty(2, weight_NK.shape[0], dtype=torch.float64)
    core = native.function("m27_row_errors")
    for strip in strips(weight_NK, block):
        x_RK = _bf16_rows(weight_NK, scale_inv_IJ, strip, block)
        arrays = [tensor[strip].data_ptr() for tensor in (codes_NK2, scale_NG, signal_N, noise_N)]
        arguments = (x_RK.data_ptr(), K, weight_scale_2, *arrays)
        _over_rows(functools.partial(core, *arguments), x_RK, step=1)
    return signal_N, noise_N


def exact_row_errors(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `reference.exact_row_errors`.  An FP8 weight is read once, and nothing is written but the sums."""
    if scale_inv_IJ is None or block[1] % GROUP:
        return _pack_and_compare(weight_NK, scale_inv_IJ, packed, block)
    weight_NK, scale_inv_IJ = weight_NK.contiguous(), scale_inv_IJ.contiguous()
    codes_NK2, scale_NG, weight_scale_2 = packed[0].contiguous(), packed[1].contiguous(), float(packed[2])
    signal_N, noise_N = torch.empty(2, weight_NK.shape[0], dtype=torch.float64)
    arrays = [tensor.data_ptr() for tensor in (codes_NK2, scale_NG, signal_N, noise_N)]
    arguments = (*_source(weight_NK, scale_inv_IJ, block), weight_scale_2, *arrays)
    core = functools.partial(native.function("m27_compare_fp8"), *arguments)
    maxima = _over_rows(core, weight_NK, step=block[0])
    return None if min(maxima) < 0 else (signal_N, noise_N, torch.tensor(max(maxima)))


def _pack_and_compare(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, packed: Sequence[Tensor], block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    codes_NK2, scale_NG, weight_scale_2 = packed
    again = torch.empty_like(codes_NK2), torch.empty_like(scale_NG)
    if not pack(weight_NK, scale_inv_IJ, weight_scale_2, block, *again):
        return None
    if not all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed, again, strict=False)
    ):
        return None
    return *row_errors(weight_NK, scale_inv_IJ, packed, block), amax(weight_NK, scale_inv_IJ, block)


def count_groups(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, weight_scale_2: Tensor, block: tuple[int, int]
) -> tuple[int, int, int]:
    """See `reference.count_groups`."""
    weight_NK, scale_inv_IJ = _plain(weight_NK, scale_inv_IJ, block)
    core = native.function("m27_count_bf16" if scale_inv_IJ is None else "m27_count_fp8")
    source = _source(weight_NK, scale_inv_IJ, block)

    def rows(first: int, end: int) -> Tensor:
        counts = torch.zeros(3, dtype=torch.int64)
        core(*source, float(weight_scale_2), counts.data_ptr(), first, end)
        return counts

    parts = _over_rows(rows, weight_NK, step=_step(scale_inv_IJ, block))
    zero, saturated, tiny = torch.stack(parts).sum(0).tolist()
    return zero, saturated, tiny


def _bf16_rows(weight_NK: Tensor, scale_inv_IJ: Tensor | None, rows: slice, block: tuple[int, int]) -> Tensor:
    """The BF16 values of some rows, contiguous; `rows.start` lies on a block boundary of an FP8 weight."""
    if scale_inv_IJ is None:
        return weight_NK[rows].contiguous()
    codes_RK = weight_NK[rows]
    scale_IJ = scale_inv_IJ[rows.start // block[0] : -(-rows.stop // block[0])]
    out_RK = torch.empty(codes_RK.shape, dtype=torch.bfloat16)
    return fp8_dequant.dequantize(codes_RK, scale_IJ, torch.bfloat16, block, out_RK)


def _plain(
    weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Contiguous tensors; BF16 where a block's edge would cut through a group of 16."""
    if scale_inv_IJ is None:
        return weight_NK.contiguous(), None
    if block[1] % GROUP:
        return _bf16_rows(weight_NK, scale_inv_IJ, slice(0, weight_NK.shape[0]), block), None
    return weight_NK.contiguous(), scale_inv_IJ.contiguous()


def _source(weight_NK: Tensor, scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> tuple[int, ...]:
    """The leading arguments of the core's functions."""
    if scale_inv_IJ is None:
        return weight_NK.data_ptr(), weight_NK.shape[1]
    return weight_NK.data_ptr(), scale_inv_IJ.data_ptr(), weight_NK.shape[1], *block


def _step(scale_inv_IJ: Tensor | None, block: tuple[int, int]) -> int:
    """Where rows may be cut: blocks stay whole, so that each one's table is computed once."""
    return 1 if scale_inv_IJ is None else block[0]


def _over_rows(call: Callable[[int, int], Any], weight_NK: Tensor, step: int) -> list[Any]:
    return native.over_rows(call, weight_NK.shape[0], step, weight_NK.shape[1] * weight_NK.element_size())
