"""Who writes to OUT: a file lock that dies with its process, and a note that says whose it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import M27Error, OutputError, escape


class OutputLock:
    """The lock of one output folder's private folder."""

    def __init__(self, private: Path) -> None:
        self._shown = escape(private.parent)
        self._path = private / "lock"
        self._owner = private / "owner.json"
        self._lock = FileLock(self._path, timeout=0)

    @property
    def is_held(self) -> bool:
        """True while this run holds it."""
        return bool(self._lock.is_locked)

    def probe(self) -> None:
        """Raise `OutputError` where another run holds the lock; changes nothing.

        Not by taking it: that would make the file again where a run that ends has just removed it.
        """
        if self.is_held:
            return
        try:
            fd = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse()
        finally:
            os.close(fd)

    def acquire(self, *, force: bool) -> None:
        """Take the lock and note who has it.

        Raises:
            OutputError: another run has it, or one on another machine had it and may be alive (`force` overrules).
            OSError: the folder cannot be written to.
        """
        self._take()
        host = socket.gethostname()
        if self._record().get("host") not in (None, host) and not force:
            self._lock.release()
            raise OutputError(
                f"{self._shown}: a run on another machine is or was writing here ({self._describe()})",
                hint="make sure that it is dead, then pass --force-unlock",
            )
        self._owner.write_text(json.dumps({"pid": os.getpid(), "host": host}))

    def release(self, *, forget: bool) -> None:
        """Give the lock back; `forget` removes its files while it is still held, so that nobody else's go."""
        if forget and self.is_held:
            self._owner.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        self._lock.release()

    def _take(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise OutputError(
            f"{self._shown}: another run is writing here ({self._describe()})",
            hint="wait for it, or stop it first",
        ) from None

    def _record(self) -> dict[str, object]:
        try:
            return read_object(self._owner)
        except M27Error:
            return {}

    def _describe(self) -> str:
        record = self._record()
        if not record:
            return "its owner is unknown"
        return f"process {escape(record.get('pid'))} on {escape(record.get('host'))}"
