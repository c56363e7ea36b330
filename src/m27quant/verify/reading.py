"""Many small tensors read in few calls: neighbours in a file come in one `pread`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from m27quant.checkpoint.header import TensorInfo, pread_exactly
from m27quant.errors import EnvironmentFault, escape

MAX_GAP = 64 * 2**10
"""Bytes between two tensors that are cheaper to read than to seek over."""
MAX_RUN = 8 * 2**20


def read_tensors(tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, memoryview]]:
    """(tensor, its bytes), file by file in the order in which they lie there; a view lasts until the next one.

    Raises:
        CheckpointError: a file that shrinks while it is read.
        EnvironmentFault: a file that cannot be opened or read.
    """
    room = memoryview(bytearray())
    for run in _runs(sorted(tensors, key=lambda t: (str(t.path), t.start, t.end))):
        begin = run[0].start
        size = max(t.end for t in run) - begin
        if len(room) < size:  # fresh memory costs more than reading
            room = memoryview(bytearray(size))
        view = room[:size]
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
