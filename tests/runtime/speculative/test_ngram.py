"""Prompt lookup against a search by hand, with any growth of the text."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from m27quant.errors import UsageError
from m27quant.runtime.speculative.ngram import NgramDrafter
from m27quant.runtime.speculative.proposal import DraftRequest


def by_hand(text: list[int], count: int, longest: int, shortest: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for begin in range(len(text) - n - 1, -1, -1):
            if n < len(text) and text[begin : begin + n] == text[len(text) - n :]:
                drafts: list[int] = []
                for i in range(count):
                    at = begin + n + i
                    drafts.append(text[at] if at < len(text) else drafts[at - len(text)])
                return drafts
    return []


@hypothesis.given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 40)),
    count=st.integers(1, 9),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
)
def test_drafts_are_what_a_search_finds(
    text: list[int], cuts: set[int], count: int, shortest: int, more: int
) -> None:
    longest = shortest + more
    drafter = NgramDrafter(count, max_ngram=longest, min_ngram=shortest)
    for cut in sorted({min(cut, len(text)) for cut in cuts} | {len(text)}):
        (proposal,) = drafter.propose([DraftRequest(3, text[:cut], None, 99)])
        assert proposal.tokens == by_hand(text[:cut], count, longest, shortest)
        assert proposal.parents == list(range(-1, len(proposal.tokens) - 1))


def test_a_repetition_is_continued_for_as_long_as_asked() -> None:
    (proposal,) = NgramDrafter(7).propose([DraftRequest(0, [9, 1, 2, 3, 1, 2, 3, 1], None, 99)])
    assert proposal.tokens == [2, 3, 1, 2, 3, 1, 2]


def test_limits_and_forgetting() -> None:
    drafter = NgramDrafter(4)
    text = [5, 6, 5, 6, 5]
    assert drafter.propose([DraftRequest(0, text, None, 2)])[0].tokens == [6, 5]
    assert drafter.propose([DraftRequest(0, text, None, 0)])[0].tokens == []
    drafter.forget(0)
    assert drafter.propose([DraftRequest(0, [5, 7, 5], None, 9)])[0].tokens == [7, 5, 7, 5]
    assert drafter.taps == ()


@pytest.mark.parametrize(("count", "longest", "shortest"), [(0, 3, 1), (3, 0, 0), (3, 1, 2)])
def test_sizes_that_allow_nothing(count: int, longest: int, shortest: int) -> None:
    with pytest.raises(UsageError, match="n-grams of"):
        NgramDrafter(count, max_ngram=longest, min_ngram=shortest)
