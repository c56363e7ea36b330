"""Writing that survives a crash: a file is either whole under its name or not there.

Order, as restic does it: temporary file in the same folder, reserve the space, write, compare the size, fsync,
mode by umask, rename, fsync the folder.  Assumption: fsync is honest.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import xxhash

from m27quant.errors import EnvironmentFault, escape

TEMPORARY = ".tmp-"
HINTS = {
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "choose another folder",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`), or --max-shard-size",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fault_point(name: str) -> None:
    """A place where the crash tests stop the process dead; does nothing outside of pytest.

    `M27QUANT_FAULT=NAME[:N]` kills at the N-th passing (from 1); `NAME:N:enospc` runs out of disk there.
    """
    wanted = os.environ.get("M27QUANT_FAULT")
    if wanted is None or "PYTEST_CURRENT_TEST" not in os.environ:
        return
    log = os.environ.get("M27QUANT_FAULT_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(name + "\n")
    point, _, rest = wanted.partition(":")
    count, _, kind = rest.partition(":")
    if point != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count or 1):
        if kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os._exit(137)


_passed: dict[str, int] = {}


def raise_for_os_error(fault: OSError, path: Path) -> NoReturn:
    """Turn an OSError of a write into one clear `EnvironmentFault`."""
    shown = escape(path)
    if fault.errno in NO_SPACE:
        free = _free_bytes(path)
        raise EnvironmentFault(
            f"{shown}: no space left ({fault.strerror}; {free})",
            hint="free some space and run again with --resume",
        ) from None
    raise EnvironmentFault(
        f"{shown}: cannot be written ({fault.strerror})",
        hint=HINTS.get(fault.errno or 0, "check the folder's permissions and mount"),
    ) from None


def _free_bytes(path: Path) -> str:
    try:
        stats = os.statvfs(path.parent)
    except OSError:
        return "free space unknown"
    return f"{stats.f_bavail * stats.f_frsize / 2**30:.1f} GiB free"


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def durable_file(path: Path, size: int) -> Iterator[int]:
    """Yield the descriptor of a file of `size` bytes that becomes `path` when the block ends well.

    The descriptor may be written in any order with `pwrite_all`.  On an exception nothing appears.

    Raises:
        EnvironmentFault: no space, no permission, read-only.
    """
    temporary = temporary_path(path)
    try:
        fd = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )  # the umask does the rest
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
            fault_point("file-reserved")
            yield fd
            if os.fstat(fd).st_size != size:
                raise OSError(errno.EIO, "size differs from what was planned")
            fault_point("file-written")
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        fault_point("file-renamed")
        sync_folder(path.parent)
    except OSError as fault:
        temporary.unlink(missing_ok=True)
        raise_for_os_error(fault, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Where this process writes what will become `path`."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}"[:255])


@contextmanager
def joined_file(temporary: Path) -> Iterator[int]:
    """Yield the descriptor of another process's `durable_file` under way, to write a part of it durably.

    Raises:
        EnvironmentFault: no space, no permission, read-only.
    """
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as fault:
        raise_for_os_error(fault, temporary)


def pwrite_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`, whatever the system takes at a time."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + 2**30], offset + done)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably and atomically."""
    with durable_file(path, len(data)) as fd:
        pwrite_all(fd, data, 0)


def move_durably(source: Path, target: Path) -> None:
    """Rename within one file system and make the new name durable."""
    try:
        os.rename(source, target)
        sync_folder(target.parent)
    except OSError as fault:
        raise_for_os_error(fault, target)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed process left behind in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, as the Hub names large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(path: Path) -> tuple[str, str]:
    """(SHA-256, XXH3-128) of a file in hexadecimal, read once: one to compare with the Hub, one to check at speed."""
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            part = memoryview(buffer)[:count]
            sha256.update(part)
            xxh3.update(part)
    return sha256.hexdigest(), xxh3.hexdigest()
