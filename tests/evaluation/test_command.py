"""`m27quant eval`: what goes to which stream, and which exit code it ends in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from m27quant.cli.app import main
from tests.evaluation.conftest import Files


def command(files: Files, *more: str) -> list[str]:
    return [
        "eval", str(files.max), "--reference", str(files.reference), "--dataset", str(files.rows), "--device", "cpu",
        "--num-samples", "3", "--num-prompts", "0", "--no-progress", *more,
    ]  # fmt: skip


def strict(text: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_json_is_the_whole_result(files: Files, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--json", "--activations", "nvfp4,bf16")) == 0
    document = strict(capsys.readouterr().out)
    jsonschema.validate(document, json.loads((repository / "docs/schemas/eval.schema.json").read_text()))
    assert document["data"]["num_windows"] == 3
    assert document["ok"] is True
    assert [row["mode"] for row in document["candidates"]] == ["W4A4, FP8 KV", "W4A16, FP8 KV"]
    row = document["candidates"][0]
    assert set(row["kl"]) == {"mean", "p99", "max"}
    assert row["kl"]["mean"]["low"] < row["kl"]["mean"]["value"] < row["kl"]["mean"]["high"]
    assert len(row["router"]) == len(row["layer_sqnr_db"]) == 2
    assert {pair["metric"] for pair in document["pairs"]} == {"kl", "nll", "top1", "top8"}
    assert {"a", "b", "difference", "low", "high", "p"} < set(document["pairs"][0])


def test_beyond_a_limit_is_exit_code_1_and_said(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--max-kl", "0.0001", "--quiet")) == 1
    out, err = capsys.readouterr()
    assert float(out) > 0.0001
    assert "max: mean KL divergence is" in err
    assert "the limit 0.0001" in err


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--activations", "int4"], 2, "--activations int4: int4 is none of auto, nvfp4, bf16"),
        (["--seq-len", "5000"], 2, "2 to 1024"),
        (["--min-top1", "2"], 2, "--min-top1"),
        (["--dataset", "nowhere.txt"], 2, "no such file"),
        (["--reference", "./nowhere"], 3, "no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(
    more: list[str], code: int, words: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, *more)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in " ".join(err.split())


def test_a_hostile_name_is_shown_escaped(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "evil\x1b[31m"
    link.symlink_to(files.max)
    asked = command(files, "--max-kl", "0.0001")
    asked[1] = str(link)
    assert main(asked) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
