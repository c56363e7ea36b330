"""Advice from fabricated timings: which setting, or none, and why."""

from __future__ import annotations

from typing import Any

import pytest

from m27quant.bench.result import Speed
from m27quant.bench.sweep import WORTH, recommend


def speed(setting: str, tau: float, verify_ms: float, draft_ms: float, **changes: Any) -> Speed:
    """A step without drafts takes 10 ms; what was measured agrees with the formula unless said otherwise."""
    values: dict[str, Any] = {
        "task": "t", "concurrency": 1, "setting": setting, "tau": tau, "decode_s": 0.010,
        "verify_s": verify_ms / 1e3, "draft_s": draft_ms / 1e3, "measured": tau * 10 / (verify_ms + draft_ms),
        "error": None,
    }  # fmt: skip
    return Speed(**(values | changes))


def test_the_formula() -> None:
    assert speed("block 8", 2.5, 12, 3).predicted == pytest.approx(2.5 * 10 / 15)
    assert speed("block 8", 2.5, 12, 3, draft_s=None).predicted is None


def test_the_longest_block_need_not_be_the_best() -> None:
    """tau grows with the block, and what verifying costs grows faster."""
    blocks = [speed("block 4", 2.2, 11, 1), speed("block 8", 2.8, 13, 1), speed("block 16", 3.0, 20, 1)]
    (advice,) = recommend(blocks, {"block 8": "--num-draft-tokens 7"})
    assert (advice.setting, advice.flags) == ("block 8", "--num-draft-tokens 7")
    assert advice.speedup == pytest.approx(2.0)
    assert advice.why == (
        "tau 2.80 x 10 ms a step without drafts / (13 ms to verify + 1 ms to draft) = 2.00 times; "
        "measured 2.00 times the tokens/s; next block 4: 1.83 times"
    )


def test_each_concurrency_has_its_own() -> None:
    """A batch that is full already has no room for drafts."""
    found = recommend(
        [
            speed("block 4", 2.0, 11, 1),
            speed("block 16", 3.0, 12, 1),
            speed("block 4", 2.0, 15, 2, concurrency=32),
            speed("block 16", 3.0, 40, 2, concurrency=32),
        ]
    )
    assert [(a.concurrency, a.setting) for a in found] == [(1, "block 16"), (32, "block 4")]


@pytest.mark.parametrize(
    ("tau", "verify_ms", "draft_ms", "why"),
    [
        (2.3, 15, 12, "drafting takes longer than the token it is to save"),
        (2.0, 25, 1, "verifying takes longer than decoding the same tokens one by one"),
        (1.3, 12, 2, "a step takes 1.40 times as long and gives 1.30 tokens"),
    ],
)
def test_where_drafting_does_not_pay_none_is_recommended(
    tau: float, verify_ms: float, draft_ms: float, why: str
) -> None:
    worse = speed("block 16", tau, 2 * verify_ms, 2 * draft_ms)
    (advice,) = recommend([worse, speed("block 8", tau, verify_ms, draft_ms)])
    assert (advice.setting, advice.flags) == (None, None)
    assert advice.why.startswith(f"block 8 is the best and does not pay, as {why}: tau {tau:.2f} x 10 ms")
    assert advice.speedup == pytest.approx(tau * 10 / (verify_ms + draft_ms))


def test_the_formula_alone_is_no_reason() -> None:
    """Whole answers have prompts, too, whose features a drafter has to take in."""
    (advice,) = recommend([speed("block 8", 2, 11, 1, measured=0.9)])
    assert advice.setting is None
    assert "whole answers do not come faster" in advice.why
    found = recommend(
        [speed("block 8", 2.4, 11, 1, measured=0.9), speed("block 4", 2.0, 11, 1, measured=1.5)]
    )
    assert found[0].setting == "block 4"


def test_noise_is_no_gain() -> None:
    assert recommend([speed("a", WORTH - 0.01, 10, 0)])[0].setting is None
    assert recommend([speed("a", WORTH + 0.01, 10, 0)])[0].setting == "a"


def test_a_gain_has_to_be_clear_of_its_error() -> None:
    """A busy machine: turns of the same differ more than the settings do."""
    (advice,) = recommend([speed("a", 1.2, 10, 0, error=0.15)])
    assert advice.setting is None
    assert "may pay, but its gain is not clear of noise" in advice.why
    assert "measured 1.20 +- 0.15 times" in advice.why
    assert recommend([speed("a", 1.2, 10, 0, error=0.05)])[0].setting == "a"
    two = [speed("a", 1.2, 10, 0, error=0.12), speed("a", 1.2, 10, 0, error=0.12, task="prose")]
    assert recommend(two)[0].setting == "a"  # 0.085 for the mean of both


def test_tasks_count_alike() -> None:
    """One task gains, the other loses as much: together nothing is gained."""
    both = [speed("a", 2.0, 10, 0, task="code"), speed("a", 0.5, 10, 0, task="prose")]
    assert recommend(both)[0].speedup == pytest.approx(1.25)
    assert recommend(both)[0].setting == "a"
    assert recommend([speed("a", 1.2, 10, 0), speed("a", 0.7, 10, 0, task="prose")])[0].setting is None


def test_without_timings_there_is_no_advice() -> None:
    assert recommend([]) == []
    assert recommend([speed("as served", 2, 10, 0, decode_s=None)]) == []
