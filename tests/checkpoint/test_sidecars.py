"""The small files: what comes along, what is changed in it, what is said about what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.sidecars import collect, end_of_turn_id, has_remote_code, to_json
from m27quant.checkpoint.strict_json import parse
from m27quant.errors import CheckpointError

TOKENIZER = {"added_tokens": [{"id": 7, "content": "]~b]"}, {"id": 200020, "content": "[e~["}], "model": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "x": "é"})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 200020, "top_k": 40}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path


def test_files_come_along_byte_for_byte(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"a b\r\n\xff")
    (folder / "LICENSE").write_bytes(b"MIT")
    (folder / "secret.env").write_text("no")
    files, notices = collect(folder, {})
    assert sorted(files) == [
        "LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    for name in ("merges.txt", "LICENSE", "tokenizer.json", "chat_template.jinja"):
        assert files[name] == (folder / name).read_bytes()
    assert notices == []


def test_the_tokenizer_class_is_one_that_transformers_5_reads_rightly(folder: Path) -> None:
    config = json.loads(collect(folder, {})[0]["tokenizer_config.json"])
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "x": "é"}
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert json.loads(collect(folder, {})[0]["tokenizer_config.json"]) == {
        "tokenizer_class": "LlamaTokenizer"
    }
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (folder / "tokenizer.json").unlink()
    assert json.loads(collect(folder, {})[0]["tokenizer_config.json"]) == {"tokenizer_class": "GPT2Tokenizer"}


def test_the_end_of_a_turn_is_named(folder: Path) -> None:
    assert json.loads(collect(folder, {})[0]["generation_config.json"]) == {
        "eos_token_id": 200020,
        "top_k": 40,
    }
    (folder / "generation_config.json").unlink()
    files, notices = collect(folder, {})
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 200020}
    assert "200020" in notices[0]
    (folder / "tokenizer.json").write_text("{}")
    files, notices = collect(folder, {})
    assert "generation_config.json" not in files
    assert any("engines may not stop" in n for n in notices)


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        [],
        [7],
        [{}],
        [{"content": "[e~["}],
        [{"content": "[e~[", "id": "7"}],
        [{"content": "x", "id": 7}],
    ],
)
def test_no_end_of_turn(tokens: Any) -> None:
    assert end_of_turn_id({"tokenizer.json": json.dumps({"added_tokens": tokens}).encode()}) is None


def test_every_missing_file_is_said(tmp_path: Path) -> None:
    files, notices = collect(tmp_path, {})
    assert files == {}
    assert [n for n in notices if "no tokenizer.json" in n]
    assert [n for n in notices if "no chat template" in n]


def test_a_template_within_the_tokenizer_config_counts(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    assert collect(folder, {})[1] == []


def test_code_comes_along_whole_or_not_at_all(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit")
    auto_map = {"AutoModel": "modeling_x.A", "AutoConfig": "configuration_x.B"}
    files, notices = collect(folder, {"auto_map": auto_map})
    assert not has_remote_code(files)
    assert any("auto_map is left out" in n for n in notices)
    (folder / "configuration_x.py").write_text("x = 1")
    files, notices = collect(folder, {"auto_map": auto_map})
    assert has_remote_code(files)
    assert files["configuration_x.py"] == b"x = 1"
    assert any("was not run" in n for n in notices)


@pytest.mark.parametrize("auto_map", [None, [], "x", 7, {}])
def test_an_auto_map_that_is_none(auto_map: Any, folder: Path) -> None:
    assert not has_remote_code(collect(folder, {"auto_map": auto_map})[0])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"]
)
def test_links_out_of_the_folder_are_refused(
    name: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x"
    outside.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves the folder") as raised:
        collect(folder, {})
    assert raised.value.hint


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=4), JSON_VALUES, max_size=4))
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    """Half surrogate pairs included, which UTF-8 has no bytes for."""
    assert parse(to_json(value), "x") == value
