"""The hidden states of all calibration tokens, BF16 [T, D], in memory or in a file, read and written in chunks.

A chunk is a run of whole sequences.  Chunks are the same for every memory budget, so that a budget changes where
rows are kept and never what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.durable import durable_file, pwrite_all, raise_for_os_error
from m27quant.checkpoint.header import pread_exactly
from m27quant.errors import escape

ROW_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of whole sequences; `sequences` numbers them, `lengths` are theirs."""

    begin: int
    end: int
    sequences: range
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return self.end - self.begin


def plan_chunks(lengths: Sequence[int], chunk_tokens: int) -> list[Chunk]:
    """Cut sequences into chunks of at most `chunk_tokens` tokens; a longer sequence is a chunk by itself."""
    chunks: list[Chunk] = []
    first = begin = size = 0
    for number, length in enumerate(lengths):
        if size and size + length > chunk_tokens:
            chunks.append(Chunk(begin, begin + size, range(first, number), tuple(lengths[first:number])))
            first, begin, size = number, begin + size, 0
        size += length
    chunks.append(Chunk(begin, begin + size, range(first, len(lengths)), tuple(lengths[first:])))
    return chunks


class Rows(Protocol):
    """Rows of hidden states by chunk."""

    def read(self, chunk: Chunk) -> torch.Tensor:
        """BF16 [len(chunk), D] on the device of the computation."""

    def write(self, chunk: Chunk, rows: torch.Tensor) -> None:
        """Replace the chunk's rows."""

    def close(self) -> None:
        """Give memory or disk back."""


class MemoryRows:
    """Rows of `num_tokens` tokens from number `first` on, in one tensor on `device`."""

    def __init__(self, num_tokens: int, hidden_size: int, device: torch.device, first: int = 0) -> None:
        self._first = first
        self.rows = torch.empty(num_tokens, hidden_size, dtype=ROW_DTYPE, device=device)

    def read(self, chunk: Chunk) -> torch.Tensor:
        return self.rows[chunk.begin - self._first : chunk.end - self._first]

    def write(self, chunk: Chunk, rows: torch.Tensor) -> None:
        self.rows[chunk.begin - self._first : chunk.end - self._first] = rows

    def close(self) -> None:
        self.rows = torch.empty(0)  # a slice would keep the storage


class FileRows:
    """Rows of `num_tokens` tokens from number `first` on, in a scratch file that is gone when the process is."""

    def __init__(
        self, path: Path, num_tokens: int, hidden_size: int, device: torch.device, first: int = 0
    ) -> None:
        self._hidden_size, self._device, self._path, self._first = hidden_size, device, path, first
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            path.unlink()
            os.posix_fallocate(self._fd, 0, max(1, num_tokens * hidden_size * 2))
        except OSError as fault:
            raise_for_os_error(fault, path)

    def read(self, chunk: Chunk) -> torch.Tensor:
        begin = chunk.begin - self._first
        return _read_rows(self._fd, begin, len(chunk), self._hidden_size, self._path).to(self._device)

    def write(self, chunk: Chunk, rows: torch.Tensor) -> None:
        try:
            pwrite_all(self._fd, as_bytes(rows), (chunk.begin - self._first) * self._hidden_size * 2)
        except OSError as fault:
            raise_for_os_error(fault, self._path)

    def close(self) -> None:
        os.close(self._fd)


def as_bytes(rows: torch.Tensor) -> memoryview:
    """The bytes of `rows`, copied to the CPU where they are elsewhere."""
    return byte_view(rows.cpu().contiguous())


def _read_rows(fd: int, begin: int, count: int, hidden_size: int, path: Path) -> torch.Tensor:
    rows = torch.empty(count, hidden_size, dtype=ROW_DTYPE)
    if rows.numel():
        pread_exactly(fd, byte_view(rows), begin * hidden_size * 2, escape(path))
    return rows


OpenFile = Callable[[Path, int], AbstractContextManager[int]]
"""A file of so many bytes that appears when the block ends well, as `durable_file`."""


def save_rows(
    path: Path,
    rows: Iterator[tuple[Chunk, torch.Tensor]],
    num_tokens: int,
    hidden_size: int,
    opened: OpenFile = durable_file,
) -> None:
    """Write all chunks of `num_tokens` tokens to `path` durably; some of them where others write the rest."""
    with opened(path, num_tokens * hidden_size * 2) as fd:
        for chunk, part in rows:
            pwrite_all(fd, as_bytes(part), chunk.begin * hidden_size * 2)


def load_rows(path: Path, chunks: Sequence[Chunk], hidden_size: int) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Chunk by chunk what `save_rows` wrote."""
    with path.open("rb") as file:
        for chunk in chunks:
            yield chunk, _read_rows(file.fileno(), chunk.begin, len(chunk), hidden_size, path)
