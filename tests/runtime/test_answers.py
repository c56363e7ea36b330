"""Prompts in, answers out: refusals, order, what a killed run leaves and how it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m27quant.errors import M27Error
from m27quant.runtime.answers import AnswerFile, read_prompts

ROWS = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}], "tools": []}, {"prompt": "c"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_prompts_or_messages(source: Path) -> None:
    rows = read_prompts(source)
    assert [(row.prompt, row.messages) for row in rows] == [
        ("a", None),
        (None, [{"role": "user", "content": "b"}]),
        ("c", None),
    ]
    assert rows[2].where.endswith("line 3")


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        ("", "holds no prompts", 2),
        ("{}", "line 1: has no prompt", 3),
        ('{"prompt": "a"}\n{"prompt": "a", "messages": []}', "line 2: has prompt and messages", 3),
        ('{"prompt": 3}', "`prompt` is int", 3),
        ('{"messages": "x"}', "`messages` is str", 3),
        ('{"prompt": "a", "tools": {}}', "`tools` is dict", 3),
        ('["a"]', "must be an object", 3),
        ('{"prompt": "a"', "not valid JSON", 3),
        ('{"prompt": "a", "prompt": "b"}', "twice", 3),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, said: str, code: int) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(M27Error, match=said) as fault:
        read_prompts(path)
    assert fault.value.exit_code == code


def test_answers_come_out_in_the_order_of_the_rows(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with AnswerFile(out, source, {}, 3) as answers:
        assert answers.missing() == [0, 1, 2]
        for row in (2, 0, 1):
            answers.add(row, {"text": f"é{row}\ud800"})
            assert not out.exists()
        answers.finish()
    assert [line["text"] for line in lines(out)] == ["é0?", "é1?", "é2?"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_a_killed_run_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom m27quant.runtime.answers import AnswerFile\n"
        f"answers = AnswerFile(Path({str(out)!r}), Path({str(source)!r}), {{'seed': 1}}, 3)\n"
        "answers.add(1, {'text': 'one'})\nos._exit(137)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 137
    assert not out.exists()
    with (tmp_path / "answers.jsonl.partial").open("ab") as file:
        file.write(b'{"crc": 12, "bo')  # torn
    with AnswerFile(out, source, {"seed": 1}, 3, resume=True) as answers:
        assert answers.missing() == [0, 2]
        answers.add(2, {"text": "two"})
        answers.add(0, {"text": "zero"})
        answers.finish()
    assert [line["text"] for line in lines(out)] == ["zero", "one", "two"]
    with AnswerFile(out, source, {"seed": 1}, 3, resume=True) as answers:
        assert answers.was_complete
        assert answers.missing() == []
        answers.finish()


def unfinished(out: Path, source: Path) -> None:
    with AnswerFile(out, source, {"seed": 1, "top_k": 5}, 3) as answers:
        answers.add(0, {"text": "zero"})


def test_an_unfinished_run_is_neither_mixed_nor_lost(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    unfinished(out, source)
    with pytest.raises(M27Error, match="unfinished run") as fault:
        AnswerFile(out, source, {"seed": 1, "top_k": 5}, 3)
    assert fault.value.exit_code == 5
    with pytest.raises(M27Error, match="seed was 1, now 2") as fault:
        AnswerFile(out, source, {"seed": 2, "top_k": 5}, 3, resume=True)
    assert fault.value.exit_code == 2
    source.write_text('{"prompt": "other"}\n' * 3)
    with pytest.raises(M27Error, match="input file has changed"):
        AnswerFile(out, source, {"seed": 1, "top_k": 5}, 3, resume=True)
    with AnswerFile(out, source, {}, 3, overwrite=True) as answers:
        assert answers.missing() == [0, 1, 2]


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n")
    with pytest.raises(M27Error, match="is there already"):
        AnswerFile(out, source, {}, 3)
    assert out.read_text() == "mine\n"
    with pytest.raises(M27Error, match="exclude each other"):
        AnswerFile(out, source, {}, 3, resume=True, overwrite=True)


def test_two_runs_do_not_write_the_same_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with AnswerFile(out, source, {}, 3), pytest.raises(M27Error, match="another run") as fault:
        AnswerFile(out, source, {}, 3, resume=True)
    assert fault.value.exit_code == 5


def test_a_folder_that_is_not_there_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(M27Error, match="no such folder"):
        AnswerFile(tmp_path / "no" / "answers.jsonl", source, {}, 3)


def test_the_input_is_never_replaced(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(M27Error, match="is the input"):
        AnswerFile(source, source, {}, 3, overwrite=True)
    assert source.read_bytes() == before
