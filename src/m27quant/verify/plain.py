"""Tensors that are passed through, against the source: byte for byte, or the attention's BF16 dequantization."""

from __future__ import annotations

import numpy as np
import torch

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import Source, torch_dtype
from m27quant.runtime.loader import dequantize_linear

CPU = torch.device("cpu")


class PlainComparison:
    """One thread's comparison of one tensor after another, as their bytes arrive in order."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._expected: np.ndarray | None = None
        self._different = 0
        self._first: int | None = None

    def add(self, info: TensorInfo, offset: int, data: memoryview) -> bool:
        """Compare these bytes; True with the tensor's last ones, when `difference` tells the outcome."""
        if offset == 0:
            self._different, self._first, self._expected = 0, None, self._dequantized(info)
        bytes_ = np.frombuffer(data, np.uint8)
        if self._expected is not None and info.dtype == "F32":
            value = torch.from_numpy(bytes_.copy()).view(torch.float32).bfloat16()
            bytes_, offset_there = byte_array(value), offset // 2
        else:
            offset_there = offset
        if self._expected is None:
            there = self._from_source(info, offset, len(data))
        else:
            there = self._expected[offset_there : offset_there + bytes_.size]
        if there.size != bytes_.size:  # another shape: nothing is equal
            there = ~bytes_
        if not np.array_equal(bytes_, there):
            wrong = np.flatnonzero(bytes_ != there)
            width = 2 if self._expected is not None else torch_dtype(info).itemsize
            elements = np.unique(wrong // width)
            if self._first is None:
                self._first = offset_there // width + int(elements[0])
            self._different += elements.size
        return offset + len(data) == info.nbytes

    def difference(self, info: TensorInfo) -> str | None:
        """How the tensor differs, in words; None where it does not."""
        of = "the source's BF16 dequantization" if self._expected is not None else "the source"
        self._expected = None
        if not self._different:
            return None
        at = [int(i) for i in np.unravel_index(self._first or 0, info.shape)]
        return f"differs from {of} in {self._different:,} values, the first at {at}"

    def _dequantized(self, info: TensorInfo) -> np.ndarray | None:
        """BF16 bytes of an attention weight; None for a tensor that the source holds as it is."""
        source, name = self._source, info.name
        if ".self_attn." not in name or not name.endswith("_proj.weight"):
            return None
        return byte_array(dequantize_linear(source, name.removesuffix(".weight"), CPU))

    def _from_source(self, info: TensorInfo, offset: int, count: int) -> np.ndarray:
        """The source's bytes of this part of a tensor, converted where it is stored in another type."""
        source = self._source
        there = source.info(info.name)
        if there.shape != info.shape:
            return np.empty(0, np.uint8)
        if there.dtype == info.dtype:
            return byte_array(source.read_raw(there, offset, count))
        theirs, ours = torch_dtype(there), torch_dtype(info)
        begin, numel = offset // ours.itemsize, count // ours.itemsize
        raw = source.read_raw(there, begin * theirs.itemsize, numel * theirs.itemsize)
        return byte_array(raw.view(theirs).to(ours))


def byte_array(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, U8 [n]."""
    return np.frombuffer(byte_view(tensor.contiguous()), np.uint8)
