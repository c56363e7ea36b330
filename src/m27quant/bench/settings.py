"""Settings of a drafter that a sweep tries: a block, a chain, a tree.  Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MOST = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to draft."""

    kind: Literal["block", "chain", "tree"]
    size: int
    """block: rows, the anchor included; chain: drafts; tree: rows that are verified, the root included."""
    num_steps: int = 0
    topk: int = 0


def parse_blocks(text: str) -> tuple[Setting, ...]:
    """`4,8,16`: DFlash blocks, the anchor included; raises `ValueError`."""
    return _listed(text, lambda part: Setting("block", _number(part, 2)), "4,8,16")


def parse_chains(text: str) -> tuple[Setting, ...]:
    """`1,3,7`: drafts one after another; raises `ValueError`."""
    return _listed(text, lambda part: Setting("chain", _number(part, 1)), "1,3,7")


def parse_trees(text: str) -> tuple[Setting, ...]:
    """`3/4/8,5/8/32`: steps, branches, rows verified, as SGLang's three flags; raises `ValueError`."""

    def tree(part: str) -> Setting:
        numbers = part.split("/")
        if len(numbers) != 3:
            raise ValueError(f"{part!r} is not STEPS/TOPK/ROWS")
        steps, topk, rows = (_number(n, 1) for n in numbers)
        return Setting("tree", rows, steps, topk)

    return _listed(text, tree, "3/4/8,5/4/16")


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,32`: whole numbers of at least 1; raises `ValueError`."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text.replace(" ", ""), re.ASCII):
        raise ValueError(f"{text!r} are no whole numbers; write 1,32")
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise ValueError(f"{text!r}: each has to be at least 1")
    return found


def _listed(text: str, one: Callable[[str], Setting], example: str) -> tuple[Setting, ...]:
    try:
        found = tuple(one(part.strip()) for part in text.split(","))
    except ValueError as fault:
        raise ValueError(f"{fault}; write {example}") from None
    if len(set(found)) != len(found):
        raise ValueError(f"{text!r} names a setting twice")
    return found


def _number(text: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII) or not least <= int(text) <= MOST:
        raise ValueError(f"{text!r} is no number from {least} to {MOST}")
    return int(text)
