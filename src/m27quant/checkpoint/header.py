"""The header of a safetensors file, read as hostile input: validated in full before any tensor byte is touched.

Format: 8 bytes little-endian header length, the header as a JSON object, then one contiguous buffer
(https://github.com/huggingface/safetensors#format).  Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import parse, refuse_lfs_pointer, require_regular_file
from m27quant.errors import CheckpointError, EnvironmentFault, escape

MAX_HEADER_BYTES = 100_000_000
AGAIN = "download the file again"
UNREADABLE = "check the disk or the network mount"
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` and safetensors `dtype` tag, absolute byte range in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_size: int
    mtime_ns: int
    digest: str
    """SHA-256 of the header bytes: names, types, shapes and offsets of everything in the file."""


def read_header(path: Path) -> Header:
    """Read and validate the header of the safetensors file at `path`.

    Raises:
        CheckpointError: not a safetensors file, or one whose header lies (lengths, types, shapes,
            offsets, holes, overlaps, trailing or missing bytes, duplicate names).
        EnvironmentFault: the file cannot be read.
    """
    raw, info = read_header_bytes(path)
    shown = escape(path)
    entries = parse(raw, f"{shown}: header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{shown}: the header is not a JSON object", hint=AGAIN)
    metadata = _metadata(shown, entries.pop("__metadata__", {}))
    begin = 8 + len(raw)
    tensors = {name: parse_entry(path, name, entry, begin) for name, entry in entries.items()}
    _check_coverage(shown, list(tensors.values()), begin, info.st_size)
    return Header(path, tensors, metadata, info.st_size, info.st_mtime_ns, hashlib.sha256(raw).hexdigest())


def read_header_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    """The JSON text of a header as it stands, and the file's stat.

    Raises:
        CheckpointError: not a regular file, or not one that begins with a header of a believable length.
        EnvironmentFault: the file cannot be read.
    """
    info = require_regular_file(path)
    shown = escape(path)
    try:
        with path.open("rb") as file:
            return _header_bytes(path, file.read(8), info.st_size, file), info
    except PermissionError:
        raise EnvironmentFault(
            f"{shown}: permission denied (mode {info.st_mode & 0o777:04o})", hint=f"chmod u+r '{shown}'"
        ) from None
    except OSError as fault:
        raise EnvironmentFault(f"{shown}: cannot be read ({fault.strerror})", hint=UNREADABLE) from None


def _header_bytes(path: Path, prefix: bytes, size: int, file: Any) -> bytes:
    shown = escape(path)
    if size < 8:
        raise CheckpointError(f"{shown}: {size} bytes, too small for a safetensors header", hint=AGAIN)
    if prefix.startswith(b"version "):
        refuse_lfs_pointer(path, prefix + file.read(64))
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        # A header's length may begin with a pickle's first byte, so this is asked of bad ones only.
        if prefix[:4] == b"PK\x03\x04" or (prefix[:1] == b"\x80" and file.read(1) != b"{"):
            raise CheckpointError(
                f"{shown}: a pickle, which is never loaded", hint="convert it to safetensors"
            )
        limit = f"more than {MAX_HEADER_BYTES:,}" if length > MAX_HEADER_BYTES else f"the file has {size:,}"
        raise CheckpointError(f"{shown}: a header of {length:,} bytes, {limit}", hint=AGAIN)
    raw: bytes = file.read(length)
    if len(raw) != length:
        raise CheckpointError(f"{shown}: truncated while it was read", hint=AGAIN)
    return raw


def _metadata(shown: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{shown}: __metadata__ must map strings to strings", hint=AGAIN)
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def parse_entry(path: Path, name: str, entry: Any, begin: int) -> TensorInfo:
    """One tensor of a header whose buffer begins at byte `begin`; `CheckpointError` where the entry lies."""
    where = f"{escape(path)}: tensor '{escape(name)}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets", hint=AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: unknown dtype '{escape(dtype)}'; known: {', '.join(DTYPE_BITS)}", hint=AGAIN
        )
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{where}: bad shape {escape(shape)}", hint=AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{where}: bad data_offsets {escape(offsets)}", hint=AGAIN)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits >= 2**66:
        raise CheckpointError(
            f"{where}: {dtype} {shape} is not a whole number of bytes that could exist", hint=AGAIN
        )
    start, end = offsets
    if end - start != bits // 8:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {bits // 8:,} bytes, offsets span {end - start:,}", hint=AGAIN
        )
    return TensorInfo(name, dtype, tuple(shape), path, begin + start, begin + end)


def _check_coverage(shown: str, tensors: list[TensorInfo], begin: int, size: int) -> None:
    """The tensors must tile the buffer: no hole, no overlap, nothing before or behind."""
    at = begin
    for tensor in sorted(tensors, key=lambda t: (t.start, t.end)):
        if tensor.start != at:
            fault = (
                "overlaps the one before it"
                if tensor.start < at
                else f"leaves a hole of {tensor.start - at:,} bytes"
            )
            raise CheckpointError(f"{shown}: tensor '{escape(tensor.name)}' {fault}", hint=AGAIN)
        at = tensor.end
    if at > size:
        raise CheckpointError(f"{shown}: truncated: {size:,} bytes where the header needs {at:,}", hint=AGAIN)
    if at < size:
        raise CheckpointError(f"{shown}: {size - at:,} trailing bytes behind the last tensor", hint=AGAIN)


def pread_exactly(fd: int, view: memoryview, offset: int, shown: str) -> None:
    """Fill `view` from `offset` of the open file; a short file is a `CheckpointError`, never a SIGBUS."""
    done = 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done : done + 2**30]], offset + done)
        except OSError as fault:
            raise EnvironmentFault(f"{shown}: cannot be read ({fault.strerror})", hint=UNREADABLE) from None
        if n == 0:
            raise CheckpointError(
                f"{shown}: ended at byte {offset + done:,} while it was read",
                hint="let nothing write to MODEL during a run",
            )
        done += n
