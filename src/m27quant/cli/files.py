"""Files that a command writes its result to: whole or not at all, and never one that is left of a former run."""

from __future__ import annotations

from pathlib import Path

from m27quant.errors import OutputError, UsageError, escape

HEAD_BYTES = 1024
PAGE_MARK = b'<meta name="generator" content="m27quant report '


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`; a link, a pipe or a device (/dev/stdout) is written to, everything else replaced.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    from m27quant.checkpoint.durable import raise_for_os_error, write_durably

    if path.is_symlink() or (path.exists() and not path.is_file()):
        try:
            path.write_bytes(data)
        except OSError as fault:
            raise_for_os_error(fault, path)
    else:
        write_durably(path, data)


def forget(path: Path) -> None:
    """Take away what a former run wrote, so that nobody reads it as the result of this one.

    Raises:
        UsageError: not a path.
        EnvironmentFault: a file that may not be removed, a folder that is not there: nothing could be written either.
    """
    from m27quant.checkpoint.durable import raise_for_os_error

    try:
        if path.is_file() and not path.is_symlink():
            path.unlink()
        path.parent.stat()
    except OSError as fault:
        raise_for_os_error(fault, path)
    except ValueError:
        raise UsageError(f"{escape(path)}: not a path", hint="name a file") from None


def refuse_foreign(path: Path) -> None:
    """Where a page is to be written a regular file is replaced only if its head names us.

    Raises:
        OutputError: a folder, or another's file.
        UsageError: not a path.
    """
    from m27quant.checkpoint.durable import raise_for_os_error

    try:
        if path.is_dir():
            raise OutputError(f"{escape(path)}: a folder", hint="name a file, as in `-o report.html`")
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError) as fault:
        if isinstance(fault, OSError):
            raise_for_os_error(fault, path)
        raise UsageError(f"{escape(path)}: not a path", hint="name a file") from None
    if PAGE_MARK not in head:
        raise OutputError(
            f"{escape(path)}: exists and is no page of m27quant's",
            hint="name another file, or add --overwrite",
        )
