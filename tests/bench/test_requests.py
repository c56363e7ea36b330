"""Which questions, in which order, with which seeds; and settings as they are written."""

from __future__ import annotations

from typing import Any

import pytest

from m27quant.bench.requests import BenchOptions, make_requests
from m27quant.bench.settings import Setting, parse_blocks, parse_chains, parse_counts, parse_trees
from m27quant.errors import UsageError

ROWS = [[{"role": "user", "content": text}] for text in "abc"]


def test_rows_are_taken_round_and_round_behind_the_warm_up() -> None:
    options = BenchOptions(concurrency=(2,), num_prompts=(5,))
    warm, measured = make_requests(ROWS, options, 2)
    assert [r.messages[0]["content"] for r in warm] == ["a", "b"]
    assert [r.messages[0]["content"] for r in measured] == ["c", "a", "b", "c", "a"]
    assert [r.index for r in warm + measured] == list(range(7))
    assert {r.max_tokens for r in warm} == {64}
    assert {r.max_tokens for r in measured} == {4096}
    assert {r.max_tokens for r in make_requests(ROWS, BenchOptions(max_tokens=8), 1)[0]} == {8}


def test_seeds_depend_on_the_seed_and_the_place_alone() -> None:
    def seeds(seed: int, concurrency: int) -> list[int]:
        options = BenchOptions(seed=seed, concurrency=(concurrency,), num_prompts=(4,))
        return [r.seed for part in make_requests(ROWS, options, concurrency) for r in part]

    assert seeds(42, 1) == seeds(42, 3)[:5]
    assert len(set(seeds(42, 3) + seeds(43, 3))) == 14
    assert all(0 <= s < 2**31 for s in seeds(42, 3))


def test_how_many_are_asked() -> None:
    assert [BenchOptions().count(c) for c in (1, 32)] == [32, 128]
    assert [BenchOptions(num_prompts=(7,)).count(c) for c in (1, 32)] == [7, 7]
    assert [BenchOptions(num_prompts=(128, 1024)).count(c) for c in (1, 32)] == [128, 1024]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": ()}, "concurrency"),
        ({"concurrency": (0,)}, "concurrency"),
        ({"concurrency": (1, 1)}, "twice"),
        ({"num_prompts": (0,)}, "num_prompts"),
        ({"num_prompts": (1, 2, 3)}, "3 numbers of prompts for 2"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repeat": 0}, "repeat"),
        ({"tasks": ()}, "no task"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOptions(**changes)


def test_settings_as_they_are_written() -> None:
    assert parse_blocks("4, 8") == (Setting("block", 4), Setting("block", 8))
    assert parse_chains("1,3") == (Setting("chain", 1), Setting("chain", 3))
    assert parse_trees("3/4/8,5/4/16") == (Setting("tree", 8, 3, 4), Setting("tree", 16, 5, 4))
    assert parse_counts("1, 32") == (1, 32)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_blocks, "1"), (parse_blocks, "4,"), (parse_blocks, "4,4"), (parse_blocks, "x"), (parse_blocks, "9999"),
        (parse_chains, "0"), (parse_chains, "-1"), (parse_trees, "3/4"), (parse_trees, "0/4/8"), (parse_trees, "3/4/x"),
        (parse_counts, ""), (parse_counts, "0"), (parse_counts, "1,,2"), (parse_counts, "1.5"), (parse_counts, "٣"),
    ],
)  # fmt: skip
def test_settings_that_are_none(parse: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"write|twice|at least"):
        parse(text)
