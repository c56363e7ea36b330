"""Prompts word for word, files by their columns, and what is said where there is no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m27quant.bench.tasks import TASKS, load_task
from m27quant.errors import CheckpointError, EnvironmentFault, M27Error, UsageError

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "math500": (
        {"problem": "What is $1+1$?", "solution": "", "answer": "2", "subject": "Algebra", "level": 1},
        "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ),
    "gsm8k": (
        {"question": "Ann has {two} apples.", "answer": "#### 2"},
        "Ann has {two} apples.\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "entry_point": "f",
            "test": "",
            "canonical_solution": "",
        },
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\ndef f():\n\n```",
    ),
    "mt-bench": (
        {"prompt": ["Write a poem.", "Now shorter."], "category": "writing", "prompt_id": 1, "reference": []},
        "Write a poem.",
    ),
}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_task_has_its_data_set() -> None:
    """Hub ids, configurations and splits of the benchmark whose cards we compare with."""
    assert {name: (t.hub_id, t.config, t.split) for name, t in TASKS.items()} == {
        "math500": ("HuggingFaceH4/MATH-500", None, "test"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
        "humaneval": ("openai/openai_humaneval", None, "test"),
        "mt-bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    }


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("named", [True, False], ids=["NAME=FILE", "FILE"])
def test_the_wrapper_of(name: str, named: bool, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    path = written(tmp_path / "rows.jsonl", row)
    found = load_task(f"{name}={path}" if named else str(path))
    assert found.conversations == [[{"role": "user", "content": expected}]]
    assert found.name == (name if named else "rows")


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row, expected = ROWS["gsm8k"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "test.parquet")
    found = load_task(f"gsm8k={tmp_path / 'test.parquet'}")
    assert [c[0]["content"] for c in found.conversations] == [expected] * 2
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="not a readable Parquet"):
        load_task(str(tmp_path / "no.parquet"))


def test_plain_prompts_and_messages_stay_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rows = {"prompt": "Hello {}"}, {"messages": turns}, {"turns": ["First", "Second"], "question_id": 81}
    assert load_task(str(written(tmp_path / "own.jsonl", *rows))).conversations == [
        [{"role": "user", "content": "Hello {}"}], turns, [{"role": "user", "content": "First"}],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "fault", "message"),
    [
        ("", UsageError, "holds no rows"),
        ("{", CheckpointError, "line 1"),
        ('{"prompt": "a"}\n[1]\n', CheckpointError, "line 2: a row must be an object"),
        ('{"prompt": "a"}\n{"text": "a"}\n', CheckpointError, "line 2: none of the columns"),
        ('{"problem": 3}', CheckpointError, "line 1: no text in the column 'problem', which math500 needs"),
        ('{"prompt": []}', CheckpointError, "no text in the column 'prompt', which mt-bench needs"),
        ('{"prompt": "  "}', CheckpointError, "none of the columns"),
        ('{"messages": [{"content": "a"}]}', CheckpointError, "line 1: a message has no role"),
    ],
)
def test_bad_rows_are_named(content: str, fault: type[M27Error], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(fault, match=message) as caught:
        load_task(str(path))
    assert caught.value.hint


@pytest.mark.parametrize("argument", ["aime", "no/such.jsonl", "math500=no.jsonl", "other=no.jsonl", ""])
def test_what_is_neither_task_nor_file(argument: str) -> None:
    with pytest.raises(UsageError, match=r"neither .*math500|no such file") as caught:
        load_task(argument)
    assert "--task" in (caught.value.hint or "")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("name", TASKS)
def test_without_the_hub_it_says_how_to_go_on(name: str) -> None:
    """Tests run offline."""
    with pytest.raises(EnvironmentFault, match="offline mode is on") as caught:
        load_task(name)
    hint = caught.value.hint or ""
    assert f"hf download --repo-type dataset {TASKS[name].hub_id}" in hint
    assert f"--task {name}=FILE" in hint


def test_a_hub_that_fails_is_a_fault_of_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((*args, kwargs["split"]))
        if len(asked) == 1:
            return [ROWS["gsm8k"][0]]
        raise ConnectionError("no route\x1b[31m to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert load_task("gsm8k").conversations[0][0]["content"] == ROWS["gsm8k"][1]
    with pytest.raises(EnvironmentFault, match=r"math500.*no route\\x1b\[31m to host$"):
        load_task("math500")
    assert asked == [("openai/gsm8k", "main", "test"), ("HuggingFaceH4/MATH-500", None, "test")]
