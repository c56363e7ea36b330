"""`drafter eval` as a program: table, JSON, cards, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from m27quant.cli.app import main

Capture = pytest.CaptureFixture[str]

SMALL = ("--num-prompts", "2", "--prompt-tokens", "8", "--max-tokens", "12", "--stride", "2")


def test_two_targets_side_by_side_and_the_card(
    repository: Path, nvfp4: Path, tmp_path: Path, capsys: Capture
) -> None:
    examples, drafter = repository / "examples", tmp_path / "drafter"
    shutil.copytree(examples / "tiny-m27-dflash", drafter)
    (drafter / "README.md").write_text("# drafter\n")
    code = main([
        "drafter", "eval", str(drafter), "--target", str(examples / "tiny-m27"), "--target", str(nvfp4),
        "--activations", "nvfp4,bf16", "--dataset", str(examples / "tiny-m27/heldout.txt"), "--num-draft-tokens", "4",
        *SMALL, "--json", "--write-card",
    ])  # fmt: skip
    assert code == 0
    done = capsys.readouterr()
    document = json.loads(done.out)
    rows = document["results"]
    assert [row["mode"] for row in rows] == ["unquantized, BF16 KV", "W4A4, FP8 KV", "W4A16, FP8 KV"]
    for key in ("tau", "m_accept", "c_k", "val_loss", "blocks"):
        assert document[key] == rows[0][key], "the first row's figures stand at the top, too"
    assert [row["difference"] is None for row in rows] == [True, False, False]
    assert rows[1]["difference"]["value"] == pytest.approx(rows[1]["tau"] - rows[0]["tau"])
    card = (drafter / "README.md").read_text()
    assert f"**{rows[2]['tau']:.3f}**" in card
    assert "heldout.txt" in card


def test_the_table(repository: Path, capsys: Capture) -> None:
    examples = repository / "examples"
    code = main([
        "drafter", "eval", "ngram", "--target", str(examples / "tiny-m27"), "--dataset",
        str(examples / "tiny-m27/heldout.txt"), *SMALL, "--no-progress",
    ])  # fmt: skip
    assert code == 0
    done = capsys.readouterr()
    assert done.out.startswith("drafter")
    assert "ngram up to 8  tiny-m27  unquantized, BF16 KV" in done.out
    assert "24 tokens behind 2 prompts" in done.out


def test_slips_are_heard_of_before_a_target_is_loaded(
    repository: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m27quant.drafters.evaluate.load", lambda *args, **options: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    tiny, empty = str(repository / "examples/tiny-m27"), str(tmp_path / "empty")
    for drafter, dataset, said in (
        (tiny, "README.md", "neither DFlash nor EAGLE3"),
        ("ngram", "missing.jsonl", "no such file"),
        ("ngram", empty, "no data folder"),
        ("missing", "README.md", "no such folder"),
    ):
        assert main(["drafter", "eval", drafter, "--target", tiny, "--dataset", dataset]) in (2, 3)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--activations", "nvfp4,fp8"), "fp8 is none of auto, nvfp4, bf16"),
        (("--kv-cache-dtype", ""), "is none of auto, fp8, bf16"),
        (("--num-draft-tokens", "7,x"), "no list of numbers"),
        (("--write-card",), "README.md is not there"),
        (("--drafter-tap-offset", "2"), "auto, 0 or 1"),
        (("--num-prompts", "0"), "--num-prompts"),
    ],
)
def test_refusals(options: tuple[str, ...], said: str, capsys: Capture) -> None:
    assert main(["drafter", "eval", "x", "--target", "y", "--dataset", "z", *options]) == 2
    assert said in capsys.readouterr().err
