"""The tensors of a drafter's folder by the names that all layouts share: headers first, bytes when asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.header import TensorInfo, pread_exactly, read_header
from m27quant.checkpoint.source import INDEX, SINGLE, check_link_stays_inside, check_stays_inside
from m27quant.checkpoint.strict_json import MAX_INDEX_BYTES, read_object
from m27quant.errors import CheckpointError, EnvironmentFault, escape

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pt", ".pth")
ALIASES = {"midlayer.": "layers.0.", "encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
AUX_NORMS = {"aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.", "aux_norm_high.": "fc_norm.2."}


def plain_name(name: str) -> str:
    """`model.midlayer.x` and `layers.0.x` are one: what the engines' loaders make of both."""
    plain = name.removeprefix("model.")
    for alias, meant in (ALIASES | AUX_NORMS).items():
        if plain.startswith(alias):
            return meant + plain.removeprefix(alias)
    return plain


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor by its plain name; `TensorInfo.name` is the one in the file.

    Raises:
        CheckpointError: no weights, damaged ones, pickles, links out of the folder, two tensors under one name.
        EnvironmentFault: a folder that cannot be listed.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard in _shards(folder):
        check_stays_inside(folder, shard)
        for name, info in read_header(folder / shard).tensors.items():
            if (plain := plain_name(name)) in tensors:
                raise CheckpointError(
                    f"two tensors are named '{escape(plain)}'", hint="export the drafter again"
                )
            tensors[plain] = info
    return tensors


def _shards(folder: Path) -> list[str]:
    if os.path.lexists(folder / INDEX):
        check_link_stays_inside(folder, folder / INDEX)
        weight_map = read_object(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{INDEX}: weight_map is missing, empty or no object", hint="download it again"
            )
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(
                f"{INDEX}: weight_map does not map names to files", hint="download it again"
            )
        return sorted(set(weight_map.values()))
    if os.path.lexists(folder / SINGLE):
        return [SINGLE]
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as fault:
        raise EnvironmentFault(
            f"{escape(folder)}: cannot be listed ({fault.strerror})", hint="check its permissions"
        ) from None
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(
            f"{escape(folder)}: only pickled weights, which are never loaded",
            hint="convert them to safetensors",
        )
    raise CheckpointError(f"{escape(folder)}: no weights ({SINGLE})", hint="name the drafter's folder")


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A tensor on the CPU, bit for bit as it is stored: BF16, F16, F32, I32, I64 or BOOL.

    Raises:
        CheckpointError: another type, or a file that ends too early.
        EnvironmentFault: a file that cannot be read.
    """
    import torch

    dtypes = {
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32,
        "I64": torch.int64, "BOOL": torch.bool,
    }  # fmt: skip
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"tensor '{escape(info.name)}' has dtype {info.dtype}; drafters are BF16", hint="store it in BF16"
        )
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    if info.nbytes:
        read_bytes_of(info, byte_view(raw))
    return raw.view(dtypes[info.dtype]).view(info.shape)


def read_bytes_of(info: TensorInfo, buffer: memoryview) -> None:
    """Fill `buffer` with a tensor's bytes as they are stored.

    Raises:
        EnvironmentFault: the file cannot be opened or read.
        CheckpointError: it is shorter than its header said.
    """
    shown = escape(info.path)
    try:
        fd = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as fault:
        raise EnvironmentFault(
            f"{shown}: cannot be opened ({fault.strerror})", hint="check its permissions"
        ) from None
    try:
        pread_exactly(fd, buffer, info.start, shown)
    finally:
        os.close(fd)
