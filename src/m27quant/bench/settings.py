"""Settings of a drafter that a sweep tries: a block, a chain, a tree; and a loaded drafter put to one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from m27quant.errors import UsageError
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter

MOST = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to draft."""

    kind: Literal["block", "chain", "tree"]
    size: int
    """block: rows, the anchor included; chain: drafts; tree: rows that are verified, the root included."""
    num_steps: int = 0
    topk: int = 0

    @property
    def name(self) -> str:
        if self.kind == "tree":
            return f"tree {self.num_steps}/{self.topk}/{self.size}"
        return f"block {self.size}" if self.kind == "block" else f"{self.size} drafts"


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


def resized(drafter: Drafter, setting: Setting) -> Drafter:
    """Another drafter with the same weights, without history, at this setting.

    Raises:
        UsageError: a setting that this kind of drafter does not have, or beyond what it was made for.
    """
    chain = setting.kind == "chain"
    if isinstance(drafter, DFlashDrafter) and (chain or setting.kind == "block"):
        drafts = setting.size if chain else setting.size - 1
        return DFlashDrafter(
            drafter.settings,
            drafter.weights,
            drafter.taps,
            num_draft_tokens=drafts,
            nbytes=drafter.nbytes,
        )
    if isinstance(drafter, Eagle3Drafter) and setting.kind != "block":
        return Eagle3Drafter(
            drafter.settings,
            drafter.weights,
            drafter.taps,
            num_steps=setting.size if chain else setting.num_steps,
            topk=1 if chain else setting.topk,
            num_draft_tokens=None if chain else setting.size,
            nbytes=drafter.nbytes,
        )
    if isinstance(drafter, NgramDrafter) and chain:
        return NgramDrafter(setting.size, max_ngram=drafter.max_ngram, min_ngram=drafter.min_ngram)
    wanted = {"block": "--block-size is for DFlash", "tree": "--tree is for EAGLE3"}.get(
        setting.kind, "--num-draft-tokens is for DFlash, EAGLE3 and ngram"
    )
    raise UsageError(
        f"{wanted}, not for a {type(drafter).__name__}", hint="leave it out, or name another drafter"
    )


def describe(drafter: Drafter) -> str:
    """A setting's name from the drafter that has it: the same for the same work."""
    if isinstance(drafter, DFlashDrafter):
        return f"block {drafter.num_draft_tokens + 1}"
    if isinstance(drafter, Eagle3Drafter) and drafter.topk > 1:
        return f"tree {drafter.num_steps}/{drafter.topk}/{drafter.num_draft_tokens + 1}"
    if isinstance(drafter, Eagle3Drafter):
        return f"chain {drafter.num_steps}"
    return f"{drafter.num_draft_tokens} drafts"


def run_flags(drafter: Drafter) -> str:
    """What `m27quant run` is told for this setting."""
    if isinstance(drafter, Eagle3Drafter) and drafter.topk > 1:
        rows = drafter.num_draft_tokens + 1
        return f"--num-steps {drafter.num_steps} --eagle-topk {drafter.topk} --num-draft-tokens {rows}"
    if isinstance(drafter, Eagle3Drafter):
        return f"--num-steps {drafter.num_steps} --eagle-topk 1"
    return f"--num-draft-tokens {drafter.num_draft_tokens}"
