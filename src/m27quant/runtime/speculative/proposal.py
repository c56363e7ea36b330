"""What a drafter is to the engine: it is asked for tokens that may come next, and answers with a chain or a tree.

A drafter changes how fast tokens come, never which: the engine emits what the target chooses (`acceptance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

ROOT = -1
"""Parent of the first drafted tokens: the last committed token."""


class Proposal(NamedTuple):
    """A tree of drafted tokens, parents before their children, no two children of one parent alike.

    A chain has parents [-1, 0, 1, ...].
    """

    tokens: list[int]
    parents: list[int]
    """Index of the token each one follows, or `ROOT`."""


NOTHING = Proposal([], [])


def chain(tokens: Sequence[int]) -> Proposal:
    """A proposal without branches."""
    return Proposal(list(tokens), list(range(ROOT, len(tokens) - 1)))


def check_proposal(proposal: Proposal, max_tokens: int, vocab_size: int) -> None:
    """Raise `ValueError` where a drafter returns what is no proposal: a fault of its code."""
    tokens, parents = proposal
    if len(tokens) != len(parents) or len(tokens) > max_tokens:
        raise ValueError(
            f"{len(tokens)} drafts with {len(parents)} parents, at most {max_tokens} were asked for"
        )
    if any(not ROOT <= parent < node for node, parent in enumerate(parents)):
        raise ValueError(f"a parent has to come before its child: {parents}")
    if any(not 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"drafts must be tokens from 0 to {vocab_size - 1}: {tokens}")


class DraftRequest(NamedTuple):
    """One sequence that wants drafts."""

    sequence: int
    """Its number, until `forget`."""
    tokens: list[int]
    """All n committed ids, prompt and output; the last one has not been through the target yet."""
    taps: Tensor | None
    """[m, K*D]: the target's hidden states of the positions that were committed since the last call for this
    sequence, K taps of D features side by side in the drafter's order.  Over all calls they cover positions
    0 to n - 2, each once.  None for a drafter without taps."""
    max_tokens: int
    """The most tokens that are of use: their number and, more so, their depth."""


class Drafter(Protocol):
    """Anything that guesses tokens."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Which hidden states it needs: 0 = embeddings, j = the residual stream behind layer j - 1, un-normed."""

    @property
    def num_draft_tokens(self) -> int:
        """The most tokens that a proposal holds."""

    @property
    def max_depth(self) -> int:
        """The longest path of a proposal; equals `num_draft_tokens` for chains."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """One proposal for each request, in their order; it may be empty."""

    def forget(self, sequence: int) -> None:
        """The sequence ended or lost its cache: the next call for it brings taps from position 0 on."""
