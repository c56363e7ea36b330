"""How many drafts would be accepted at positions of texts that the target wrote, whatever the drafter is fed.

Many short texts go through the drafter side by side, so that enough positions for a clear answer cost seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

from m27quant.runtime.speculative.proposal import ROOT, Drafter, DraftRequest, Proposal

NOISE = 2.5
"""Standard errors of a mean difference that mean something."""


def accepted_lengths(
    drafter: Drafter,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    taps: Sequence[Tensor],
    *,
    stride: int = 2,
) -> list[int]:
    """Drafts that agree with the texts, position by position.

    Args:
        drafter: without histories of sequences below 0, which are used and forgotten.
        texts: token ids; from its start on, each is what the target chose itself.
        starts: tokens of each text that were not chosen.
        taps: [T, K*D] of each text, as the drafter is to see them.
        stride: every so many positions are asked about.

    Returns:
        One number for each position, text by text in turns; the same positions for the same texts.
    """
    numbers = [-1 - index for index in range(len(texts))]
    known = [0] * len(texts)
    lengths: list[int] = []
    for number in numbers:
        drafter.forget(number)
    longest = max((len(text) - start for text, start in zip(texts, starts, strict=True)), default=0)
    for ahead in range(1, longest, stride):
        requests, asked = [], []
        for index, (text, start) in enumerate(zip(texts, starts, strict=True)):
            end = start + ahead
            if end + drafter.max_depth <= len(text):
                fresh = taps[index][known[index] : end - 1]
                requests.append(DraftRequest(numbers[index], list(text[:end]), fresh, drafter.max_depth))
                asked.append((text, end))
                known[index] = end - 1
        if not requests:
            break
        lengths += [
            agreeing(proposal, text, end)
            for proposal, (text, end) in zip(drafter.propose(requests), asked, strict=True)
        ]
    for number in numbers:
        drafter.forget(number)
    return lengths


def agreeing(proposal: Proposal, text: Sequence[int], end: int) -> int:
    """Length of the proposal's path along the text behind its first `end` tokens."""
    children = {(parent, token): node for node, (token, parent) in enumerate(zip(*proposal, strict=True))}
    node, count = ROOT, 0
    while end + count < len(text) and (child := children.get((node, text[end + count]))) is not None:
        node, count = child, count + 1
    return count


def clearly_longer(longer: Sequence[int], shorter: Sequence[int]) -> bool:
    """Whether the lengths at the same positions are longer by more than noise (a paired test)."""
    differences = [a - b for a, b in zip(longer, shorter, strict=True)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > NOISE * error
