"""Every byte of the shards once, in the order in which it lies there: hashed, and shown to whoever looks at values.

Shards are read by as many threads as there are cores, a run of neighbouring tensors at a time; a run fits into a
core's cache, so that hashing and counting do not wait for memory.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import xxhash

from m27quant.checkpoint.header import TensorInfo, pread_exactly
from m27quant.errors import EnvironmentFault, escape
from m27quant.progress import Progress, ProgressCallback
from m27quant.verify.view import View

RUN_BYTES = 2**20
"""At most in one read, a multiple of 16: no block of codes is cut."""
MAX_GAP = 2**16
REPORT_EVERY_S = 0.2

ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""By the report's names, the fastest first."""

T = TypeVar("T")
R = TypeVar("R")


class Hash(NamedTuple):
    """What a file's content should hash to, in hexadecimal."""

    algorithm: str
    digest: str


class Visitor(Protocol):
    """Looks at tensors; one for each thread."""

    def wants(self, info: TensorInfo) -> bool:
        """Whether the tensor's bytes are needed."""

    def visit(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Bytes of the tensor from `offset` on; they come in order, and are gone after the call."""

    def end_of_shard(self) -> None:
        """No more of this file."""


class Segment(NamedTuple):
    """Bytes [start, end) of a file, and the tensor that they belong to, if one."""

    start: int
    end: int
    info: TensorInfo | None


def stream(
    view: View, make_visitor: Callable[[], Visitor], *, hashed: Mapping[str, Hash], progress: ProgressCallback
) -> dict[str, str]:
    """Read all that visitors want, and all of the files in `hashed`; the hashes of those by file name.

    Raises:
        CheckpointError: a file that shrinks while it is read.
        EnvironmentFault: a file that cannot be read.
    """
    files = _by_file(view)
    visitors = threading.local()
    meter = Meter(
        sum(_wanted_bytes(view, path, infos, hashed, make_visitor()) for path, infos in files), progress
    )

    def one(file: tuple[Path, list[TensorInfo]]) -> str | None:
        visitor: Visitor | None = getattr(visitors, "own", None)
        if visitor is None:
            visitor = visitors.own = make_visitor()
        path, infos = file
        wanted = hashed.get(path.name)
        infos = [info for info in infos if visitor.wants(info)] if wanted is None else infos
        segments = _segments(infos, view.shard_sizes[path.name], wanted is not None)
        return _read_file(path, segments, visitor, meter, wanted)

    digests = in_threads(one, files, meter)
    return {path.name: digest for (path, _), digest in zip(files, digests, strict=True) if digest is not None}


def in_threads(call: Callable[[T], R], items: Sequence[T], meter: Meter) -> list[R]:
    """`call` on every item, on all cores; the first fault ends the others at their next piece of work."""
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="m27-verify") as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            meter.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Stopped(Exception):
    """Another thread failed; its fault is what is reported."""


class Meter:
    """How far the run is, summed over threads."""

    def __init__(self, total: int, progress: ProgressCallback, *, silent_s: float | None = None) -> None:
        """Tells that it begins; with `silent_s` nothing is told of what takes fewer seconds."""
        self.total, self.progress = total, progress
        self._lock = threading.Lock()
        self._done = 0
        self._begin = self._told = time.monotonic()
        self.stopped = threading.Event()
        if silent_s is None:
            self.progress(Progress(stage="verify", fraction=0.0))
        else:
            self._told += silent_s

    def add(self, count: int) -> None:
        """`count` more bytes are done.  Raises `Stopped` where another thread has failed."""
        if self.stopped.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._told < REPORT_EVERY_S:
                return
            self._told = now
            rate = self._done / (now - self._begin)
            fraction = min(1.0, self._done / max(1, self.total))
            self.progress(Progress(stage="verify", fraction=fraction, bytes_per_s=rate))


def _by_file(view: View) -> list[tuple[Path, list[TensorInfo]]]:
    """Readable shards with their tensors, the largest first: threads then end together."""
    files: dict[Path, list[TensorInfo]] = {view.folder / name: [] for name in view.shard_sizes}
    for info in view.tensors.values():
        if info.path in files and info.end <= view.shard_sizes[info.path.name]:
            files[info.path].append(info)
    return sorted(files.items(), key=lambda f: (-view.shard_sizes[f[0].name], f[0].name))


def _wanted_bytes(
    view: View, path: Path, infos: list[TensorInfo], hashed: Mapping[str, Hash], visitor: Visitor
) -> int:
    if path.name in hashed:
        return view.shard_sizes[path.name]
    return sum(info.nbytes for info in infos if visitor.wants(info))


def _segments(infos: list[TensorInfo], size: int, whole: bool) -> Iterator[Segment]:
    """What to read of a file, in order; the bytes between tensors too where the `whole` file is wanted."""
    at = 0
    for info in sorted(infos, key=lambda t: (t.start, t.end)):
        if info.start < at:
            continue  # it overlaps another: reported from the headers
        if whole or info.start - at <= MAX_GAP:
            yield from _cut(at, info.start, None)
        yield from _cut(info.start, info.end, info)
        at = info.end
    if whole:
        yield from _cut(at, size, None)


def _cut(start: int, end: int, info: TensorInfo | None) -> Iterator[Segment]:
    for begin in range(start, end, RUN_BYTES):
        yield Segment(begin, min(begin + RUN_BYTES, end), info)


def _runs(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    """Neighbours that one read takes."""
    run: list[Segment] = []
    for segment in segments:
        if run and (segment.start != run[-1].end or segment.end - run[0].start > RUN_BYTES):
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _read_file(
    path: Path, segments: Iterator[Segment], visitor: Visitor, meter: Meter, wanted: Hash | None
) -> str | None:
    digest = None if wanted is None else ALGORITHMS[wanted.algorithm]()
    buffer = memoryview(bytearray(RUN_BYTES))
    shown = escape(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as fault:
        raise EnvironmentFault(
            f"{shown}: cannot be opened ({fault.strerror})", hint="check its permissions"
        ) from None
    try:
        for run in _runs(segments):
            begin = run[0].start
            data = buffer[: run[-1].end - begin]
            pread_exactly(fd, data, begin, shown)
            if digest is not None:
                digest.update(data)
            for start, end, info in run:
                if info is not None and visitor.wants(info):
                    visitor.visit(info, start - info.start, data[start - begin : end - begin])
            meter.add(len(data))
    finally:
        os.close(fd)
    visitor.end_of_shard()
    return None if digest is None else digest.hexdigest()
