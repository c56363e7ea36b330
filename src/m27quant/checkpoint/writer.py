"""safetensors shards whose layout is known before their content: planned to the byte, filled in any order.

The safetensors library's own writer neither syncs nor keeps the order of metadata and creates files with mode
0600; here the same inputs give the same bytes, and a shard is durable before its name appears.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.durable import (
    digests_of,
    durable_file,
    fault_point,
    joined_file,
    move_durably,
    pwrite_all,
    temporary_path,
)
from m27quant.checkpoint.header import DTYPE_BITS
from m27quant.checkpoint.names import TensorSpec

if TYPE_CHECKING:
    import torch


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's data."""
    return math.prod(spec.shape) * DTYPE_BITS[spec.dtype] // 8


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The exact layout of one shard: its header bytes and each tensor's absolute offset."""

    header: bytes
    offsets: dict[str, tuple[TensorSpec, int]]
    size: int

    @property
    def tensor_bytes(self) -> int:
        return self.size - len(self.header)


def plan_shard(specs: Iterable[TensorSpec]) -> ShardPlan:
    """Lay out `specs`: widest types first, so that all are aligned, then by name."""
    ordered = sorted(specs, key=lambda s: (-DTYPE_BITS[s.dtype], s.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    relative = []
    for spec in ordered:
        end = at + nbytes(spec)
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, end]}
        relative.append((spec, at))
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(header, {s.name: (s, len(header) + o) for s, o in relative}, len(header) + at)


def split_into_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[ShardPlan]:
    """Plans for `specs` in order, as few as keep each file's tensors within `max_bytes`.

    A tensor that is larger than `max_bytes` gets a file of its own.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = nbytes(spec)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    return [plan_shard(group) for group in groups if group]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A durable file: its name in the work folder, size and content hash."""

    name: str
    size: int
    sha256: str
    xxh3_128: str | None = None
    """Of shards, which are checked again later."""

    def to_json(self) -> dict[str, str | int]:
        known: dict[str, str | int] = {"name": self.name, "size": self.size, "sha256": self.sha256}
        return known if self.xxh3_128 is None else known | {"xxh3_128": self.xxh3_128}


class ShardSet:
    """The open shards of one unit of work; `write` puts a tensor where the plan has its place."""

    def __init__(self, plans: list[ShardPlan], descriptors: list[int], files: list[Path]) -> None:
        self.files = files
        """Where the shards are while they are written."""
        self._place = {
            name: (fd, spec, offset)
            for plan, fd in zip(plans, descriptors, strict=True)
            for name, (spec, offset) in plan.offsets.items()
        }
        self._missing = {name: nbytes(spec) for name, (_, spec, _) in self._place.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor; shape and dtype must be as planned."""
        spec = self._place[name][1]
        assert tuple(tensor.shape) == spec.shape, (
            f"{name}: {tuple(tensor.shape)} is not the planned {spec.shape}"
        )
        self.write_part(name, tensor, 0)

    def write_part(self, name: str, tensor: torch.Tensor, offset: int) -> None:
        """Write the bytes of `tensor` at byte `offset` within the tensor `name`."""
        import torch

        fd, spec, start = self._place[name]
        assert tensor.element_size() * 8 == DTYPE_BITS[spec.dtype] or tensor.dtype == torch.uint8, name
        data = byte_view(tensor.cpu().contiguous())
        assert offset + len(data) <= nbytes(spec), f"{name}: more bytes than planned"
        pwrite_all(fd, data, start + offset)
        self._missing[name] -= len(data)
        fault_point("tensor-written")

    def written(self) -> list[str]:
        """Tensors that are whole."""
        return [name for name, left in self._missing.items() if not left]

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Another process has written `names` whole, which nobody else has."""
        for name in names:
            assert self._missing[name] == nbytes(self._place[name][1]), f"{name}: written twice"
            self._missing[name] = 0

    def check_complete(self) -> None:
        missing = [name for name, left in self._missing.items() if left]
        assert not missing, f"planned but not written: {missing[:3]}"


@contextmanager
def open_shards(
    folder: Path, stem: str, plans: list[ShardPlan], written: list[WrittenFile]
) -> Iterator[ShardSet]:
    """Open `plans` as files in `folder`; when the block ends well they are durable and listed in `written`.

    Files are named `STEM-I.HASH.safetensors` by their content, so that nothing is ever overwritten.
    """
    partial = [folder / f"{stem}-{i}.partial" for i in range(len(plans))]
    with ExitStack() as files:
        descriptors = [
            files.enter_context(durable_file(path, plan.size))
            for path, plan in zip(partial, plans, strict=True)
        ]
        for plan, fd in zip(plans, descriptors, strict=True):
            pwrite_all(fd, plan.header, 0)
        shards = ShardSet(plans, descriptors, [temporary_path(path) for path in partial])
        yield shards
        shards.check_complete()
    written += [_named_by_content(path, plan.size) for path, plan in zip(partial, plans, strict=True)]


@contextmanager
def join_shards(files: list[Path], plans: list[ShardPlan]) -> Iterator[ShardSet]:
    """Open another process's shards while that writes them; when the block ends well, this one's part is durable."""
    with ExitStack() as opened:
        yield ShardSet(plans, [opened.enter_context(joined_file(path)) for path in files], files)


def _named_by_content(path: Path, size: int) -> WrittenFile:
    sha256, xxh3 = digests_of(path)
    final = path.with_name(f"{path.stem}.{sha256[:16]}.safetensors")
    move_durably(path, final)
    return WrittenFile(final.name, size, sha256, xxh3)
