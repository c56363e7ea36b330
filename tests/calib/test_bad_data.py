"""Calibration data that cannot be used: what is said of it, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from m27quant.calib.data import parse_dataset
from m27quant.errors import CheckpointError, EnvironmentFault, M27Error, UsageError
from tests.calib.rows import jsonl, load

BAD_ROWS: dict[str, tuple[str, str]] = {
    "no-json": ("{not json}", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "no-object": ("[1, 2]", "must be an object, found list"),
    "no-field": ('{"id": 1, "label": "x"}', "no `input_ids`, `messages` or `text`"),
    "null": ('{"text": null}', "no `input_ids`, `messages` or `text`"),
    "number": ('{"text": 5}', "`text` is neither text"),
    "too-large-id": ('{"input_ids": [1, 2048]}', "token id 2048 is outside of the vocabulary of 2048"),
    "huge-id": ('{"input_ids": [1000000000000000000000000]}', "outside of the vocabulary"),
    "negative-id": ('{"input_ids": [-1]}', "token id -1 is outside"),
    "float-id": ('{"input_ids": [1.0]}', "`input_ids` is neither text"),
    "bool-id": ('{"input_ids": [true]}', "`input_ids` is neither text"),
    "mask-length": ('{"input_ids": [1, 2], "attention_mask": [1]}', "attention_mask and input_ids differ"),
    "mask-kind": ('{"input_ids": [1], "attention_mask": 1}', "attention_mask and input_ids differ"),
    "no-role": ('{"messages": [{"from": "human", "value": "x"}]}', "a chat turn without `role`"),
    "no-content": ('{"messages": [{"role": "user"}]}', "a chat turn without `content`"),
    "no-turn": ('{"messages": [{"role": "user", "content": "x"}, 5]}', "a chat turn is int"),
    "tools": ('{"messages": [{"role": "user", "content": "x"}], "tools": "x"}', "the chat template refuses"),
    "surrogate": ('{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
    "chat-surrogate": ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "half a surrogate pair"),
    "ansi": ('{"\\u001b[2Jevil": 1}', r"\\x1b[2Jevil"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(name: str, tiny: Path, tmp_path: Path) -> None:
    line, message = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"input_ids": [1, 2]}}\n\n{line}\n')
    with pytest.raises(CheckpointError) as caught:
        load(tiny, path)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert message.replace("\\\\", "\\") in caught.value.message
    assert "\x1b" not in caught.value.message


def test_invalid_utf8_is_named_too(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(CheckpointError, match=r"a\.jsonl, line 1: not valid JSON"):
        load(tiny, tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    with pytest.raises(CheckpointError, match=r"a\.txt: not UTF-8 at byte 3"):
        load(tiny, tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CheckpointError, match=r"a\.parquet: not a readable Parquet file"):
        load(tiny, tmp_path / "a.parquet")


def test_a_row_longer_than_the_model_takes(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 65}])
    with pytest.raises(CheckpointError, match="line 1: 65 tokens, the model takes at most 64"):
        load(tmp_path, data, max_length=64)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        load(tmp_path, data)
    assert "input_ids" in str(caught.value.hint)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load(tmp_path, data)


@pytest.mark.parametrize("content", ["", "\n\n", '{"input_ids": []}\n', '{"text": ""}\n'])
def test_a_file_without_a_usable_row(content: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match="no usable row"):
        load(tiny, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "argument", ["missing.jsonl", "./x", "/no/such", "a/b/c", "a b", "~nobody/x", "x" * 5000]
)
def test_a_dataset_that_is_neither_file_nor_hub_id(argument: str) -> None:
    with pytest.raises(UsageError, match="--dataset") as caught:
        parse_dataset(argument)
    assert caught.value.exit_code == 2


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(M27Error) as caught:
        load(tmp_path, [parse_dataset(str(tmp_path))])
    assert caught.value.exit_code in (2, 3)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_hub_data_set_offline(how: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(datasets, "load_dataset", never)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "environment")
    with pytest.raises(EnvironmentFault, match="offline mode is on") as caught:
        load(tiny, [parse_dataset("org/data")], offline=how == "option")
    assert caught.value.exit_code == 4
    assert "--dataset FILE" in str(caught.value.hint)


@pytest.mark.parametrize(
    "fault",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/data' is a gated dataset on the Hub."),
        ConnectionError("Couldn't reach 'org/data' on the Hub (\x1b[31mtimed out)\nsecond line"),
        ValueError("Unknown split \"train\". Should be one of ['test']."),
    ],
)
def test_a_hub_data_set_that_cannot_be_had(
    fault: Exception, tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EnvironmentFault, match=r"data set org/data \(train\) cannot be read") as caught:
        load(tiny, [parse_dataset("org/data")])
    assert caught.value.exit_code == 4
    assert "hf auth login" in str(caught.value.hint)
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "second line" not in caught.value.message


def test_a_fault_in_the_middle_of_a_stream(tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "x"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", breaks)
    with pytest.raises(EnvironmentFault, match="connection reset"):
        load(tiny, [parse_dataset("org/data")], samples=2)


def test_a_bad_row_of_a_stream_is_a_bad_row(
    tiny: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "x"}, {"label": 1}]))
    with pytest.raises(CheckpointError, match=r"org/data \(train\), row 2: no `input_ids`"):
        load(tiny, [parse_dataset("org/data")])
