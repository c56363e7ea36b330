"""Conventions of acceptance on hand-made steps, with closed forms."""

from __future__ import annotations

import pytest

from m27quant.drafters import metrics
from m27quant.drafters.metrics import AcceptanceStats, total
from m27quant.errors import UsageError
from m27quant.runtime.statistics import acceptance

STEPS = [0, 3, 1, 1, 0, 2, 3, 0]
DRAFTED = [3] * 8


def test_a_geometric_drafter_has_its_closed_form() -> None:
    """Of 2^n steps half end at each position: C_k = 2^-k, m_accept = 1 - 2^-n."""
    n = 6
    histogram = [2 ** (n - 1 - a) for a in range(n)] + [1]
    stats = AcceptanceStats(tuple(histogram))
    assert stats.num_steps == 2**n
    assert stats.c_k == [2.0**-k for k in range(1, n + 1)]
    assert stats.conditional == [0.5] * n
    assert stats.m_accept == 1 - 2.0**-n
    assert stats.tau == 2 - 2.0**-n


def test_the_runtime_counts_the_same() -> None:
    stats, found = AcceptanceStats.of_steps(STEPS, DRAFTED), acceptance(STEPS, DRAFTED)
    assert stats.num_steps == found.num_steps == 8
    assert stats.num_accepted == found.num_accepted == 10
    assert (stats.tau, stats.m_accept, stats.c_k) == (found.tau, found.m_accept, found.c_k)
    assert stats.conditional == found.conditional
    assert stats.drafts_per_step == found.drafts_per_step
    assert stats.acceptance_rate == 10 / 24


def test_counts_by_position_and_by_step_are_one_thing() -> None:
    by_step = AcceptanceStats.of_steps(STEPS, DRAFTED)
    assert by_step.positions == [5, 3, 2]
    assert AcceptanceStats.of_positions(8, [5, 3, 2, 0, 0], 24) == by_step


@pytest.mark.parametrize(("steps", "positions"), [(2, [3]), (5, [2, 3]), (1, [-1])])
def test_counts_that_cannot_be_are_refused(steps: int, positions: list[int]) -> None:
    with pytest.raises(UsageError, match=f"cannot be of {steps} steps"):
        AcceptanceStats.of_positions(steps, positions)
    with pytest.raises(UsageError, match="not -1"):
        AcceptanceStats.of_steps([0, -1])


def test_parts_add_up_whatever_their_lengths() -> None:
    parts = [AcceptanceStats.of_steps(STEPS[i : i + 3], DRAFTED[i : i + 3]) for i in range(0, 8, 3)]
    assert total(parts) == AcceptanceStats.of_steps(STEPS, DRAFTED)
    assert total([]) == AcceptanceStats()
    assert AcceptanceStats().tau == 1
    assert AcceptanceStats().c_k == []
    assert AcceptanceStats().acceptance_rate is None


def test_a_long_answer_counts_once_for_zlab_and_by_its_steps_for_servers() -> None:
    short = AcceptanceStats.of_steps([1])
    long = AcceptanceStats.of_steps([3] * 9)
    assert metrics.zlab_local([short, long]) == (2 + 4) / 2
    assert total([short, long]).tau == 1 + 28 / 10
    # an answer's first token comes with the prompt
    requests = [(1 + 2, 1), (1 + 36, 9)]
    assert metrics.zlab_server(requests) == pytest.approx(((2 + 1 / 1) + (4 + 1 / 9)) / 2)
    assert metrics.specforge_accept_length(requests) == 40 / 10
    assert metrics.sglang_server_accept_length(total([short, long])) == 3.8
    assert metrics.modelopt_acceptance_rate(38, 10) == 3.8


def test_without_the_bonus() -> None:
    stats = AcceptanceStats.of_steps(STEPS)
    assert metrics.safeailab_accept_length(stats) == stats.tau - 1
    assert metrics.mirecx_m_accept(STEPS) == stats.m_accept
    assert metrics.speculators_eal(stats.c_k) == pytest.approx(stats.m_accept)


def test_vllm_counts_no_step_without_drafts() -> None:
    """Steps that drafted nothing are steps of tau, but no drafts of vLLM's."""
    accepted, drafted = [2, 0, 0, 1], [3, 0, 0, 3]
    stats = AcceptanceStats.of_steps(accepted, drafted)
    assert stats.tau == 1 + 3 / 4
    assert metrics.vllm_mean_acceptance_length(2, 3) == 1 + 3 / 2
    assert metrics.vllm_per_position(2, stats.positions) == [1, 0.5]


def test_speedup_is_tokens_of_a_step_over_what_the_step_costs() -> None:
    assert metrics.speedup(2.5, 0.010, 0.012, 0.003) == pytest.approx(2.5 * 10 / 15)
    assert metrics.speedup(1.0, 0.010, 0.010, 0.0) == 1
