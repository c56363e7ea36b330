"""Figures of speculation by their definitions, and times that fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant import SamplingParams
from m27quant.runtime.statistics import acceptance, total_acceptance
from tests.checkpoints import Shape, write_checkpoint
from tests.runtime.engines import GuessingDrafter, Loaded


def test_a_run_worked_out_by_hand() -> None:
    found = acceptance([0, 2, 1, 3, 0], [4, 4, 0, 4, 4])
    assert found.c_k == pytest.approx([3 / 5, 2 / 5, 1 / 5])
    assert found.conditional == pytest.approx([3 / 5, 2 / 3, 1 / 2])
    assert found.m_accept == pytest.approx(6 / 5)
    assert found.tau == pytest.approx(11 / 5)
    assert found.drafts_per_step == pytest.approx(16 / 5)
    assert (found.num_steps, found.num_drafted, found.num_accepted) == (5, 16, 6)


def test_nothing_at_all() -> None:
    found = acceptance([], [])
    assert (found.tau, found.m_accept, found.c_k, found.drafts_per_step) == (1, 0, [], 0)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=50))
def test_m_accept_is_the_sum_of_c_k(accepted: list[int]) -> None:
    found = acceptance(accepted, [7] * len(accepted))
    assert sum(found.c_k) == pytest.approx(found.m_accept)
    product = 1.0
    for c, conditional in zip(found.c_k, found.conditional, strict=True):
        product *= conditional
        assert product == pytest.approx(c)


def test_a_requests_times_fit_together(tmp_path: Path) -> None:
    loaded = Loaded(write_checkpoint(tmp_path / "fp8", Shape(vocab_size=64)))
    llm = loaded.engine(drafter=GuessingDrafter(64, seed=1))
    requests = [llm.submit([1, 2, 3 + n], SamplingParams(temperature=0.0, max_tokens=n)) for n in (1, 9)]
    while not llm.engine.scheduler.is_idle:
        llm.step()
    one, nine = (llm.result(r) for r in requests)
    for result in (one, nine):
        s = result.stats
        assert s.time_to_first_token_s is not None
        assert 0 < s.prefill_s <= s.time_to_first_token_s <= s.total_s
        assert s.draft_s + s.verify_s <= s.total_s
        assert s.acceptance.num_steps + s.acceptance.num_accepted + 1 == len(result.token_ids)
    assert one.stats.tokens_per_s == 0
    assert nine.stats.tokens_per_s is not None
    assert nine.stats.tokens_per_s > 0
    assert total_acceptance(r.timing for r in requests).num_steps == nine.stats.acceptance.num_steps
    assert llm.engine.totals.num_output_tokens == 10
    assert llm.engine.totals.num_prefill_tokens == 6
