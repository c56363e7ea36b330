"""A prescribed run of tokens comes where it has to, and nothing stops an output before it is whole."""

from __future__ import annotations

import pytest
import torch

from m27quant.runtime.generation import Prescription, SamplingParams
from m27quant.runtime.sampling import Row, choose

V, STOP, AFTER, UNTIL = 12, 0, 1, 2
RUNS = ((5, 6), (5, 7, 8))


def next_token(output: list[int], prescribed: Prescription, likely: int, **settings: float) -> int:
    """What is chosen behind `output` where one token is by far the likeliest."""
    logits = torch.zeros(1, V)
    logits[0, likely] = 9.0
    params = SamplingParams(
        temperature=settings.get("temperature", 0.0), top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        prescribed=prescribed,
    )  # fmt: skip
    prompt = [5, 6, AFTER, UNTIL]  # what stands in the prompt counts for nothing
    return choose(logits, [Row(params, 3, prompt + output, len(prompt), frozenset([STOP]))])[0]


@pytest.mark.parametrize(
    ("output", "likely", "expected"),
    [
        ([], STOP, 5),
        ([], 9, 5),
        ([5], 7, 7),
        ([5], 6, 6),
        ([5, 7], 9, 8),
        ([5, 7, 8], 9, 9),  # free again
        ([5, 7, 8, 9], STOP, 1),  # but not to stop: of the others the first
        ([5, 6, 9, UNTIL], STOP, STOP),
    ],
)
def test_at_the_beginning(output: list[int], likely: int, expected: int) -> None:
    assert next_token(output, Prescription(choices=RUNS, until=UNTIL), likely) == expected


@pytest.mark.parametrize(
    ("output", "likely", "expected"),
    [
        ([], 9, 9),
        ([9, 9], STOP, 1),
        ([9, 9], AFTER, AFTER),
        ([9, AFTER], 9, 5),
        ([9, AFTER, 5, 6], STOP, STOP),
    ],
)
def test_behind_a_token(output: list[int], likely: int, expected: int) -> None:
    assert next_token(output, Prescription(choices=RUNS, after=AFTER), likely) == expected


def test_drawn_tokens_are_prescribed_too() -> None:
    assert next_token([], Prescription(choices=RUNS), 9, temperature=2.0) == 5
    assert next_token([5], Prescription(choices=RUNS), 9, temperature=2.0) in (6, 7)
