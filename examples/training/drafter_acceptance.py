"""How many drafts a target would accept, from its finished greedy text: every anchor is tried, then steps are walked.

Exact for greedy decoding, because what a drafter sees at an anchor is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Acceptance:
    """tau: tokens a step, the target's own included; c_k: share of steps whose first k drafts are all accepted."""

    tau: float
    c_k: tuple[float, ...]


def walk(accepted_BT: Tensor, prompt_len: int, num_drafts: int) -> Acceptance:
    """Steps begin after the first token; those count whose drafts all lie within the text."""
    histogram = torch.zeros(num_drafts + 1)
    for row in accepted_BT.tolist():
        at = prompt_len
        while at + num_drafts < len(row):
            histogram[row[at]] += 1
            at += row[at] + 1
    c = histogram.flip(0).cumsum(0).flip(0)[1:] / histogram.sum()
    return Acceptance(1 + c.sum().item(), tuple(c.tolist()))


def ngram_accepted(
    ids_BT: Tensor, prompt_len: int, num_drafts: int, max_n: int = 3, min_n: int = 1
) -> Tensor:
    """Prompt lookup: what followed the latest earlier occurrence of the longest suffix, [B, T] as above."""
    result = torch.zeros_like(ids_BT)
    for row, ids in enumerate(ids_BT.tolist()):
        for at in range(prompt_len, len(ids) - num_drafts):
            drafts = lookup(ids[: at + 1], num_drafts, max_n, min_n)
            text = ids[at + 1 : at + 1 + len(drafts)]
            hits = [a == b for a, b in zip(drafts, text, strict=True)]
            result[row, at] = hits.index(False) if False in hits else len(hits)
    return result


def lookup(ids: list[int], num_drafts: int, max_n: int, min_n: int) -> list[int]:
    for n in range(min(max_n, len(ids) - 1), min_n - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                return ids[start + n : start + n + num_drafts]
    return []
