"""What the user typed as a path: there, or not there, and never a traceback."""

from __future__ import annotations

from pathlib import Path

from m27quant.errors import EnvironmentFault, escape


def existing(text: str) -> Path | None:
    """The file or folder that `text` names (`~` is the home folder); None where there is none.

    Raises:
        EnvironmentFault: a folder on the way may not be entered.
    """
    if not text:
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except PermissionError as fault:
        raise EnvironmentFault(
            f"{escape(text)}: not accessible ({fault.strerror})", hint="check the folder's permissions"
        ) from None
    except (OSError, RuntimeError, ValueError):  # too long, a loop; no such user; a NUL
        return None
