"""Hidden states on disk, within a limit: what was computed once is read, the rest is computed again.

FOLDER/<fingerprint>/writer-0/ holds states.bin, BF16 values one sample behind the other, and index.jsonl, a journal of
where each lies.  An entry is written behind its bytes and has their checksum, so that a crash loses what is not in the
index and no more, and what a disk has lost is computed again.  Each process writes to a folder of its own and reads
those of all others as they were when it began.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.durable import pwrite_all, raise_for_os_error
from m27quant.checkpoint.journal import Journal, read_entries
from m27quant.errors import CheckpointError

MAX_WRITERS = 256


class _Place(NamedTuple):
    """Where one sample's states lie."""

    file: Path
    offset: int
    tokens: int
    checksum: str


class StateCache:
    """The states of one target under one set of options; `open` finds the folder."""

    def __init__(self, folder: Path, widths: tuple[int, int], limit: int | None) -> None:
        """Take a writer's folder below `folder` and read what all writers have.

        Args:
            folder: of this target and these options.
            widths: values of one token in the two parts of its states.
            limit: the most bytes of all writers together; None: any number.

        Raises:
            EnvironmentFault: the folder cannot be written to.
        """
        self._widths, self._limit, self._folder = widths, limit, folder
        try:
            self._lock, own = _own_folder(folder)
            self._places: dict[str, _Place] = {}
            for writer in sorted(folder.glob("writer-*")):
                self._read_index(writer)
            self._journal = _journal(own)
            self._bin = own / "states.bin"
            self._fd = os.open(self._bin, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as fault:
            raise_for_os_error(fault, folder)
        self._files = {self._bin: self._fd}
        self._end = max((e["end"] for e in self._journal.all("states")), default=0)

    @classmethod
    def open(
        cls, folder: Path, identity: Mapping[str, Any], widths: tuple[int, int], limit: int | None
    ) -> StateCache:
        """The cache below `folder` of what `identity` describes; see `__init__`."""
        name = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]
        return cls(folder / name, widths, limit)

    def get(self, key: str) -> tuple[Tensor, Tensor] | None:
        """The states stored under `key`; None where there are none, or no longer whole ones."""
        place = self._places.get(key)
        if place is None:
            return None
        raw = torch.empty(place.tokens * sum(self._widths), dtype=torch.bfloat16)
        view = byte_view(raw)
        if place.file not in self._files:
            try:
                self._files[place.file] = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
        count = os.preadv(self._files[place.file], [view], place.offset)
        if count != len(view) or xxhash.xxh3_64_hexdigest(view) != place.checksum:
            del self._places[key]
            return None
        first, second = torch.split(raw, [place.tokens * width for width in self._widths])
        return first.view(place.tokens, -1), second.view(place.tokens, -1)

    def put(self, states: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Store what there is room for.

        Raises:
            EnvironmentFault: the disk is full or gone.
        """
        used, begin = self.nbytes, self._end
        entries: dict[str, tuple[int, int, str]] = {}
        try:
            for key, pair in states.items():
                parts = [byte_view(tensor.cpu().contiguous()) for tensor in pair]
                size = sum(map(len, parts))
                if key in self._places or (self._limit is not None and used + size > self._limit):
                    continue
                checksum = xxhash.xxh3_64()
                at = self._end
                for part in parts:
                    pwrite_all(self._fd, part, at)
                    checksum.update(part)
                    at += len(part)
                entries[key] = self._end, len(pair[0]), checksum.hexdigest()
                used, self._end = used + size, at
        except OSError as fault:
            raise_for_os_error(fault, self._bin)
        if entries:
            self._journal.append("states", begin=begin, end=self._end, entries=entries)
            self._places |= {key: _Place(self._bin, *place) for key, place in entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all writers."""
        return sum(path.stat().st_size for path in self._folder.glob("writer-*/states.bin"))

    def close(self) -> None:
        """Let others write here."""
        for fd in self._files.values():
            os.close(fd)
        self._journal.close()
        self._lock.release()

    def _read_index(self, writer: Path) -> None:
        try:
            entries = read_entries(writer / "index.jsonl")
        except CheckpointError:  # a damaged index: what it had is computed again
            return
        for entry in entries:
            if entry["step"] == "states":
                for key, place in entry["entries"].items():
                    self._places[key] = _Place(writer / "states.bin", *place)


def _own_folder(folder: Path) -> tuple[FileLock, Path]:
    """The first writer's folder that no other process has."""
    for number in range(MAX_WRITERS):
        own = folder / f"writer-{number}"
        own.mkdir(parents=True, exist_ok=True)
        lock = FileLock(own / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        return lock, own
    raise OSError(f"{MAX_WRITERS} processes use this cache")


def _journal(own: Path) -> Journal:
    """The writer's index; begun anew where it is damaged."""
    try:
        return Journal(own / "index.jsonl")
    except CheckpointError:
        (own / "index.jsonl").unlink()
        return Journal(own / "index.jsonl")
