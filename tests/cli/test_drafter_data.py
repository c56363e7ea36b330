"""`drafter generate-data` as a program: its streams, exit codes, and the command that its manifest names."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from m27quant.cli.app import main
from m27quant.cli.drafter_data import parse_range
from m27quant.drafters.text_data import Cut
from m27quant.errors import UsageError


def test_data_are_made_and_made_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "data"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    command = [
        "drafter",
        "generate-data",
        str(repository / "examples/tiny-m27"),
        str(out),
        "--dataset",
        str(text),
    ]
    options = [
        "--num-samples",
        "3",
        "--max-tokens",
        "4",
        "--prompt-tokens",
        "4:8",
        "--temperature",
        "0",
        "--ignore-eos",
    ]
    monkeypatch.setattr(sys, "argv", ["m27quant", *command, *options, "--json", "--overwrite"])
    assert main([*command, *options, "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (document["schema_version"], document["samples"], document["tokens"]) == (1, 3, 12)
    assert all(json.loads(line) for line in said.err.splitlines())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == shlex.join(
        ["m27quant", *command[:3], "OUT", *command[4:], *options, "--json"]
    )
    rows = [json.loads(line) for line in (out / "shard-00000.jsonl").read_text().splitlines()]
    assert [len(row["token_ids"]) for row in rows] == [4, 4, 4]
    assert main([*command, *options]) == 2
    refused = capsys.readouterr().err
    assert "finished data are there already" in refused
    assert "--resume" in refused


@pytest.mark.parametrize("text", ["", "a", "0", "5:4", "1:2:3", "-1:4", "¹:4"])
def test_lengths_are_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="prompt"):
        Cut(prompt_tokens=parse_range(text))


def test_one_length_or_two() -> None:
    assert parse_range("64") == (64, 64)
    assert parse_range("16:256") == (16, 256)
