"""The trained model behind a server in a thread of its own, one for all tests of a module."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import m27quant
from m27quant import LLM
from m27quant.serve.server import Server, ServerOptions
from tests.serve import full_size

MODEL = "tiny-m27"


@pytest.fixture(scope="session")
def tiny(repository: Path) -> LLM:
    """The trained model; one server after another has it to itself."""
    return m27quant.load(repository / "examples/tiny-m27", max_num_seqs=16, kv_cache_memory=2**25)


@contextmanager
def serving(llm: LLM, **options: Any) -> Iterator[Server]:
    """A server that answers; at the end it has given everything back."""
    server = Server(llm, ServerOptions(port=0, **options), MODEL)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server._uvicorn.started:
            assert thread.is_alive()
        yield server
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()
    assert_nothing_left(llm)
    assert server.service.worker.num_live == server.service.num_requests == 0


def assert_nothing_left(llm: LLM) -> None:
    """No request, and no block that somebody holds."""
    scheduler = llm.engine.scheduler
    assert scheduler.is_idle
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


@pytest.fixture(scope="module")
def server(tiny: LLM) -> Iterator[Server]:
    with serving(tiny) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def m27(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniMax-M2.7's configs beside drafters of full size for it, `dflash` and `eagle3`."""
    folder = tmp_path_factory.mktemp("full-size")
    full_size.write_drafter(folder / "dflash", full_size.DFLASH)
    full_size.write_drafter(folder / "eagle3", full_size.EAGLE3)
    return full_size.write_configs(folder / "m27")
