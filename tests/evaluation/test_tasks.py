"""Standard tasks: lm-eval's entry points are stood in for, all that it asks and is answered is real."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.cli.app import main
from m27quant.errors import EnvironmentFault, UsageError
from m27quant.evaluation.serving import find_endpoint, served, tasks_of
from m27quant.evaluation.tasks import TaskOptions, plan_tasks, read_results, require_lm_eval, run_tasks
from tests.evaluation import fake_lm_eval
from tests.evaluation.conftest import CPU, Files

MINE = ("lm_eval", "aiohttp", "tenacity")
WORDS = TaskOptions(tasks=("words",), limit=4, num_fewshot=2)


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, in place of an lm-eval that may be there."""
    fake_lm_eval.write_to(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in MINE}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in MINE]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("chat", [False, True])
def test_the_builtin_server_is_asked(lm_eval: None, repository: Path, chat: bool) -> None:
    asked = TaskOptions(tasks=("words",), limit=4, num_fewshot=2, apply_chat_template=chat)
    with open_checkpoint(Location(repository / "examples/tiny-m27")) as source:
        found = tasks_of(source, None, plan_tasks(asked, echoes=False), device=CPU)
    words = found["words"]
    assert (words["version"], words["num_samples"], words["num_fewshot"]) == (1.0, 4, 2)
    assert words["metrics"]["exact_match,none"]["value"] == 0.75, "four tokens came for each question"
    import lm_eval as stand_in

    (call,) = stand_in.CALLS
    assert call["model"] == ("local-chat-completions" if chat else "local-completions")
    assert call["model_args"]["base_url"].endswith("/v1/chat/completions" if chat else "/v1/completions")
    assert call["model_args"]["tokenizer_backend"] == "none"


def test_a_server_that_is_there(lm_eval: None, repository: Path) -> None:
    """With tasks that score given answers, which the builtin one would have refused."""
    with (
        open_checkpoint(Location(repository / "examples/tiny-m27")) as source,
        served(source, None, device=torch.device("cpu")) as endpoint,
    ):
        assert find_endpoint(endpoint.api, source.folder) == endpoint
        plan = plan_tasks(TaskOptions(tasks=("words", "group"), limit=2), echoes=True)
        assert plan.scored
        run_tasks(endpoint, plan)
    import lm_eval as stand_in

    assert stand_in.CALLS[0]["model_args"]["tokenizer"] == str(repository / "examples/tiny-m27")
    with pytest.raises(EnvironmentFault, match="lm-eval stopped: URLError"):
        run_tasks(endpoint, plan)  # it has ended


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        (TaskOptions(tasks=("wrods",)), UsageError, "no task wrods"),
        (
            TaskOptions(tasks=("words", "choice")),
            UsageError,
            "choice: given answers are scored, and the builtin",
        ),
        (TaskOptions(tasks=("group",)), UsageError, "choice: given answers are scored"),
        (
            TaskOptions(tasks=("remote",)),
            EnvironmentFault,
            "cannot load remote: ConnectionError: cannot reach",
        ),
    ],
)
def test_what_cannot_be_is_said_before(
    lm_eval: None, asked: TaskOptions, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        plan_tasks(asked, echoes=False)


def test_chats_score_nothing(lm_eval: None) -> None:
    with pytest.raises(UsageError, match="chat completions have no log probabilities"):
        plan_tasks(TaskOptions(tasks=("choice",), apply_chat_template=True), echoes=True)


def test_without_the_extra_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m27quant.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="no module lm_eval") as caught:
        require_lm_eval()
    assert caught.value.hint == "pip install 'm27quant[eval]'"


def test_intervals_of_results() -> None:
    share = {"exact_match,none": 0.75, "exact_match_stderr,none": math.sqrt(0.75 * 0.25 / 7)}
    other = {
        "bleu,none": 12.5,
        "bleu_stderr,none": 0.5,
        "f1,none": 0.25,
        "f1_stderr,none": "N/A",
        "alias": "x",
    }
    none = {"acc,none": 0.0, "acc_stderr,none": 0.0}
    found = read_results({
        "results": {"a": {**share, **other}, "b": none},
        "versions": {"a": 2}, "n-samples": {"a": {"effective": 8}, "b": {"effective": 8}}, "n-shot": {"a": 5},
    })  # fmt: skip
    metrics = found["a"]["metrics"]
    assert metrics["exact_match,none"]["low"] == pytest.approx(0.409275, abs=1e-5)  # Wilson's, 6 of 8
    assert metrics["exact_match,none"]["high"] == pytest.approx(0.928521, abs=1e-5)
    assert metrics["bleu,none"]["high"] == pytest.approx(12.5 + 1.959964 * 0.5)
    assert math.isnan(metrics["f1,none"]["low"])
    assert set(metrics) == {"exact_match,none", "bleu,none", "f1,none"}
    assert found["b"]["metrics"]["acc,none"]["high"] > 0.3, "0 of 8 is not surely 0"
    assert read_results({}) == {}


def test_the_command(
    lm_eval: None, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without tokenizer can be served; what it is asked in text is refused, and that is said."""
    asked = [
        "eval", str(files.max), "--reference", str(files.reference), "--dataset", str(files.rows), "--device", "cpu",
        "--num-samples", "2", "--num-prompts", "0", "--no-progress", "--json",
    ]  # fmt: skip

    def answer(endpoint: Any, plan: Any) -> dict[str, Any]:
        assert plan.options == WORDS
        return {"words": {"metrics": {"acc,none": {"value": 0.5, "low": 0.4, "high": 0.6}}}}

    monkeypatch.setattr("m27quant.evaluation.serving.run_tasks", answer)
    assert main([*asked, "--tasks", "words", "--limit", "4", "--num-fewshot", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["candidates"][0]["tasks"]["words"]["metrics"]["acc,none"]["value"] == 0.5
    assert document["reference"]["tasks"] == document["candidates"][0]["tasks"]
    for option in (
        ["--base-url", "http://127.0.0.1:1/v1"], ["--limit", "3"], ["--num-fewshot", "0"], ["--include-path", "."],
        ["--apply-chat-template"],
    ):  # fmt: skip
        assert main([*asked, *option]) == 2
    assert main([*asked, "--tasks", "words", "--base-url", "http://127.0.0.1:1/v1"]) == 4
    assert main([*asked, "--tasks", "choice"]) == 2
