"""Rows to samples: every form, which tokens are learned, and what is no sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.samples import Sample, read_samples
from m27quant.errors import M27Error


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Tokenizer:
    return Tokenizer(repository / "examples/tiny-m27")


def read(path: Path, *rows: Any, tokenizer: Tokenizer | None = None, **options: Any) -> list[Sample]:
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(path, tokenizer, **options)


def test_a_prompt_and_its_answer(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, {"id": "x", "prompt_token_ids": [5, 6, 7], "token_ids": [8, 9]})
    assert (sample.id, sample.ids, sample.num_prompt) == ("x", [5, 6, 7, 8, 9], 3)
    assert sample.loss_mask == [False, False, False, True, True]
    assert len(sample) == 5
    cut = sample.cut(4)
    assert (cut.ids, cut.loss_mask) == ([5, 6, 7, 8], [False, False, False, True])
    assert sample.cut(2).loss_mask == [False, False]
    assert sample.cut(2).num_prompt == 2


CHAT = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "a + b"},
    {"role": "user", "content": "Subtract."},
    {"role": "assistant", "reasoning_content": "Minus.", "content": "a - b"},
]


def test_of_a_chat_the_assistants_turns_are_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (sample,) = read(tmp_path, {"messages": CHAT}, tokenizer=tokenizer)
    text = tokenizer.render(CHAT)
    assert tokenizer.decode(sample.ids, skip_special_tokens=False) == text
    learned = [sample.ids[begin:end] for begin, end in sample.learned]
    spoken = [tokenizer.decode(ids, skip_special_tokens=False) for ids in learned]
    assert spoken == ["a + b[e~[", "Minus.\n</think>\n\na - b[e~["]
    prompt = tokenizer.rendered(tokenizer.render(CHAT[:1], add_generation_prompt=True))
    assert [*sample.ids[: sample.num_prompt], *tokenizer.rendered("<think>\n")] == prompt


def test_sharegpt_names_its_roles_otherwise(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT[:2]]
    both = read(tmp_path, {"conversations": turns}, {"messages": CHAT[:2]}, tokenizer=tokenizer)
    assert both[0].ids == both[1].ids
    assert both[0].learned == both[1].learned


def test_all_of_a_text_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (sample,) = read(tmp_path, {"text": "def add(a, b):\n"}, tokenizer=tokenizer)
    assert tokenizer.decode(sample.ids) == "def add(a, b):\n"
    assert all(sample.loss_mask)
    assert sample.num_prompt == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "must be an object"),
        ('{"a": 1}', "nothing to learn in a row with the keys a"),
        ('{"prompt_token_ids": [1], "token_ids": [1.5]}', "`token_ids` holds 1.5"),
        ('{"prompt_token_ids": [1], "token_ids": [true]}', "`token_ids` holds True"),
        ('{"prompt_token_ids": [1], "token_ids": [-1]}', "`token_ids` holds -1"),
        ('{"prompt_token_ids": [1], "token_ids": [256]}', "`token_ids` holds 256"),
        ('{"prompt_token_ids": "no", "token_ids": [1]}', "no list of token ids"),
        ('{"prompt_token_ids": [1], "token_ids": [99999999999999999999]}', "holds 99999999999999999999"),
        ('{"messages": []}', "no list of turns"),
        ('{"messages": ["hello"]}', "no list of turns"),
        ('{"messages": [{"content": "a"}]}', "without a role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
        ('{"conversations": [{"from": "\\u001b[31m", "value": "a"}]}', "without a role"),
        ('{"messages": [{"role": "user"}]}', "without content"),
        ('{"text": "\\ud800"}', "half a surrogate"),
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "a"', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: Tokenizer, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_token_ids": [1], "token_ids": [2]}\n\n' + line + "\n")
    with pytest.raises(M27Error, match="line 3") as fault:
        read_samples(path, tokenizer, vocab_size=256)
    assert said in fault.value.message
    assert fault.value.exit_code == 3
    assert fault.value.hint
    assert fault.value.message.isprintable()


def test_no_samples_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(M27Error, match="holds no samples"):
        read(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(M27Error, match=r"t\.txt: no JSON lines"):
        read_samples(tmp_path / "t.txt")
    with pytest.raises(M27Error, match="text needs a tokenizer"):
        read(tmp_path, {"text": "a"})
    with pytest.raises(M27Error, match="no such file"):
        read_samples(tmp_path / "missing.jsonl")


def test_a_folder_is_read_by_its_manifest(tmp_path: Path) -> None:
    with pytest.raises(M27Error, match="no data folder"):
        read_samples(tmp_path)
    manifest = {"schema_version": 1, "shards": [{"file": "../a", "sha256": "", "samples": 1}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(M27Error, match="no list of file"):
        read_samples(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 7}')
    with pytest.raises(M27Error, match="schema_version is 7"):
        read_samples(tmp_path)
