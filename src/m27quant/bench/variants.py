"""A loaded drafter at another setting: the same weights, more or fewer drafts."""

from __future__ import annotations

from m27quant.bench.settings import Setting
from m27quant.errors import UsageError
from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import Drafter


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
