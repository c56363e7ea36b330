"""Which drafted tokens are kept: those that the target chose itself.

At every node of the tree the target's own choice (the argmax, or a draw from its distribution p after penalties,
temperature, top-k, top-p and min-p) is emitted; where a child of the node holds it the walk goes on from there.
A draft d is thus accepted with probability p(d), and what is emitted has distribution p: the rule of Leviathan et
al. (arXiv 2211.17192) for a drafter that proposes with certainty, and z-lab's for DFlash.  As the draws belong to
positions and not to drafts, the text is the same with any drafter and without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from m27quant.runtime.speculative.proposal import ROOT, Proposal


class Accepted(NamedTuple):
    """One or more new tokens: the accepted drafts, then the target's own."""

    tokens: list[int]
    nodes: list[int]
    """Indices into the proposal of the drafts among them: one less than tokens."""


def accept(proposal: Proposal, choices: Sequence[int]) -> Accepted:
    """Walk down the tree along the target's choices.

    Args:
        proposal: n drafted tokens.
        choices: n + 1 tokens that the target chose: behind the last committed token, then behind each draft.
    """
    children = {(parent, token): node for node, (token, parent) in enumerate(zip(*proposal, strict=True))}
    tokens, nodes = [choices[0]], list[int]()
    node = children.get((ROOT, choices[0]))
    while node is not None:
        nodes.append(node)
        tokens.append(choices[1 + node])
        node = children.get((node, choices[1 + node]))
    return Accepted(tokens, nodes)
