"""Files, headers and index: is every tensor where it is said to be, once, and whole?"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m27quant.checkpoint.header import TensorInfo, parse_entry, read_header_bytes
from m27quant.checkpoint.source import INDEX, SINGLE, check_link_stays_inside, check_stays_inside
from m27quant.checkpoint.strict_json import (
    LFS_PREFIX,
    MAX_INDEX_BYTES,
    parse,
    read_bytes,
    require_regular_file,
)
from m27quant.errors import CheckpointError, EnvironmentFault, escape
from m27quant.verify.collect import Findings
from m27quant.verify.view import View

POINTER_BYTES = 1024
"""git-lfs pointers are shorter."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LEFT_OVERS = (".tmp", ".part", ".partial", ".incomplete", ".lock", "~")
SUFFIX = ".safetensors"


@dataclass(slots=True)
class _Shard:
    """A shard's header as far as it can be read."""

    size: int
    entries: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Index:
    weight_map: dict[str, str]
    total_size: object


def read_container(folder: Path, found: Findings) -> View:
    """Read names, headers and index of a checkpoint folder, reporting all faults.

    Raises:
        CheckpointError: no folder, or nothing in it that could be a checkpoint.
        EnvironmentFault: the folder or a file in it cannot be read by this user.
    """
    view = View(folder)
    files = _list(folder)
    _check_files(folder, files, view, found)
    shards = sorted(name for name in files if name.endswith(SUFFIX))
    if not shards and INDEX not in files:
        raise CheckpointError(
            f"{escape(folder)}: no weights ({INDEX} or {SINGLE})", hint="name a checkpoint's folder"
        )
    index = _read_index(folder, view, found) if INDEX in files else None
    if INDEX not in files and len(shards) > 1:
        found.add("M27-C019", f"{len(shards)} shards, but no {INDEX}", file=INDEX)
    listed = shards if index is None else _listed(index, shards, view, found)
    headers = {
        name: shard for name in listed if (shard := _read_shard(folder, name, view, found)) is not None
    }
    view.shard_sizes = {name: shard.size for name, shard in headers.items()}
    if index is None:
        view.tensors = _all_tensors(headers, found)
    else:
        _place_tensors(view, index, headers, found)
    return view


def _list(folder: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except FileNotFoundError:
        raise CheckpointError(f"{escape(folder)}: no such folder", hint="check the path") from None
    except NotADirectoryError:
        raise CheckpointError(
            f"{escape(folder)}: not a folder", hint="name the checkpoint's folder"
        ) from None
    except OSError as fault:
        raise EnvironmentFault(
            f"{escape(folder)}: cannot be listed ({fault.strerror})", hint="check its permissions"
        ) from None


def _check_files(folder: Path, files: dict[str, os.DirEntry[str]], view: View, found: Findings) -> None:
    """Pointers, left-overs, pickles and modes of all files."""
    for name, entry in sorted(files.items()):
        if name.endswith(PICKLES) or name.endswith(LEFT_OVERS) or ".tmp" in name:
            found.add("M27-C014", f"{escape(name)}: a left-over or pickled file", file=name)
        try:
            check_link_stays_inside(folder, folder / name)
            info = entry.stat()
        except CheckpointError as fault:
            view.refused.add(name)
            found.add("M27-C016", _without_folder(fault.message, folder), file=name)
            continue
        except OSError:
            continue  # a broken link: reported where somebody needs the file
        if not stat.S_ISREG(info.st_mode):
            continue
        if info.st_size < POINTER_BYTES and _is_pointer(folder / name):
            view.refused.add(name)
            found.add("M27-C002", f"{escape(name)}: a git-lfs pointer, not the file itself", file=name)
        if os.name == "posix" and name.endswith((SUFFIX, ".json")) and info.st_mode & 0o044 != 0o044:
            mode = f"{info.st_mode & 0o777:04o}"
            found.add(
                "M27-C017", f"{escape(name)} has mode {mode}: only its owner can serve it",
                file=name, expected="0644", found=mode,
            )  # fmt: skip


def _is_pointer(path: Path) -> bool:
    try:
        return path.read_bytes().startswith(LFS_PREFIX)
    except OSError:
        return False  # who needs the file says so


# -- the index -------------------------------------------------------------------------------------


def _read_index(folder: Path, view: View, found: Findings) -> _Index | None:
    """The index, or None where the index is of no use (reported)."""
    if INDEX in view.refused:
        return None
    repeated: list[str] = []
    try:
        value = parse(read_bytes(folder / INDEX, MAX_INDEX_BYTES), INDEX, repeated=repeated)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX}: weight_map is missing, empty or not an object")
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CheckpointError(f"{INDEX}: weight_map['{escape(name)}'] is not a file name")
    except CheckpointError as fault:
        found.add("M27-C018", fault.message, file=INDEX)
        return None
    for name in repeated:
        found.add("M27-C018", f"{INDEX}: key '{escape(name)}' appears twice", file=INDEX, tensor=name)
    metadata = value.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Index(weight_map, total)


def _listed(index: _Index, shards: list[str], view: View, found: Findings) -> list[str]:
    """The index's shards that may be opened and are there; what else lies in the folder is reported."""
    named = set(index.weight_map.values())
    first = {shard: name for name, shard in reversed(index.weight_map.items())}
    usable = []
    for shard in sorted(named):
        if shard in view.refused:
            continue
        try:
            check_stays_inside(view.folder, shard)
        except CheckpointError as fault:
            found.add("M27-C015", fault.message, file=shard, tensor=first[shard])
            continue
        if os.path.lexists(view.folder / shard):
            usable.append(shard)
        else:
            found.add(
                "M27-C010", f"{escape(shard)} is not in the folder; the index places '{escape(first[shard])}' there",
                file=shard,
            )  # fmt: skip
    for shard in shards:
        if shard in named:
            continue
        if shard == SINGLE:
            found.add("M27-C021", f"{SINGLE} lies beside an index that does not mention it", file=SINGLE)
        else:
            found.add("M27-C013", f"{escape(shard)} is not named by the index", file=shard)
    return usable


# -- headers ---------------------------------------------------------------------------------------


def _read_shard(folder: Path, name: str, view: View, found: Findings) -> _Shard | None:
    """A shard's header with all its faults reported; None where nothing of it can be read."""
    path, shown = folder / name, escape(name)
    if name in view.refused:
        return None
    try:
        require_regular_file(path)
    except CheckpointError:
        found.add("M27-C022", f"{shown}: not a regular file", file=name)
        return None
    try:
        raw, info = read_header_bytes(path)
        repeated: list[str] = []
        header = parse(raw, f"{shown}: header", repeated=repeated)
        if not isinstance(header, dict):
            raise CheckpointError(f"{shown}: the header is not a JSON object")
    except CheckpointError as fault:
        found.add("M27-C001", _without_folder(fault.message, folder), file=name)
        return None
    for key in repeated:
        found.add("M27-C008", f"{shown}: '{escape(key)}' appears twice in the header", file=name, tensor=key)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        found.add("M27-C003", f"{shown}: __metadata__ does not map strings to strings", file=name)
    shard = _Shard(info.st_size, _entries(path, header, 8 + len(raw), found))
    if len(shard.entries) == len(header):
        _check_coverage(name, shard, 8 + len(raw), found)
    return shard


def _entries(path: Path, header: dict[str, Any], begin: int, found: Findings) -> dict[str, TensorInfo]:
    entries = {}
    for tensor, entry in header.items():
        try:
            entries[tensor] = parse_entry(path, tensor, entry, begin)
        except CheckpointError as fault:
            found.add("M27-C003", _without_folder(fault.message, path.parent), file=path.name, tensor=tensor)
    return entries


def _without_folder(message: str, folder: Path) -> str:
    return message.replace(f"{escape(folder)}{os.sep}", "", 1)


def _check_coverage(name: str, shard: _Shard, begin: int, found: Findings) -> None:
    """The tensors must tile the buffer from its first byte to the file's last."""
    at, shown = begin, escape(name)
    for tensor in sorted(shard.entries.values(), key=lambda t: (t.start, t.end)):
        if tensor.start < at:
            found.add(
                "M27-C004", f"{shown}: '{escape(tensor.name)}' overlaps the tensor before it",
                file=name, tensor=tensor.name,
            )  # fmt: skip
        elif tensor.start > at:
            found.add(
                "M27-C005", f"{shown}: a hole of {tensor.start - at:,} bytes before '{escape(tensor.name)}'",
                file=name, tensor=tensor.name,
            )  # fmt: skip
        at = max(at, tensor.end)
    if at > shard.size:
        cut = next(t.name for t in sorted(shard.entries.values(), key=lambda t: t.end) if t.end > shard.size)
        found.add(
            "M27-C006", f"{shown}: {shard.size:,} bytes, cut off within '{escape(cut)}'; {at:,} are needed",
            file=name, tensor=cut, expected=f"{at:,} bytes", found=f"{shard.size:,} bytes",
        )  # fmt: skip
    elif at < shard.size:
        found.add(
            "M27-C007", f"{shown}: {shard.size - at:,} bytes behind the last tensor",
            file=name, expected=f"{at:,} bytes", found=f"{shard.size:,} bytes",
        )  # fmt: skip


# -- index against headers -------------------------------------------------------------------------


def _all_tensors(headers: dict[str, _Shard], found: Findings) -> dict[str, TensorInfo]:
    """Without an index: whatever the shards hold, the last one winning as in the engines."""
    tensors: dict[str, TensorInfo] = {}
    for name, shard in headers.items():
        for tensor in tensors.keys() & shard.entries.keys():
            _report_twice(tensor, tensors[tensor].path.name, name, found)
        tensors |= shard.entries
    return tensors


def _place_tensors(view: View, index: _Index, headers: dict[str, _Shard], found: Findings) -> None:
    """Every name of the index in its shard, every tensor of a shard in the index, each name once."""
    weight_map = index.weight_map
    total = 0
    for shard, header in headers.items():
        for tensor, info in header.entries.items():
            total += info.nbytes
            home = weight_map.get(tensor)
            if home == shard:
                view.tensors[tensor] = info
            elif home is None:
                view.tensors.setdefault(tensor, info)
                found.add(
                    "M27-C012", f"'{escape(tensor)}' lies in {escape(shard)}, but the index does not name it",
                    file=shard, tensor=tensor,
                )  # fmt: skip
            elif home in headers and tensor in headers[home].entries:
                _report_twice(tensor, home, shard, found)
    lying = "M27-C003" in found.codes()
    for tensor, shard in weight_map.items():
        if tensor in view.tensors:
            continue
        view.lost.add(tensor)
        if shard in headers and not lying:
            found.add(
                "M27-C011", f"the index places '{escape(tensor)}' in {escape(shard)}, which does not hold it",
                file=shard, tensor=tensor,
            )  # fmt: skip
    if not view.lost and not found.codes() & {"M27-C009", "M27-C012"} and index.total_size != total:
        found.add(
            "M27-C020",
            f"{INDEX}: total_size is {escape(index.total_size)}, the tensors have {total:,} bytes",
            file=INDEX, expected=total, found=index.total_size,
        )  # fmt: skip


def _report_twice(tensor: str, home: str, other: str, found: Findings) -> None:
    found.add(
        "M27-C009", f"'{escape(tensor)}' lies in {escape(home)} and in {escape(other)} too",
        file=other, tensor=tensor,
    )  # fmt: skip
