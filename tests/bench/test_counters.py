"""Prometheus' text and SGLang's average, as servers write them and as they must not be believed."""

from __future__ import annotations

import json

import pytest

from m27quant.bench.counters import parse_counters, sglang_average, sglang_gauge
from m27quant.errors import EnvironmentFault


def exposition(
    drafts: float, drafted: float, positions: list[float], *, prefix: str = "vllm:", engines: int = 1
) -> str:
    labels = [f'engine="{e}",model_name="a b}} c"' for e in range(engines)]
    lines = [f"# HELP {prefix}spec_decode_num_drafts_total Number of drafts.", "garbage {", "python_gc 1e3"]
    for of_engine in labels:
        lines += [
            f"{prefix}spec_decode_num_drafts_total{{{of_engine}}} {drafts}",
            f"{prefix}spec_decode_num_drafts_created{{{of_engine}}} 1.7e9",
            f"{prefix}spec_decode_num_draft_tokens_total{{{of_engine}}} {drafted}",
            f"{prefix}spec_decode_num_accepted_tokens_total{{{of_engine}}} {sum(positions)}",
        ]
        lines += [
            f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{of_engine},position="{k}"}} {count}'
            for k, count in enumerate(positions)
        ]
    return "\n".join([*lines, f"{prefix}generation_tokens_total 17.0", ""])


@pytest.mark.parametrize("prefix", ["vllm:", "m27quant:"])
def test_the_difference_over_a_run(prefix: str) -> None:
    before = parse_counters(exposition(100, 300, [60, 30, 10], prefix=prefix))
    after = parse_counters(exposition(108.0, 324.0, [65, 33, 12], prefix=prefix))
    assert before is not None
    assert after is not None
    assert (after.prefix, after.generation_tokens) == (prefix, 17)
    stats = after.since(before)
    assert (stats.num_steps, stats.num_drafted, stats.positions) == (8, 24, [5, 3, 2])
    assert stats.tau == 1 + 10 / 8
    assert stats.c_k == [5 / 8, 3 / 8, 2 / 8]
    assert after.since(None).num_steps == 108


def test_engines_are_added_up() -> None:
    found = parse_counters(exposition(8, 24, [5, 3, 2], engines=2))
    assert found is not None
    assert found.since(None).positions == [10, 6, 4]


def test_a_server_without_drafts_has_none() -> None:
    assert parse_counters("vllm:generation_tokens_total 3\n") is None
    assert parse_counters("") is None


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (exposition(3, 9, [2, 1, 0]), "went back"),
        (exposition(108, 324, [65, 33, 12]).replace("_tokens_total{engine", "_x{engine"), "went back"),
        (
            exposition(110, 330, [65, 33, 12]).replace("accepted_tokens_total{", "accepted_other{"),
            "went back",
        ),
        (exposition(102, 306, [65, 33, 12]), "cannot be of 2 steps"),
        (exposition(108.5, 324, [65, 33, 12]), "went back"),
    ],
)
def test_counters_that_cannot_be(after: str, message: str) -> None:
    before, found = parse_counters(exposition(100, 300, [60, 30, 10])), parse_counters(after)
    assert found is not None
    with pytest.raises(EnvironmentFault, match=message):
        found.since(before)


def test_positions_that_miss_some_do_not_agree() -> None:
    text = exposition(8, 24, [5, 3, 2]).replace(
        'accepted_tokens_total{engine="0",model_name="a b} c"} 10', "accepted_tokens_total 11"
    )
    found = parse_counters(text)
    assert found is not None
    with pytest.raises(EnvironmentFault, match="accepted 11 drafts, by position 10"):
        found.since(None)


def test_sglang_states_an_average() -> None:
    states = [{"avg_spec_accept_length": 2.5}, {"avg_spec_accept_length": 3.5}, {"last_gen_throughput": 1.0}]
    assert sglang_average(json.dumps({"internal_states": states}).encode()) == 3
    for none in (
        b"",
        b"[]",
        b"{}",
        b'{"internal_states": [3, {"avg_spec_accept_length": "2"}]}',
        b"{" * 99999,
    ):
        assert sglang_average(none) is None
    assert (
        sglang_gauge('sglang:spec_accept_length{tp_rank="0"} 2.75\nsglang:spec_accept_length_x 9\n') == 2.75
    )
    assert sglang_gauge("sglang:spec_accept_length NaN\n") is None
