"""NVFP4 packing: FP8 block-quantized or BF16 weights in, E2M1 nibbles and E4M3 block scales out.

The bytes are nvidia-modelopt 0.47's for a BF16 weight (an FP8 source counts as its BF16 dequantization).
`reference.py` holds the formula; the compiled and the Triton path give the same bytes.
Shapes: N out features, K in features, G = K/16 groups.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m27quant.kernels.dispatch import choose
from m27quant.kernels.fp8_dequant import BLOCK
from m27quant.kernels.nvfp4_pack import checks, reference, scale_search
from m27quant.kernels.nvfp4_pack.reference import GROUP

__all__ = [
    "GROUP",
    "Exact",
    "GroupCounts",
    "PackedNVFP4",
    "Scales",
    "SquaredError",
    "amax",
    "compare",
    "count_groups",
    "group_errors",
    "pack",
    "squared_error",
    "unpack",
]

Scales = Literal["max", "mse"]
"""How block scales are chosen: from each block's largest magnitude, or by the least squared error."""


class PackedNVFP4(NamedTuple):
    """One matrix in NVFP4, as it lies in the checkpoint."""

    weight: Tensor
    """U8 [N, K/2]: the even column in the low nibble, the odd one in the high nibble."""
    weight_scale: Tensor
    """float8_e4m3fn [N, K/16], from 2**-9 to 448, row-major (not swizzled)."""
    weight_scale_2: Tensor
    """F32 []: it multiplies; value = E2M1 * (weight_scale * weight_scale_2)."""


class SquaredError(NamedTuple):
    """What packing cost one matrix, as F64 sums over its elements."""

    signal: float
    """Sum of x * x, x the BF16 source value."""
    noise: float
    """Sum of (x - y) * (x - y), y the packed value in F32."""

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB; infinite where nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


class Exact(NamedTuple):
    """Of a matrix that is packed exactly."""

    error: SquaredError
    amax: Tensor
    """F32 []: the weight's, as `amax` gives it."""


class GroupCounts(NamedTuple):
    """Groups of 16 at the limits of the format."""

    zero: int
    """All 16 values are 0; stored with scale 1."""
    saturated: int
    """The scale would exceed 448 (`amax` was too small): values are clipped."""
    tiny: int
    """The scale would fall below 2**-9 and was raised to it: precision is lost."""


def amax(weight: Tensor, scale_inv: Tensor | None = None, *, block: tuple[int, int] = BLOCK) -> Tensor:
    """Exact max |x| of a weight's BF16 values, F32 [], on the weight's device.

    Args:
        weight: float8_e4m3fn [N, K] with `scale_inv`, or bfloat16 [N, K] without; K a multiple of 16.
            F32 and F16 weights are refused: convert them to BF16 first.
        scale_inv: F32 [ceil(N/block[0]), ceil(K/block[1])]; 0 is allowed.
        block: rows and columns of an FP8 block.

    Raises:
        CheckpointError: dtype or shape, a NaN, infinite or negative block scale, a NaN or infinite weight;
            the message gives the count and the first position, the caller adds the tensor's name.
    """
    checks.check_weight(weight, scale_inv, block)
    result: Tensor = _backend(weight.device).amax(weight, scale_inv, block)
    if not math.isfinite(float(result)):
        raise checks.nonfinite_error(weight, scale_inv, block)
    return result


def pack(
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    amax: Tensor,
    block: tuple[int, int] = BLOCK,
    out: tuple[Tensor, Tensor] | None = None,
    scales: Scales = "max",
    channel_weight: Tensor | None = None,
) -> PackedNVFP4:
    """Encode a weight in NVFP4, byte for byte as modelopt does its BF16 values.

    Args:
        weight: as for `amax`.
        scale_inv: as for `amax`.
        block: as for `amax`.
        amax: F32 [], max |x| of this weight, or of all weights that share its `weight_scale_2` (w1 and w3
            of one expert).  A smaller one clips.  0 (a dead expert) gives `weight_scale_2` = 6/2688.
        out: contiguous buffers U8 [N, K/2] and float8_e4m3fn [N, K/16] to write to; undefined after an error.
        scales: "max" is modelopt's max calibration; "mse" takes for each group of 16 the E4M3 scale with the least
            squared error of all 126, the smallest of equal ones (`scale_search` is the specification).
        channel_weight: F32 [K], finite and not negative; with "mse" the squared error of column j counts
            channel_weight[j] times.  A group whose 16 weights are all 0 is treated as if they were 1.

    Raises:
        CheckpointError: as for `amax`; nothing is returned that a NaN or Inf went into.
        ValueError: an `amax` that no BF16 weight can have, an `out` or a `channel_weight` that does not fit.
    """
    checks.check_weight(weight, scale_inv, block)
    checks.check_amax(amax)
    weight_scale_2 = reference.global_scale(amax.to(weight.device))
    codes, scale = buffers(weight, out)
    if scales == "mse":
        channel_weight = checks.channel_weights(channel_weight, weight)
        finite = _search(weight, scale_inv, weight_scale_2, block, channel_weight, codes, scale)
    elif channel_weight is not None:
        raise ValueError('channel_weight goes with scales="mse"')
    else:
        finite = _backend(weight.device).pack(weight, scale_inv, weight_scale_2, block, codes, scale)
    if not finite:
        raise checks.nonfinite_error(weight, scale_inv, block)
    return PackedNVFP4(codes, scale, weight_scale_2)


def unpack(packed: PackedNVFP4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [N, K] that a packed matrix stands for, computed in F32 and rounded once to `dtype`."""
    return reference.unpack(*packed).to(dtype)


def squared_error(
    weight: Tensor, scale_inv: Tensor | None, packed: PackedNVFP4, *, block: tuple[int, int] = BLOCK
) -> SquaredError:
    """Signal and noise of packing; on a CPU the same number for any thread count and any backend."""
    checks.check_weight(weight, scale_inv, block)
    signal_N, noise_N = _backend(weight.device).row_errors(weight, scale_inv, packed, block)
    # fsum rounds the exact sum of the rows once: no order of additions to agree on.
    return SquaredError(math.fsum(signal_N.tolist()), math.fsum(noise_N.tolist()))


def compare(
    weight: Tensor,
    scale_inv: Tensor | None,
    packed: PackedNVFP4,
    *,
    block: tuple[int, int] = BLOCK,
    scales: Scales = "max",
) -> Exact | None:
    """Whether `packed` is, byte for byte, what `pack` makes under its `weight_scale_2`; None where it is not.

    `squared_error` and `amax` in the same pass over an FP8 weight on a CPU; nothing is written to memory.  Whether
    `weight_scale_2` itself is right follows from `amax`.

    Raises:
        CheckpointError: as for `amax`, but for NaN and Inf in the weight, which nothing packed can equal.
        ValueError: tensors of other shapes than `pack` gives.
    """
    checks.check_weight(weight, scale_inv, block)
    buffers(weight, (packed.weight, packed.weight_scale))
    if scales == "mse":
        return _compare_least_error(weight, scale_inv, packed, block)
    found = _backend(weight.device).exact_row_errors(weight, scale_inv, packed, block)
    if found is None:
        return None
    signal_N, noise_N, largest = found
    return Exact(SquaredError(math.fsum(signal_N.tolist()), math.fsum(noise_N.tolist())), largest)


def count_groups(
    weight: Tensor, scale_inv: Tensor | None, weight_scale_2: Tensor, *, block: tuple[int, int] = BLOCK
) -> GroupCounts:
    """How many groups of 16 are zero, clipped or raised to the smallest scale under `weight_scale_2`."""
    checks.check_weight(weight, scale_inv, block)
    return GroupCounts(*_backend(weight.device).count_groups(weight, scale_inv, weight_scale_2, block))


def group_errors(
    weight: Tensor, scale_inv: Tensor | None, packed: PackedNVFP4, *, block: tuple[int, int] = BLOCK
) -> Tensor:
    """Sum of (x - y) * (x - y) of each group of 16, F64 [N, K/16]: the parts of `squared_error`'s noise."""
    checks.check_weight(weight, scale_inv, block)
    return scale_search.packed_errors(weight, scale_inv, packed, block)


def _search(
    weight: Tensor,
    scale_inv: Tensor | None,
    weight_scale_2: Tensor,
    block: tuple[int, int],
    channel_weight: Tensor | None,
    codes: Tensor,
    scale: Tensor,
) -> bool:
    """`scale_search.pack` by the device's backend."""
    backend = _backend(weight.device)
    search = scale_search.pack if backend is reference else backend.pack_least_error
    return bool(search(weight, scale_inv, weight_scale_2, block, channel_weight, codes, scale))


def _compare_least_error(
    weight: Tensor, scale_inv: Tensor | None, packed: PackedNVFP4, block: tuple[int, int]
) -> Exact | None:
    codes, scale = buffers(weight, None)
    if not _search(weight, scale_inv, packed.weight_scale_2, block, None, codes, scale):
        return None
    same = torch.equal(codes, packed.weight)
    if not same or not torch.equal(scale.view(torch.uint8), packed.weight_scale.view(torch.uint8)):
        return None
    error = squared_error(weight, scale_inv, packed, block=block)
    return Exact(error, amax(weight, scale_inv, block=block))


def _backend(device: torch.device) -> ModuleType:
    backend = choose("nvfp4_pack", device).backend
    if backend == "cpu-native":
        from m27quant.kernels.nvfp4_pack import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.nvfp4_pack import gpu

        return gpu
    return reference


def buffers(weight: Tensor, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Codes and block scales to write a packed `weight` to: `out` where it fits, else new ones."""
    N, K = weight.shape
    wanted = (((N, K // 2), torch.uint8), ((N, K // GROUP), torch.float8_e4m3fn))
    if out is None:
        codes, scale = (torch.empty(shape, dtype=dtype, device=weight.device) for shape, dtype in wanted)
        return codes, scale
    for buffer, (shape, dtype) in zip(out, wanted, strict=True):
        if buffer.shape != shape or buffer.dtype != dtype or buffer.device != weight.device:
            raise ValueError(f"out needs a {dtype} tensor of shape {list(shape)} on {weight.device}")
        if not buffer.is_contiguous():
            raise ValueError("out needs contiguous tensors")
    return out
