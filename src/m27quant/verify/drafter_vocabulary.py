"""A drafter's vocabulary beside its target's: rows, the head, and the tables between the two sets of ids."""

from __future__ import annotations

import sys
from array import array

from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.drafter_config import DrafterConfig
from m27quant.checkpoint.drafter_weights import read_bytes_of
from m27quant.checkpoint.header import TensorInfo
from m27quant.errors import escape
from m27quant.verify.collect import Findings

INTEGERS = {"I64": "q", "I32": "i"}
"""Type of d2t -> its letter for `array`."""


def check_vocabulary(
    c: DrafterConfig, target: M2Config, tensors: dict[str, TensorInfo], found: Findings, *, values: bool
) -> None:
    """Sizes of vocabularies, the head, and d2t and t2d; what the two tables hold only with `values`."""
    rows = target.vocab_size
    if c.vocab_size > rows or c.draft_vocab_size > rows:
        found.add(
            "M27-R010", f"drafter: {max(c.vocab_size, c.draft_vocab_size):,} tokens, the target has {rows:,}",
            expected=rows, found=max(c.vocab_size, c.draft_vocab_size),
        )  # fmt: skip
        return
    reduced = c.draft_vocab_size < c.vocab_size
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight")
    if embedding is not None and embedding.shape[:1] and embedding.shape[0] < rows:
        found.add(
            "M27-R010", f"drafter: its embedding has {embedding.shape[0]:,} rows, the target {rows:,} tokens",
            expected=rows, found=embedding.shape[0],
        )  # fmt: skip
    if head is None and (reduced or c.kind == "eagle3"):
        found.add(
            "M27-R025", "drafter: 'lm_head.weight' is missing", expected=[c.draft_vocab_size, c.hidden_size]
        )
    elif head is not None and head.shape != (c.draft_vocab_size, c.hidden_size):
        wrong_shape(head, "lm_head.weight", (c.draft_vocab_size, c.hidden_size), found)
    own = [n for n, info in (("lm_head", head), ("embed_tokens", embedding)) if info is not None]
    if "embed_tokens" in own or (own and not reduced and c.kind == "dflash"):
        found.add("M27-R026", f"drafter: it brings its own {' and '.join(own)}")
    if reduced and "d2t" not in tensors:
        found.add(
            "M27-R011", f"drafter: {c.draft_vocab_size:,} of {rows:,} tokens, but no d2t", expected="d2t"
        )  # fmt: skip
    _check_tables(c, rows, tensors, found, values=values)


def _check_tables(
    c: DrafterConfig, rows: int, tensors: dict[str, TensorInfo], found: Findings, *, values: bool
) -> None:
    """d2t: I64 [draft_vocab], offsets; t2d: BOOL [vocab], the tokens that d2t leads to."""
    good = {}
    for name, shape, dtypes in (
        ("d2t", (c.draft_vocab_size,), tuple(INTEGERS)),
        ("t2d", (c.vocab_size,), ("BOOL",)),
    ):
        info = tensors.get(name)
        if info is not None and (info.shape != shape or info.dtype not in dtypes):
            found.add(
                "M27-R012", f"drafter: '{name}' is {info.dtype} {escape(list(info.shape))}, "
                f"expected {dtypes[0]} {list(shape)}", expected=list(shape), found=list(info.shape),
            )  # fmt: skip
        elif info is not None:
            good[name] = info
    if not values or "d2t" not in good:
        return
    offsets = _integers(good["d2t"])
    tokens = _check_d2t(offsets, rows, found)
    if tokens is not None and "t2d" in good:
        marked = {i for i, byte in enumerate(_read(good["t2d"])) if byte}
        if marked == set(offsets) != tokens:
            found.add("M27-R013", "drafter: d2t: it looks like ids instead of offsets: t2d marks just these")
        elif marked != tokens:
            one = min(marked ^ tokens)
            found.add(
                "M27-R014", f"drafter: t2d and d2t disagree on {len(marked ^ tokens):,} tokens, first {one}",
                expected=f"{len(tokens)} tokens", found=f"{len(marked)} tokens",
            )  # fmt: skip


def _check_d2t(offsets: list[int], rows: int, found: Findings) -> set[int] | None:
    """The tokens that the drafter knows, or None where they are no tokens."""
    tokens = [row + offset for row, offset in enumerate(offsets)]
    outside = [row for row, token in enumerate(tokens) if not 0 <= token < rows]
    if not outside and len(set(tokens)) == len(tokens):
        return set(tokens)
    ids = len(set(offsets)) == len(offsets) and all(0 <= offset < rows for offset in offsets)
    looks = "; it looks like ids instead of offsets" if ids and len(offsets) > 1 else ""
    if outside:
        row = outside[0]
        what = f"row {row} leads to token {tokens[row]} of {rows:,} ({len(outside):,} such rows)"
    else:
        what = f"{len(tokens) - len(set(tokens)):,} rows lead to a token that another row has"
    found.add("M27-R013", f"drafter: d2t: {what}{looks}", expected=f"0 to {rows - 1}")
    return None


def _integers(info: TensorInfo) -> list[int]:
    numbers = array(INTEGERS[info.dtype])
    numbers.frombytes(_read(info))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _read(info: TensorInfo) -> bytes:
    """The tensor's bytes; at most 128 MiB, as config.json's sizes are bounded and were compared with its shape."""
    buffer = bytearray(info.nbytes)
    read_bytes_of(info, memoryview(buffer))
    return bytes(buffer)


def wrong_shape(info: TensorInfo, name: str, shape: tuple[int, ...], found: Findings) -> None:
    """Report a tensor that is not of the shape that config.json implies."""
    found.add(
        "M27-R007", f"drafter: '{name}' has shape {escape(list(info.shape))}, expected {list(shape)}",
        expected=list(shape), found=list(info.shape),
    )  # fmt: skip
