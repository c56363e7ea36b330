"""Files that a command writes its result to: whole or not at all, and never one that is left of a former run."""

from __future__ import annotations

from pathlib import Path

from m27quant.errors import UsageError, escape


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
