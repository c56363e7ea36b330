"""Many small tensors read in few calls: neighbours in a file come in one `pread`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from m27quant.checkpoint.header import TensorInfo, pread_exactly
from m27quant.errors import EnvironmentFault, escape

MAX_GAP = 64 * 2**10
"""Bytes between two tensors that are cheaper to read than to seek over."""
MAX_RUN = 8 * 2**20


class Room:
    """Memory to read to, again and again: fresh memory costs more than reading."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())

    def of(self, size: int) -> memoryview:
        """The first `size` bytes."""
        if len(self._memory) < size:
            self._memory = memoryview(bytearray(size))
        return self._memory[:size]


def read_tensors(
    tensors: Iterable[TensorInfo], room: Room | None = None
) -> Iterator[tuple[TensorInfo, memoryview]]:
    """(tensor, its bytes), file by file in the order in which they lie there; a view lasts until the next one.

    `room`: for many calls, one after another.

    Raises:
        CheckpointError: a file that shrinks while it is read.
        EnvironmentFault: a file that cannot be opened or read.
    """
    room = Room() if room is None else room
    for run in _runs(sorted(tensors, key=lambda t: (str(t.path), t.start, t.end))):
        begin = run[0].start
        view = room.of(max(t.end for t in run) - begin)
        shown = escape(run[0].path)
        try:
            fd = os.open(run[0].path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as fault:
            raise EnvironmentFault(
                f"{shown}: cannot be opened ({fault.strerror})", hint="check its permissions"
            ) from None
        try:
            pread_exactly(fd, view, begin, shown)
        finally:
            os.close(fd)
        for tensor in run:
            yield tensor, view[tensor.start - begin : tensor.end - begin]


def _runs(ordered: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    run: list[TensorInfo] = []
    for tensor in ordered:
        if run and (
            tensor.path != run[0].path
            or tensor.start > run[-1].end + MAX_GAP
            or tensor.end > run[0].start + MAX_RUN
        ):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run
