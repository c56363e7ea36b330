"""What a memory budget decides, and that it is never planned beyond."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m27quant.calib import memory
from m27quant.calib.memory import CHUNK_TOKENS, MAX_GROUP, MemoryPlan, plan_memory
from m27quant.checkpoint.config import parse_config
from m27quant.errors import EnvironmentFault
from m27quant.kernels.dispatch import Choice
from m27quant.runtime import host_memory
from m27quant.runtime.host_memory import default_budget
from tests.quantize.planned import M27

CPU = torch.device("cpu")
CONFIG = parse_config(M27)
GIB = 2**30
BASE = 600 * 2**20
"""A resident size for the process, so that plans do not depend on the test run."""


@pytest.fixture(autouse=True)
def _fixed_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, host_memory):
        monkeypatch.setattr(module, "rss_bytes", lambda: BASE)
    compiled = Choice(backend="cpu-native", reason="so on every machine")  # without it packing takes more
    monkeypatch.setattr(memory, "choose", lambda name, device: compiled)


def plan(
    budget: int, *, num_tokens: int = 524_288, longest: int = 512, chunk: int | None = None
) -> MemoryPlan:
    return plan_memory(
        CONFIG, num_tokens=num_tokens, longest=longest, device=CPU, budget=budget, chunk_tokens=chunk
    )


def smallest_budget(num_tokens: int = 524_288) -> int:
    """The least that is not refused, found by halving."""
    low, high = 0, 64 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(middle, num_tokens=num_tokens)
            high = middle
        except EnvironmentFault:
            low = middle
    return high


@given(st.integers(2 * GIB, 64 * GIB), st.integers(1, 2**20), st.integers(1, 8192))
def test_a_plan_stays_within_its_budget(budget: int, num_tokens: int, longest: int) -> None:
    longest = min(longest, num_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "rss_bytes", lambda: BASE)
        try:
            found = plan(budget, num_tokens=num_tokens, longest=longest)
        except EnvironmentFault:
            return
    assert BASE < found.peak_bytes <= budget
    assert 1 <= found.expert_group <= MAX_GROUP
    assert 1 <= found.chunk_tokens <= CHUNK_TOKENS["cpu"]
    assert found.device_peak_bytes == 0
    assert BASE < found.trim_above < found.peak_bytes


def test_more_memory_keeps_more_in_memory() -> None:
    """M2.7 with modelopt's 1024 x 512 tokens: 3.2 GB per set of rows, 28 MB per expert."""
    plans = [plan(int(b * GIB)) for b in (3.5, 4.5, 6, 9, 12, 16, 32, 64)]
    assert [p.rows_in_memory for p in plans] == sorted(p.rows_in_memory for p in plans)
    assert not plans[0].rows_in_memory
    assert plans[-1].rows_in_memory
    assert (plans[-1].chunk_tokens, plans[-1].expert_group) == (CHUNK_TOKENS["cpu"], MAX_GROUP)
    for in_memory in (False, True):
        groups = [p.expert_group for p in plans if p.rows_in_memory == in_memory]
        assert groups == sorted(groups)


def test_too_little_is_refused_with_what_is_needed() -> None:
    with pytest.raises(
        EnvironmentFault, match=r"--max-memory 1\.00 GiB is too little: .* needs 1\.1 GiB"
    ) as caught:
        plan(GIB)
    assert caught.value.exit_code == 4
    assert "--max-memory" in str(caught.value.hint)
    least = smallest_budget()
    assert BASE < least < 4 * GIB
    assert not plan(least).rows_in_memory
    with pytest.raises(EnvironmentFault):
        plan(least - 1)


def test_chunks_shrink_only_when_they_must() -> None:
    """They are part of the result's identity: any budget that is not tiny has the same."""
    assert plan(smallest_budget()).chunk_tokens < CHUNK_TOKENS["cpu"]
    assert {plan(b * GIB).chunk_tokens for b in (4, 6, 8, 64)} == {CHUNK_TOKENS["cpu"]}
    assert plan(64 * GIB, num_tokens=100, longest=100).chunk_tokens == 100


def test_a_resumed_run_keeps_its_chunks_whatever_the_budget() -> None:
    assert plan(64 * GIB, chunk=512).chunk_tokens == 512
    with pytest.raises(EnvironmentFault, match="too little"):
        plan(smallest_budget(), chunk=CHUNK_TOKENS["cpu"])


def test_a_long_sequence_is_counted_whole() -> None:
    assert plan(64 * GIB, longest=8192).peak_bytes > plan(64 * GIB, longest=512).peak_bytes


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 8.0), (str(4 * GIB), 3.2), (str(9223372036854771712), 8.0), (None, 8.0), ("garbage", 8.0)],
)
def test_the_default_budget_heeds_a_containers_limit(
    limit: str | None, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80% of what is free, or of what the control group allows."""

    class Free:
        available = 10 * GIB - BASE

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(host_memory, "CONTROL_GROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert default_budget() == int(expected * GIB)
