"""Changes to a quantized checkpoint: each function makes one that breaks one thing, named tensors and all.

The folders are those that `m27quant quantize` writes from `tests.verify.conftest.SMALL` with its KV scales.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.faults import corruptions as c
from tests.faults.corruptions import INDEX, Change

LAYER = "model.layers.1"
W2 = f"{LAYER}.block_sparse_moe.experts.2.w2"
W3 = f"{LAYER}.block_sparse_moe.experts.2.w3"
GATE = f"{LAYER}.block_sparse_moe.gate.weight"
BIAS = f"{LAYER}.block_sparse_moe.e_score_correction_bias"
QUERY = f"{LAYER}.self_attn.q_proj.weight"
NORM = f"{LAYER}.input_layernorm.weight"
K_SCALE = f"{LAYER}.self_attn.k_proj.k_scale"
V_SCALE = f"{LAYER}.self_attn.v_proj.v_scale"
FALLBACK = 0.5 / 2688
NAN = float("nan")


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, as the index has it."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def edit_tensors(
    folder: Path, change: Callable[[str, dict[str, Any], bytes], list[tuple[str, str, list[int], bytes]]]
) -> None:
    """Write all shards again; `change` gives for each tensor what stands in its place (name, dtype, shape, bytes)."""
    placed = {}
    total = 0
    for path in c.shards(folder):
        header, buffer = c.split_shard(path)
        fresh: dict[str, Any] = {"__metadata__": header.pop("__metadata__")}
        parts = []
        at = 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            for new, dtype, shape, data in change(name, entry, buffer[begin:end]):
                fresh[new] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
                placed[new] = path.name
                parts.append(data)
                at += len(data)
        total += at
        c.join_shard(path, fresh, b"".join(parts))
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))


def dropped(*patterns: str) -> Change:
    """Tensors whose names match are gone from shards and index."""

    def change(folder: Path) -> None:
        gone = [re.compile(p) for p in patterns]
        edit_tensors(
            folder,
            lambda name, e, data: (
                [] if any(p.fullmatch(name) for p in gone) else [(name, e["dtype"], e["shape"], data)]
            ),
        )

    return change


def without(name: str) -> Change:
    return dropped(re.escape(name))


def renamed(pattern: str, replacement: str) -> Change:
    def change(folder: Path) -> None:
        edit_tensors(
            folder,
            lambda name, e, data: [(re.sub(pattern, replacement, name), e["dtype"], e["shape"], data)],
        )

    return change


def replaced(
    pattern: str, dtype: str, shape: Callable[[list[int]], list[int]], data: Callable[[bytes], bytes]
) -> Change:
    """Tensors whose names match get another type, shape and content."""

    def change(folder: Path) -> None:
        def one(name: str, e: dict[str, Any], body: bytes) -> list[tuple[str, str, list[int], bytes]]:
            if re.fullmatch(pattern, name):
                return [(name, dtype, shape(e["shape"]), data(body))]
            return [(name, e["dtype"], e["shape"], body)]

        edit_tensors(folder, one)

    return change


def added(
    name: str, *, beside: str = NORM, dtype: str = "F32", shape: Iterable[int] = (2,), data: bytes = bytes(8)
) -> Change:
    """One more tensor, in the shard of `beside` and in the index."""

    def change(folder: Path) -> None:
        def one(old: str, e: dict[str, Any], body: bytes) -> list[tuple[str, str, list[int], bytes]]:
            more = [(name, dtype, list(shape), data)] if old == beside else []
            return [(old, e["dtype"], e["shape"], body), *more]

        edit_tensors(folder, one)

    return change


def number(name: str, value: float) -> Change:
    """A scalar F32 tensor has this value."""
    return c.fill(name, struct.pack("<f", value))


def numbers(pattern: str, value: float) -> Change:
    """All scalar tensors whose names match have this value."""
    return replaced(pattern, "F32", lambda shape: shape, lambda body: struct.pack("<f", value))


def times(name: str, factor: float) -> Change:
    def change(folder: Path) -> None:
        def overwrite(body: bytearray) -> None:
            body[:] = struct.pack("<f", struct.unpack("<f", body)[0] * factor)

        c.edit_tensor(folder, name, overwrite)

    return change


def both(*changes: Change) -> Change:
    """One fault that takes several steps to make."""

    def change(folder: Path) -> None:
        for step in changes:
            step(folder)

    return change


def json_field(file: str, *path: str, value: Any) -> Change:
    """A field of a JSON file, by its path, has this value; it goes away where the value is `...`."""

    def change(folder: Path) -> None:
        def set_field(root: dict[str, Any]) -> None:
            for key in path[:-1]:
                root = root[key]
            if value is ...:
                del root[path[-1]]
            else:
                root[path[-1]] = value

        c.edit_json(folder / file, set_field)

    return change


def config(*path: str, value: Any) -> Change:
    return json_field("config.json", *path, value=value)


def section(*path: str, value: Any) -> Change:
    return config("quantization_config", *path, value=value)


def hf(*path: str, value: Any) -> Change:
    return json_field("hf_quant_config.json", *path, value=value)


def excluding(edit: Callable[[list[str]], list[str]]) -> Change:
    """Both exclude lists are changed in the same way."""

    def change(folder: Path) -> None:
        patterns = edit(json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"])
        section("ignore", value=patterns)(folder)
        hf("quantization", "exclude_modules", value=patterns)(folder)

    return change


def moved_in_index(folder: Path) -> None:
    """The index gives another shard for W2's weight."""
    placed = weight_map(folder)
    other = next(shard for shard in placed.values() if shard != placed[f"{W2}.weight"])
    c.edit_json(folder / INDEX, lambda index: index["weight_map"].update({f"{W2}.weight": other}))


def forgotten_in_index(folder: Path) -> None:
    c.edit_json(folder / INDEX, lambda index: index["weight_map"].pop(f"{W2}.weight"))


def outside(path: str) -> Change:
    """The index gives a path for W2's weight."""

    def change(folder: Path) -> None:
        c.edit_json(folder / INDEX, lambda index: index["weight_map"].update({f"{W2}.weight": path}))

    return change


def link_out(name: str) -> Change:
    """A file is a link to a good one beside the folder."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def pointer(name: str) -> Change:
    return c.put(name, c.LFS_POINTER)


def swizzled(body: bytes) -> bytes:
    """As many bytes as a kernel's layout of [48, 2] block scales has: 128 x 4."""
    return body + b"\x38" * (512 - len(body))


def zero_scale(folder: Path) -> None:
    """The second block scale is zero; its codes are not."""
    c.fill(f"{W2}.weight", b"\x21", at=8, count=8)(folder)
    c.fill(f"{W2}.weight_scale", b"\x00", at=1)(folder)


def special_token_lost(folder: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != "<minimax:tool_call>"]
        value["model"]["vocab"].pop("<minimax:tool_call>", None)

    c.edit_json(folder / "tokenizer.json", change)


def token_beyond(folder: Path) -> None:
    c.edit_json(
        folder / "tokenizer.json",
        lambda value: value["added_tokens"].append(
            value["added_tokens"][0] | {"id": 2048, "content": "<new>"}
        ),
    )


def as_bf16(body: bytes) -> bytes:
    """F32 cut to BF16."""
    return b"".join(body[i + 2 : i + 4] for i in range(0, len(body), 4))


def as_f32(body: bytes) -> bytes:
    """BF16 widened to F32."""
    return b"".join(b"\0\0" + body[i : i + 2] for i in range(0, len(body), 2))


def same(value: Any) -> Any:
    return value
