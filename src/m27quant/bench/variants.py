"""A loaded drafter at another setting: the same weights, more or fewer drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m27quant.bench.settings import Setting
from m27quant.checkpoint.drafter_config import parse_drafter
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import UsageError
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter


class _Unheard:
    """Faults of a config are told when the drafter is loaded."""

    def __init__(self) -> None:
        self._codes: set[str] = set()

    def add(self, code: str, message: str, /, *, expected: object = None, found: object = None) -> None:
        self._codes.add(code)

    def codes(self) -> set[str]:
        return self._codes


def check_settings(folder: Path | None, settings: Sequence[Setting]) -> None:
    """Refuse settings that the drafter in `folder` cannot have, before anything long starts; None: prompt lookup.

    Raises:
        UsageError: the first of them.
        CheckpointError: no readable config.json.
    """
    if not settings:
        return
    if folder is None:
        for setting in settings:
            resized(NgramDrafter(), setting)
        return
    config = parse_drafter(read_object(folder / "config.json"), _Unheard())
    if config is None:
        return
    wrong = "tree" if config.kind == "dflash" else "block"
    block = config.section().get("block_size", config.raw.get("block_size"))
    for setting in settings:
        if setting.kind == wrong:
            raise _misfit(setting, "a DFlash drafter" if config.kind == "dflash" else "an EAGLE3 drafter")
        rows = setting.size + 1 if setting.kind == "chain" else setting.size
        if config.kind == "dflash" and isinstance(block, int) and rows > block:
            raise UsageError(
                f"{setting.size} {'drafts' if setting.kind == 'chain' else 'rows'} are more than this drafter's "
                f"block_size {block} allows",
                hint=f"at most --block-size {block}, or --num-draft-tokens {block - 1}",
            )


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
    raise _misfit(setting, f"a {type(drafter).__name__}")


def _misfit(setting: Setting, drafter: str) -> UsageError:
    whose = {
        "block": "--block-size is for DFlash",
        "tree": "--tree is for EAGLE3",
        "chain": "--num-draft-tokens is for DFlash, EAGLE3 and ngram",
    }
    return UsageError(
        f"{whose[setting.kind]}, not for {drafter}", hint="leave it out, or name another drafter"
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
