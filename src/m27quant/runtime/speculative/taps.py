"""Which hidden states of the target a drafter reads: by its config's convention, by order, or by measurement.

Layouts count differently: some ids are layers (hidden state = id + 1), some are hidden states already.  A drafter that
is off by one still drafts, only worse, so what was taken is always stated, and can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from m27quant.checkpoint.drafter_config import Taps
from m27quant.errors import CheckpointError
from m27quant.runtime.speculative.proposal import Drafter, DraftRequest

TapOffset = Literal["auto", 0, 1]
NOISE = 2.0
"""Standard errors of a difference that mean something."""


@dataclass(frozen=True, slots=True)
class TapChoice:
    """Hidden states to capture, and why these."""

    hidden_states: tuple[int, ...]
    offset: int
    """What was added to each id."""
    statement: str
    agreement: dict[int, float] = field(default_factory=dict)
    """Offset -> share of positions at which the first draft was the target's choice, where that was measured."""


def stated_ids(taps: Taps) -> tuple[int, ...]:
    """The ids as config.json has them; engines' defaults, which are hidden states, where it has none."""
    return taps.ids or taps.captured


def choose_taps(taps: Taps, num_layers: int, offset: Literal[0, 1] | None = None) -> TapChoice:
    """By the config's convention, or with a given offset.

    Raises:
        CheckpointError: a tap beyond the target's layers.
    """
    ids = stated_ids(taps)
    shown = (
        f"drafter taps {list(ids)} ({taps.convention})" if taps.ids else f"drafter taps: {taps.convention}"
    )
    added: int = taps.captured[0] - ids[0] if offset is None else offset
    reason = "by the config's convention" if offset is None else f"--drafter-tap-offset {offset}"
    states = tuple(i + added for i in ids)
    check_range(states, num_layers)
    return TapChoice(states, added, f"{shown}: hidden states {list(states)}, {reason}")


def check_range(hidden_states: Sequence[int], num_layers: int) -> None:
    """Raise `CheckpointError` for a hidden state that the target does not have."""
    for state in hidden_states:
        if not 0 <= state <= num_layers:
            raise CheckpointError(
                f"drafter: taps hidden state {state}, the target has 0 to {num_layers}",
                hint="this drafter belongs to a target of more layers, or needs another --drafter-tap-offset",
            )


def first_draft_agreement(
    drafter: Drafter, tokens: Sequence[int], taps_TF: Tensor, choices: Sequence[int], *, skip: int = 8
) -> list[bool]:
    """Teacher-forced: at each position, whether the drafter's first draft is the target's own choice.

    Args:
        drafter: without the history of sequence -1, which is used and forgotten.
        tokens: T ids.
        taps_TF: [T, K*D], the target's hidden states at each of them, in the drafter's order.
        choices: the target's likeliest token behind each.
        skip: positions at the beginning that are not asked about: there is little to draft from.
    """
    hits = []
    drafter.forget(-1)
    for t in range(1, len(tokens)):
        request = DraftRequest(-1, list(tokens[: t + 1]), taps_TF[t - 1 : t], 1)
        (proposal,) = drafter.propose([request])
        if t >= skip:
            hits.append(proposal.tokens[:1] == [choices[t]])
    drafter.forget(-1)
    return hits


def measure_taps(
    drafter: Drafter,
    taps: Taps,
    num_layers: int,
    tokens: Sequence[int],
    choices: Sequence[int],
    hidden_states: Callable[[tuple[int, ...]], Tensor],
) -> TapChoice:
    """Try both conventions on committed tokens and take the one that agrees with the target more often.

    Where the difference is within its noise the config's convention stays.

    Args:
        drafter: whatever taps it was made with: it is fed what each convention means.
        taps: of its config.
        num_layers: of the target.
        tokens: a few hundred ids.
        choices: the target's likeliest token behind each.
        hidden_states: taps -> [T, K*D] at those positions, side by side in this order.
    """
    by_rule = choose_taps(taps, num_layers)
    ids, found = stated_ids(taps), dict[int, list[bool]]()
    for offset in (0, 1):
        states = tuple(i + offset for i in ids)
        if all(0 <= state <= num_layers for state in states):
            found[offset] = first_draft_agreement(drafter, tokens, hidden_states(states), choices)
    agreement = {offset: sum(hits) / max(1, len(hits)) for offset, hits in found.items()}
    best = max(agreement, key=lambda offset: (agreement[offset], offset == by_rule.offset))
    positions = len(found[best])
    clear = all(is_clearly_better(found[best], hits) for offset, hits in found.items() if offset != best)
    offset = best if clear else by_rule.offset
    states = tuple(i + offset for i in ids)
    seen = ", ".join(f"offset {o}: {share:.1%}" for o, share in sorted(agreement.items()))
    why = "measured" if clear else "no clear difference, the config's convention stays"
    return TapChoice(
        states,
        offset,
        f"drafter taps {list(ids)}: hidden states {list(states)} (offset {offset}, {why}); first draft agrees with "
        f"the target at {positions} positions: {seen}",
        agreement,
    )


def is_clearly_better(better: list[bool], worse: list[bool]) -> bool:
    """Whether one list of hits at the same positions beats another by more than noise (McNemar's statistic)."""
    wins = sum(a and not b for a, b in zip(better, worse, strict=True))
    losses = sum(b and not a for a, b in zip(better, worse, strict=True))
    return wins - losses > NOISE * math.sqrt(wins + losses)
