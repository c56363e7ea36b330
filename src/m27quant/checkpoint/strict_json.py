"""JSON from files that may be hostile: bounded, no duplicate keys, no NaN, every fault a `CheckpointError`."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from m27quant.errors import CheckpointError, EnvironmentFault, escape

MAX_INDEX_BYTES = 256 * 2**20
"""An index of M2.7 in NVFP4 has 20 MB; ten times that is not an index any more."""
MAX_CONFIG_BYTES = 16 * 2**20
LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
DAMAGED = "correct the file, or download it again"


def require_regular_file(path: Path) -> os.stat_result:
    """Stat `path`, refusing what is not a regular readable file (directory, fifo, device, broken link).

    Raises:
        CheckpointError: missing, dangling or not a regular file.
        EnvironmentFault: no permission.
    """
    shown = escape(path)
    try:
        info = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file", hint="download it too") from None
    except PermissionError as fault:
        raise EnvironmentFault(
            f"{shown}: not accessible ({fault.strerror})", hint="check the folder's permissions"
        ) from None
    except OSError as fault:
        raise CheckpointError(f"{shown}: cannot be opened ({fault.strerror})", hint=DAMAGED) from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{shown}: not a regular file", hint="put the file itself in its place")
    return info


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a regular file that has at most `limit` of them."""
    info = require_regular_file(path)
    if info.st_size > limit:
        raise CheckpointError(
            f"{escape(path)}: {info.st_size:,} bytes, more than the {limit:,} allowed here", hint=DAMAGED
        )
    try:
        return path.read_bytes()
    except PermissionError:
        mode = stat.filemode(info.st_mode)
        raise EnvironmentFault(
            f"{escape(path)}: permission denied (mode {mode})", hint=f"chmod u+r '{escape(path)}'"
        ) from None
    except OSError as fault:
        raise EnvironmentFault(
            f"{escape(path)}: cannot be read ({fault.strerror})", hint="check the disk or the network mount"
        ) from None


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Raise when `head` is the beginning of a git-LFS pointer file."""
    if head.startswith(LFS_PREFIX):
        raise CheckpointError(
            f"{escape(path)}: a git-lfs pointer, not the file itself",
            hint="run `git lfs pull` in the folder, or download it with `hf download`",
        )


def parse(text: bytes, where: str, *, repeated: list[str] | None = None) -> Any:
    """Parse JSON strictly; with a list for them, keys that appear twice are noted there and the last one counts.

    Raises:
        CheckpointError: not UTF-8, a byte-order mark, a syntax error (with line and column), NaN,
            Infinity or a number beyond F64, a key that appears twice in one object, nesting too deep.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen and repeated is not None:
                    repeated.append(key)
                elif key in seen:
                    raise CheckpointError(
                        f"{where}: key '{escape(key)}' appears twice in one object", hint=DAMAGED
                    )
                seen.add(key)
        return result

    def finite(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise CheckpointError(f"{where}: {escape(digits)} is no finite number", hint=DAMAGED)
        return value

    def no_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: {name} is not JSON", hint=DAMAGED)

    if text.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(f"{where}: begins with a byte-order mark", hint="save it as plain UTF-8")
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_float=finite,
            parse_constant=no_constant,
        )
    except UnicodeDecodeError as fault:
        raise CheckpointError(f"{where}: not UTF-8 at byte {fault.start}", hint=DAMAGED) from None
    except json.JSONDecodeError as fault:
        raise CheckpointError(
            f"{where}: not valid JSON at line {fault.lineno}, column {fault.colno}: {fault.msg}", hint=DAMAGED
        ) from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply", hint=DAMAGED) from None
    except ValueError as fault:  # an integer of more digits than Python converts
        raise CheckpointError(f"{where}: {escape(fault)}", hint=DAMAGED) from None


def read_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in the file at `path`; anything else raises `CheckpointError`."""
    data = read_bytes(path, limit)
    refuse_lfs_pointer(path, data)
    value = parse(data, escape(path))
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{escape(path)}: expected a JSON object, found {type(value).__name__}", hint=DAMAGED
        )
    return value
