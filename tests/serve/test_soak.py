"""A short version of what `python -m tests.serve.soak` does for a minute."""

from __future__ import annotations

import asyncio

from m27quant import LLM
from tests.serve.conftest import serving
from tests.serve.soak import Clients


def test_nothing_is_lost_among_many_clients_and_nothing_leaks(tiny: LLM) -> None:
    with serving(tiny, max_queue=1000) as server:
        report = asyncio.run(Clients(server.address).run(64, 6))
    assert not report.faults
    assert min(report.outcomes.values()) > 0
    assert len(report.outcomes) == 6
