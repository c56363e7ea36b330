"""`m27quant bench`: what it prints, writes, refuses, and keeps when it is stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from m27quant.cli.app import main
from tests.bench.stub import STEPS, Behaviour, serving

TINY = str(Path(__file__).parents[2] / "examples" / "tiny-m27")


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return str(path)


def bench(url: str, task: str, *args: str) -> int:
    return main(
        ["bench", "--base-url", url, "--task", task, "--concurrency", "1,2", "--num-prompts", "2", *args]
    )


def test_a_server_in_every_form(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour("m27quant")) as (url, _):
        assert bench(url, task, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["schema_version"] == 1
        assert document["complete"] is True
        assert [c["concurrency"] for c in document["cells"]] == [1, 2]
        assert document["cells"][0]["acceptance"]["tau"] == 1 + sum(STEPS) / len(STEPS)
        assert bench(url, task, "--no-progress") == 0
        human = capsys.readouterr()
        assert human.err == ""
        assert "as served" in human.out
        assert "acceptance (usage): every verify step of these requests" in human.out
        assert bench(url, task, "-q") == 0
        assert [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()] == [
            ["own", "1", "as served"], ["own", "2", "as served"],
        ]  # fmt: skip
        table, drawing = tmp_path / "table.md", tmp_path / "sweep.svg"
        assert bench(url, task, "--format", "markdown", "-o", str(table), "--plot", str(drawing)) == 0
        assert capsys.readouterr().out == ""
        assert table.read_text().startswith("| task | drafts | tokens/s, 1 at once |")
        assert drawing.read_text().startswith("<svg xmlns=")
        assert bench(url, task, "--format", "markdown") == 0
        assert capsys.readouterr().out.startswith("| task |")


def test_a_checkpoint_alone(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, loading included; without a drafter there is no advice."""
    arguments = [
        "--task",
        task,
        "--concurrency",
        "1",
        "--num-prompts",
        "1",
        "--max-tokens",
        "4",
        "--device",
        "cpu",
    ]
    assert main(["bench", TINY, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (cell,) = found["cells"]
    assert (cell["setting"], cell["num_requests"]) == (None, 1)
    assert 1 <= cell["output_tokens"] <= 4
    assert found["machine"]["device"] == "cpu"
    assert (found["advice"], found["drafter"]) == ([], None)


def test_failed_requests_are_findings(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(fault=lambda n: (500, {"error": "odd"}) if n == 1 else None)) as (url, _):
        assert bench(url, task, "--no-progress") == 1
    said = capsys.readouterr()
    assert "failed: own, 1 at once: 1 of 2: HTTP 500: odd" in said.out
    assert "1 of 4 requests failed" in said.err


def test_ctrl_c_keeps_what_was_measured(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupting(at: int) -> Any:
        def fault(number: int) -> None:
            if number == at:
                os.kill(os.getpid(), signal.SIGINT)

        return fault

    saved = tmp_path / "bench.json"
    with serving(Behaviour("m27quant", fault=interrupting(at=4), pause_s=0.02)) as (url, _):
        assert bench(url, task, "--format", "json", "-o", str(saved)) == 130
    found = json.loads(saved.read_text())
    assert (found["complete"], [c["concurrency"] for c in found["cells"]]) == (False, [1])
    assert "what was measured is shown" in capsys.readouterr().err
    with serving(Behaviour("m27quant", fault=interrupting(at=1), pause_s=0.02)) as (url, _):
        assert bench(url, task, "-o", str(saved)) == 130
    assert "nothing was measured yet" in capsys.readouterr().err
    assert not saved.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        ([TINY, "--base-url", "http://a/v1"], "CHECKPOINT with --base-url"),
        (["--base-url", "http://a/v1", "--tree", "3/4/8", "--drafter", "d"], "--drafter and --tree with --base-url"),
        ([TINY, "--baseline-url", "http://a/v1", "--model", "m"], "--baseline-url and --model for a server"),
        ([TINY, "--api-key", "x"], "--api-key for a server"),
        ([TINY, "--block-size", "4", "--task", "gsm8k"], "settings of a drafter, but no drafter"),
        ([TINY, "--drafter-rope-theta", "1e4"], "settings of a drafter, but no drafter"),
        ([TINY, "--drafter", "ngram", "--drafter-tap-offset", "2"], "is auto, 0 or 1, not 2"),
        ([TINY, "--drafter", "ngram", "--tree", "3/4"], "'3/4' is not STEPS/TOPK/ROWS; write 3/4/8"),
        ([TINY, "--drafter", "ngram", "--block-size", "1"], "'1' is no number from 2"),
        ([TINY, "--drafter", "ngram", "--num-draft-tokens", "3,3"], "names a setting twice"),
        ([TINY, "--concurrency", "0"], "each has to be at least 1"),
        ([TINY, "--concurrency", "1,1"], "twice"),
        ([TINY, "--num-prompts", "1,2,3"], "3 numbers of prompts for 2"),
        ([TINY, "--num-prompts", "many"], "no whole numbers"),
        ([TINY, "--max-tokens", "0"], "--max-tokens"),
        ([TINY, "--temperature", "-1"], "--temperature"),
        ([TINY, "--json", "--output-format", "markdown"], "exclude each other"),
        ([TINY, "--format", "html"], "none of human, json, markdown"),
        ([TINY, "--task", "nothing"], "neither math500"),
        (["--base-url", "localhost:8000"], "not the address of a server"),
    ],
)  # fmt: skip
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


def test_a_task_of_the_hub_without_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", TINY, "--task", "mt-bench", "--format=json"]) == 4
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert "offline mode is on" in error["message"]
    assert "hf download --repo-type dataset HuggingFaceH4/mt_bench_prompts" in error["hint"]


def test_a_folder_that_is_not_there_is_known_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", TINY, "-o", str(tmp_path / "no" / "x.json")]) == 4
    assert "no/x.json" in capsys.readouterr().err
