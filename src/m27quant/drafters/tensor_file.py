"""Tensors as one safetensors file: durable, the same bytes for the same tensors, read back with every check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.drafter_weights import read_bytes_of
from m27quant.checkpoint.durable import durable_file, pwrite_all
from m27quant.checkpoint.header import TensorInfo, read_header
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.writer import plan_shard
from m27quant.errors import CheckpointError, escape

DTYPES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Replace `path` by `tensors`, durably; one at a time is on the CPU.  Returns the file's size in bytes.

    Raises:
        EnvironmentFault: no space, no permission.
    """
    specs = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    plan = plan_shard(specs)
    with durable_file(path, plan.size) as fd:
        pwrite_all(fd, plan.header, 0)
        for name, tensor in tensors.items():
            pwrite_all(fd, byte_view(tensor.detach().cpu().contiguous()), plan.offsets[name][1])
    return plan.size


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        CheckpointError: damaged.
        EnvironmentFault: not readable.
    """
    return {name: _read(info) for name, info in read_header(path).tensors.items()}


def _read(info: TensorInfo) -> Tensor:
    dtypes = {tag: dtype for dtype, tag in DTYPES.items()}
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"tensor '{escape(info.name)}' has dtype {info.dtype}", hint="start again with --overwrite"
        )
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    if info.nbytes:
        read_bytes_of(info, byte_view(raw))
    return raw.view(dtypes[info.dtype]).view(info.shape)
