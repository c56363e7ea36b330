"""Which hidden states are taken: by convention, by order, by measurement, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from m27quant.checkpoint.drafter_config import Taps
from m27quant.errors import CheckpointError
from m27quant.runtime.speculative.proposal import DraftRequest, Proposal, chain
from m27quant.runtime.speculative.taps import choose_taps, first_draft_agreement, measure_taps

V, T, LAYERS = 50, 120, 12
LAYERWISE = Taps((1, 4), (2, 5), "layers, each plus one")
AS_STATES = Taps((2, 5), (2, 5), "hidden states")
DEFAULTS = Taps((), (2, 6, 9), "the engines' defaults")


@pytest.mark.parametrize(("taps", "offset", "states", "words"), [
    (LAYERWISE, None, (2, 5), "drafter taps [1, 4] (layers, each plus one): hidden states [2, 5], by the config's"),
    (LAYERWISE, 0, (1, 4), "hidden states [1, 4], --drafter-tap-offset 0"),
    (LAYERWISE, 1, (2, 5), "hidden states [2, 5], --drafter-tap-offset 1"),
    (AS_STATES, None, (2, 5), "drafter taps [2, 5] (hidden states): hidden states [2, 5]"),
    (AS_STATES, 1, (3, 6), "hidden states [3, 6]"),
    (DEFAULTS, None, (2, 6, 9), "drafter taps: the engines' defaults: hidden states [2, 6, 9]"),
    (Taps((0, 11), (1, 12), "x"), None, (1, 12), "[1, 12]"),
])  # fmt: skip
def test_conventions_are_stated(taps: Taps, offset: Any, states: tuple[int, ...], words: str) -> None:
    choice = choose_taps(taps, LAYERS, offset)
    assert choice.hidden_states == states
    assert words in choice.statement


@pytest.mark.parametrize(
    ("taps", "offset"), [(AS_STATES, 8), (Taps((12,), (12,), "x"), 1), (Taps((-1,), (0,), "x"), 0)]
)
def test_states_that_the_target_does_not_have(taps: Taps, offset: Any) -> None:
    with pytest.raises(CheckpointError, match=r"drafter: taps hidden state -?\d+, the target has 0 to 12"):
        choose_taps(taps, LAYERS, offset)


class Reader:
    """A drafter that finds the target's choice in its taps with some luck, if they are the ones that it knows."""

    taps: tuple[int, ...] = ()
    num_draft_tokens = max_depth = 1

    def __init__(self, luck: dict[int, float]) -> None:
        self.luck = luck
        self.seen = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        (request,) = requests
        assert request.taps is not None
        assert request.taps.shape == (1, 2)
        self.seen += 1
        assert len(request.tokens) == self.seen + 1
        position, state = request.taps[0].tolist()
        lucky = (position * 37 + 11) % 101 < 101 * self.luck.get(int(state), 0.0)
        return [chain([choice(int(position) + 1) if lucky else V])]

    def forget(self, sequence: int) -> None:
        self.seen = 0


def choice(position: int) -> int:
    return position * 7 % V


def states(wanted: tuple[int, ...]) -> Tensor:
    """Each position's features: the position itself and the first state that was asked for."""
    return torch.stack([torch.arange(T).float(), torch.full((T,), float(wanted[0]))], 1)


def measure(luck: dict[int, float], taps: Taps = LAYERWISE) -> Any:
    return measure_taps(Reader(luck), taps, LAYERS, list(range(T)), [choice(t) for t in range(T)], states)


def test_the_better_convention_is_taken_and_both_are_told() -> None:
    found = measure({1: 0.9, 2: 0.3})
    assert (found.hidden_states, found.offset) == ((1, 4), 0)
    assert "hidden states [1, 4] (offset 0, measured)" in found.statement
    assert "at 112 positions: offset 0: " in found.statement
    assert 0.8 < found.agreement[0] < 1.0
    assert 0.2 < found.agreement[1] < 0.4
    again = measure({1: 0.3, 2: 0.9})
    assert (again.hidden_states, again.offset) == ((2, 5), 1)


def test_where_there_is_no_clear_difference_the_convention_stays() -> None:
    found = measure({1: 0.52, 2: 0.5})
    assert found.hidden_states == (2, 5)
    if found.agreement[0] > found.agreement[1]:
        assert "no clear difference, the config's convention stays" in found.statement
    assert measure({}).hidden_states == (2, 5)


def test_a_convention_that_leads_beyond_the_target_is_not_tried() -> None:
    last = Taps((11, 12), (11, 12), "hidden states")
    found = measure({11: 0.5}, last)
    assert found.hidden_states == (11, 12)
    assert set(found.agreement) == {0}


def test_agreement_is_teacher_forced() -> None:
    hits = first_draft_agreement(
        Reader({2: 1.0}), list(range(T)), states((2,)), [choice(t) for t in range(T)], skip=1
    )
    assert hits == [True] * (T - 1)
