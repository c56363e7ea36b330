"""The bundled runtime as it is measured, and a server of it: the same acceptance, to the last count."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m27quant.bench.inprocess import InProcess
from m27quant.bench.requests import BenchOptions, make_requests
from m27quant.bench.result import BenchResult
from m27quant.bench.run import bench_checkpoint, bench_server
from m27quant.bench.settings import Setting
from m27quant.bench.tasks import load_task
from m27quant.bench.variants import describe, resized, run_flags
from m27quant.errors import Interrupted, UsageError
from m27quant.llm import load
from m27quant.runtime.api import LLM
from m27quant.runtime.chat import chat_prompt
from m27quant.runtime.generation import SamplingParams
from m27quant.runtime.options import RunOptions
from m27quant.runtime.speculative.load import DrafterOptions
from tests.threads import one_thread as one_thread

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, DFLASH, EAGLE3 = EXAMPLES / "tiny-m27", EXAMPLES / "tiny-m27-dflash", EXAMPLES / "tiny-m27-eagle3"
QUESTIONS = ["Write a function that reads a file.", "def add(a, b):", "import os"]
MAX_TOKENS = 12
BLOCK_8 = DrafterOptions(num_draft_tokens=7)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    path.write_text("".join(f'{{"prompt": "{q}"}}\n' for q in QUESTIONS))
    return str(path)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(TINY, RunOptions(max_num_seqs=3), drafter=DFLASH, check=False)


def options(task: str, **changes: Any) -> BenchOptions:
    values: dict[str, Any] = {
        "tasks": (task,),
        "concurrency": (1, 3),
        "num_prompts": (3,),
        "max_tokens": MAX_TOKENS,
    }
    return BenchOptions(**(values | changes))


@pytest.fixture(scope="module")
def result(task: str) -> BenchResult:
    return bench_checkpoint(TINY, options(task), drafter=DFLASH, drafter_options=BLOCK_8)


def test_every_cell_is_measured_with_and_without(result: BenchResult) -> None:
    assert [(c.concurrency, c.setting) for c in result.cells] == [
        (1, None), (1, "block 8"), (3, None), (3, "block 8"),
    ]  # fmt: skip
    assert result.complete
    assert {c.output_tokens for c in result.cells[:2]} == {result.cells[0].output_tokens}
    plain, drafted = result.cells[:2]
    assert plain.acceptance.stats is not None
    assert plain.acceptance.stats.num_drafted == 0
    assert plain.acceptance.stats.num_steps == plain.output_tokens - plain.num_requests
    stats = drafted.acceptance.stats
    assert stats is not None
    assert stats.num_accepted > 0
    # all tokens but each answer's first come from steps; a step that ends an answer may lose its last one
    given = stats.num_steps + stats.num_accepted
    assert 0 <= given - (drafted.output_tokens - drafted.num_requests) <= drafted.num_requests
    for cell in result.cells:
        assert cell.num_requests == 3
        assert cell.errors == {}
        assert cell.ttft_s is not None
        assert cell.itl_s is not None
        assert cell.step_verify_s
    assert [a.concurrency for a in result.advice] == [1, 3]
    assert all(s.predicted for s in result.speeds())


def test_the_answers_are_those_of_the_runtime(llm: LLM, task: str) -> None:
    o = options(task)
    _, requests = make_requests(load_task(task).conversations, o, 1)
    with llm.without_drafter():
        prompts = [chat_prompt(llm.tokenizer, r.messages).token_ids for r in requests]  # type: ignore[arg-type]
        expected = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    heard: list[tuple[int, int]] = []
    reading = InProcess(llm, o, llm.engine.drafter).run(requests, 2, lambda a, t: heard.append((a, t)))
    assert [a.output_tokens for a in reading.answers] == [len(e.token_ids) for e in expected]
    assert [a.prompt_tokens for a in reading.answers] == [len(p) for p in prompts]
    assert tuple(map(sum, zip(*heard, strict=True))) == (3, sum(a.output_tokens for a in reading.answers))


def test_a_drafter_takes_other_settings_and_keeps_its_weights(llm: LLM, task: str) -> None:
    drafter = llm.engine.drafter
    assert drafter is not None
    small = resized(drafter, Setting("block", 4))
    assert (small.num_draft_tokens, describe(small), run_flags(small)) == (
        3,
        "block 4",
        "--num-draft-tokens 3",
    )
    assert small.weights is drafter.weights  # type: ignore[attr-defined]
    assert describe(resized(drafter, Setting("chain", 3))) == "block 4"
    _, requests = make_requests(load_task(task).conversations, options(task), 1)
    reading = InProcess(llm, options(task), small).run(requests, 3, lambda a, t: None)
    stats = reading.acceptance.stats
    assert stats is not None
    assert len(stats.histogram) <= 4
    assert stats.num_drafted <= 3 * stats.num_steps
    assert llm.engine.drafter is drafter
    with pytest.raises(UsageError, match=r"--tree is for EAGLE3.*DFlashDrafter"):
        resized(drafter, Setting("tree", 8, 3, 4))
    with pytest.raises(UsageError, match="num_draft_tokens is 63; this drafter's block_size"):
        resized(drafter, Setting("block", 64))


def test_eagle3_takes_chains_and_trees(task: str) -> None:
    settings = (Setting("chain", 2), Setting("tree", 6, 3, 2))
    found = bench_checkpoint(
        TINY,
        options(task, settings=settings, concurrency=(2,), num_prompts=(2,)),
        drafter=EAGLE3,
        check=False,
    )
    assert [c.setting for c in found.cells] == [None, "chain 2", "tree 3/2/6"]
    drafts = [c.acceptance.stats.drafts_per_step for c in found.cells if c.acceptance.stats]
    assert 0 == drafts[0] < drafts[1] <= 2 < drafts[2] <= 5
    with pytest.raises(UsageError, match="--block-size is for DFlash, not for an EAGLE3 drafter"):
        bench_checkpoint(TINY, options(task, settings=(Setting("block", 4),)), drafter=EAGLE3, check=False)


def test_prompt_lookup_needs_no_folder(task: str) -> None:
    o = options(task, settings=(Setting("chain", 3),), concurrency=(1,), num_prompts=(1,), repeat=2)
    found = bench_checkpoint(TINY, o, drafter="ngram", check=False)
    assert [(c.setting, c.num_requests) for c in found.cells] == [(None, 2), ("3 drafts", 2)]
    with pytest.raises(UsageError, match="--block-size is for DFlash, not for a NgramDrafter"):
        bench_checkpoint(TINY, options(task, settings=(Setting("block", 4),)), drafter="ngram", check=False)


def test_what_a_drafter_cannot_is_known_before_the_model_is_loaded(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m27quant.llm.load", lambda *a, **k: pytest.fail("it was loaded"))
    for setting, message in (
        (Setting("tree", 8, 3, 4), "--tree is for EAGLE3, not for a DFlash drafter"),
        (Setting("block", 64), "64 rows are more than this drafter's block_size"),
        (Setting("chain", 63), "63 drafts are more than this drafter's block_size"),
    ):
        with pytest.raises(UsageError, match=message):
            bench_checkpoint(TINY, options(task, settings=(setting,)), drafter=DFLASH)


def test_a_drafter_of_other_taps_is_refused(llm: LLM) -> None:
    other = resized(llm.engine.drafter, Setting("block", 4))  # type: ignore[arg-type]
    other.taps = (1, 2)  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"reads hidden states \[1, 2\]"), llm.drafting_with(other):
        pass


def test_settings_want_a_drafter(task: str) -> None:
    with pytest.raises(UsageError, match="settings of a drafter, but no drafter"):
        bench_checkpoint(TINY, options(task, settings=(Setting("chain", 1),)))


def test_what_stops_it_leaves_nothing_running(llm: LLM, task: str) -> None:
    def stop(answers: int, tokens: int) -> None:
        raise Interrupted("stopped by SIGINT")

    _, requests = make_requests(load_task(task).conversations, options(task), 1)
    drafter = llm.engine.drafter
    with pytest.raises(Interrupted):
        InProcess(llm, options(task), None).run(requests, 2, stop)
    assert llm.engine.scheduler.running == []
    assert not llm.engine.scheduler.waiting
    assert llm.engine.drafter is drafter


def test_a_prompt_too_long_is_an_error_of_its_own(task: str, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{{"prompt": "{"b " * 400}"}}\n')
    found = bench_checkpoint(
        TINY, options(str(path), concurrency=(1,), num_prompts=(2,)), check=False,
        run_options=RunOptions(max_model_len=120),
    )  # fmt: skip
    (cell,) = found.cells
    assert list(cell.errors.values()) == [1]
    assert next(iter(cell.errors)).startswith("the prompt has ")


# -- a server of the same model ----------------------------------------------------------------------

PROGRAM = """
import sys
from m27quant.runtime.options import RunOptions
from m27quant.runtime.speculative.load import DrafterOptions
from m27quant.serve.server import ServerOptions, serve
block_8 = DrafterOptions(num_draft_tokens=7)
serve(sys.argv[1], RunOptions(), sys.argv[2], ServerOptions(port=int(sys.argv[3])), drafter_options=block_8)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The project's own server as a process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(TINY), str(DFLASH), str(port)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_server_gives_the_same_acceptance_as_the_runtime(
    server: str, task: str, result: BenchResult
) -> None:
    """Counts of steps, of drafts, of accepted drafts at each position, and of tokens."""
    found = bench_server(server, options(task))
    drafted = [c for c in result.cells if c.setting is not None]
    assert len(found.cells) == len(drafted) == 2
    for here, there in zip(drafted, found.cells, strict=True):
        assert there.acceptance.source == "usage"
        assert there.acceptance.stats == here.acceptance.stats
        assert (there.prompt_tokens, there.output_tokens) == (here.prompt_tokens, here.output_tokens)
        assert there.finish_reasons == here.finish_reasons
        assert (there.zlab_local, there.zlab_server) == (here.zlab_local, here.zlab_server)


def test_its_counters_say_the_same_of_steps_that_drafted(
    server: str, task: str, result: BenchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as vLLM's are: the usage of the answers is not looked at."""
    monkeypatch.setattr("m27quant.bench.openai_client._stats", lambda event: None)
    found = bench_server(server, options(task, concurrency=(1,)))
    counted, here = found.cells[0].acceptance, result.cells[1].acceptance.stats
    assert counted.source == "counters"
    assert counted.stats is not None
    assert here is not None
    assert counted.stats.positions == here.positions
    assert counted.stats.num_drafted == here.num_drafted
    assert counted.stats.num_steps <= here.num_steps
    assert found.notices == []
