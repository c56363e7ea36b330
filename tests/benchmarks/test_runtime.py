"""The runtime's benchmark runs and its figures mean what they say; no time is judged."""

from __future__ import annotations

import pytest

from benchmarks.runtime_gpu import measure
from benchmarks.synthetic import TINY


def test_the_full_size_measurement_on_a_small_model() -> None:
    found = measure(layers=2, tokens=3, device="cpu", size=TINY, batches=(1, 3))
    one, three = found["rows"]
    assert (one["batch"], three["batch"]) == (1, 3)
    assert one["experts_per_layer"] == TINY.num_experts_per_tok
    assert TINY.num_experts_per_tok < three["experts_per_layer"] <= TINY.num_local_experts
    assert three["gb_per_step"] > one["gb_per_step"] > 0
    assert one["share_of_limit"] == pytest.approx(one["limit_ms"] / one["ms_per_step"])
    assert len(found["lines"]) == 6
