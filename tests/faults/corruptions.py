"""What can be wrong with a checkpoint folder: each function takes a good one and breaks one thing.

The folders are those of `tests.checkpoints.write_checkpoint`: three shards and an index.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
"""Lies in `shard_of(folder, EXPERT)`; any expert matrix would do."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
HOSTILE_NAMES = {
    "nul": "model.\x00.weight",
    "parent": "../../etc/passwd",
    "ansi": "\x1b[2J\x1b]0;owned\x07.weight",
    "bidi": "model.\u202eevil\u2066.weight",
    "markup": "[bold red][/x][link=file:///etc/passwd].weight",
    "long": "x" * 10_000,
    "newline": "a\nerror: all is well\r",
    "surrogate": "model.\ud800.weight",
}

Change = Callable[[Path], object]


# -- tools -----------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """The shard files by name."""
    return sorted(folder.glob("*.safetensors"))


def shard_of(folder: Path, name: str) -> Path:
    """The shard that the index gives for a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON object in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def split_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header object, buffer) of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_shard(path: Path, header: dict[str, Any] | bytes, buffer: bytes) -> None:
    """Write a safetensors file from its parts, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + buffer)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a shard's header in place; the buffer stays."""
    header, buffer = split_shard(path)
    change(header)
    join_shard(path, header, buffer)


def edit_tensor(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of one tensor in place; the header keeps every byte."""
    path = shard_of(folder, name)
    header, buffer = split_shard(path)
    begin, end = header[name]["data_offsets"]
    body = bytearray(buffer[begin:end])
    change(body)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - len(buffer) + begin)
        file.write(body)


def add_tensor(folder: Path, name: str, *, shard: int = 0, in_index: bool = True) -> None:
    """Append a small F32 tensor to a shard, with or without an index entry."""
    path = shards(folder)[shard]
    header, buffer = split_shard(path)
    header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(buffer), len(buffer) + 8]}
    join_shard(path, header, buffer + bytes(8))
    if in_index:
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: path.name}))


def add_tensor_named(name: str) -> Change:
    return lambda folder: add_tensor(folder, name)


def drop_tensor(folder: Path, name: str) -> None:
    """Take a tensor out of shard and index."""
    path = shard_of(folder, name)
    header, buffer = split_shard(path)
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [n - (end - begin) for n in entry["data_offsets"]]
    join_shard(path, header, buffer[:begin] + buffer[end:])
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


def put(name: str, data: bytes) -> Change:
    """The file `name` holds `data`."""
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def becomes_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def entry_of_first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the tensor that lies first in the buffer."""
    entries = [e for name, e in header.items() if name != "__metadata__"]
    return min(entries, key=lambda e: e["data_offsets"][0])


# -- shards: rows 1 to 24 --------------------------------------------------------------------------


def empty_shard(folder: Path) -> None:
    shards(folder)[0].write_bytes(b"")


def truncated_by_one(folder: Path) -> None:
    path = shards(folder)[0]
    os.truncate(path, path.stat().st_size - 1)


def truncated_in_header(folder: Path) -> None:
    os.truncate(shards(folder)[0], 100)


def trailing_bytes(folder: Path) -> None:
    with shards(folder)[0].open("ab") as file:
        file.write(b"PK\x03\x04 and more")


def header_length(length: int) -> Change:
    def change(folder: Path) -> None:
        with shards(folder)[0].open("r+b") as file:
            file.write(struct.pack("<Q", length))

    return change


def header_text(text: bytes) -> Change:
    def change(folder: Path) -> None:
        path = shards(folder)[0]
        join_shard(path, text, split_shard(path)[1])

    return change


def overlapping(folder: Path) -> None:
    """Every tensor of the same size as the first lies where the first lies: little file, much memory."""

    def change(header: dict[str, Any]) -> None:
        first = entry_of_first(header)
        for entry in header.values():
            if entry.get("shape") == first["shape"] and entry["dtype"] == first["dtype"]:
                entry["data_offsets"] = list(first["data_offsets"])

    edit_header(shard_of(folder, EXPERT), change)


def hole(folder: Path) -> None:
    path = shards(folder)[0]
    header, buffer = split_shard(path)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]
    join_shard(path, header, bytes(8) + buffer)


def first_entry(**fields: Any) -> Change:
    """Set fields of the first tensor's header entry."""

    def change(folder: Path) -> None:
        edit_header(shards(folder)[0], lambda header: entry_of_first(header).update(fields))

    return change


def odd_f4(folder: Path) -> None:
    path = shards(folder)[0]
    header, buffer = split_shard(path)
    header["odd"] = {"dtype": "F4", "shape": [3], "data_offsets": [len(buffer), len(buffer) + 2]}
    join_shard(path, header, buffer + bytes(2))


def duplicate_key(folder: Path) -> None:
    path = shards(folder)[0]
    header, buffer = split_shard(path)
    name, entry = next((n, e) for n, e in header.items() if n != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    join_shard(path, text.encode(), buffer)


def same_tensor_twice(folder: Path) -> None:
    """A tensor of the first shard lies in the second one too, with other values; the index is right."""
    header, _ = split_shard(shards(folder)[0])
    name = next(n for n in header if n.endswith(".weight"))
    path = shards(folder)[1]
    other, buffer = split_shard(path)
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    other[name] = header[name] | {"data_offsets": [len(buffer), len(buffer) + size]}
    join_shard(path, other, buffer + b"\x7f" * size)


def shard_becomes(make: Callable[[Path], object]) -> Change:
    """The first shard is replaced by what `make` creates at its path."""

    def change(folder: Path) -> None:
        path = shards(folder)[0]
        path.unlink()
        make(path)

    return change


def pickled_only(folder: Path) -> None:
    for path in shards(folder):
        path.unlink()
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


# -- index: rows 25 to 33 --------------------------------------------------------------------------


def missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def without_weights(folder: Path) -> None:
    for path in (*shards(folder), folder / INDEX):
        path.unlink()


def index_text(text: bytes) -> Change:
    return put(INDEX, text)


def weight_map(value: Any) -> Change:
    return index_text(json.dumps({"weight_map": value}).encode())


def mapped_to(shard: str) -> Change:
    """The index maps one tensor to `shard`."""

    def change(folder: Path) -> None:
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: shard}))

    return change


def index_names_absent(name: str) -> Change:
    """The index maps a tensor to a shard that does not hold it."""

    def change(folder: Path) -> None:
        shard = shards(folder)[0].name
        edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: shard}))

    return change


def duplicate_index_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    shard = json.loads(text)["weight_map"][EXPERT]
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{EXPERT}": "{shard}", '))


def huge_index(folder: Path) -> None:
    """1 GB, of which the file system stores nothing."""
    os.truncate(folder / INDEX, 10**9)


def link_leaves(folder: Path) -> None:
    """A shard is a link to a good file beside the folder."""
    path = shards(folder)[0]
    outside = folder.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def single_and_index(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(shards(folder)[0].read_bytes())


# -- config.json: rows 34 to 39 --------------------------------------------------------------------


def config_bytes(data: bytes) -> Change:
    return put("config.json", data)


def config(**fields: Any) -> Change:
    """Set fields of config.json."""

    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda value: value.update(fields))

    return change


def edit_spacing(name: str) -> Change:
    """The same object in other bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n")


def quantization(**fields: Any) -> Change:
    """Set fields of config.json's quantization_config."""

    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda value: value["quantization_config"].update(fields))

    return change


def without_config_key(key: str) -> Change:
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda value: value.pop(key))

    return change


def without_scale(folder: Path) -> None:
    drop_tensor(folder, EXPERT + "_scale_inv")


def scale_shape(folder: Path) -> None:
    """The block scales have one row more than the weight has rows of blocks."""
    name = EXPERT + "_scale_inv"
    drop_tensor(folder, name)
    add_tensor(folder, name)
    edit_header(shard_of(folder, name), lambda header: header[name].update(shape=[2, 1]))


# -- values: rows 74 and 75 ------------------------------------------------------------------------


def fill(name: str, pattern: bytes, *, at: int = 0, count: int = 1) -> Change:
    """Overwrite `count` elements of a tensor, from element `at`, by `pattern`."""

    def change(folder: Path) -> None:
        def overwrite(body: bytearray) -> None:
            begin = at * len(pattern)
            body[begin : begin + count * len(pattern)] = pattern * count

        edit_tensor(folder, name, overwrite)

    return change


def zeroed(name: str) -> Change:
    """All bytes of a tensor are zero."""

    def change(folder: Path) -> None:
        edit_tensor(folder, name, lambda body: body.__setitem__(slice(None), bytes(len(body))))

    return change
