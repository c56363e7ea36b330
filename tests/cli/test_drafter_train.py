"""`m27quant drafter train` as a command: what it prints, what it refuses, and that every option is passed on."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import m27quant.drafters.train
from m27quant import TrainOptions
from m27quant.cli.app import main
from tests.checkpoints import write_checkpoint
from tests.drafters.conftest import TARGET, write_rows

SIZES = ("--layers", "1", "--block-size", "4", "--taps", "1,3", "--intermediate-size", "24", "--steps", "2",
         "--batch-size", "2", "--anchors-per-seq", "3")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    target = write_checkpoint(folder / "model", TARGET)
    return "--target", str(target), "--data", str(write_rows(folder / "rows.jsonl", 8))


def test_json_is_one_document(
    inputs: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["drafter", "train", "dflash", *inputs, "--out", str(out), *SIZES, "--heldout", "25%", "--json"]
    assert main(argv) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["schema_version"], found["kind"], found["steps"], found["was_complete"]) == (
        1,
        "dflash",
        2,
        False,
    )
    assert len(found["accuracy"]) == 3
    assert {"val_loss", "tau", "m_accept", "c_k", "blocks"} <= found["heldout"].keys()
    lines = [json.loads(line) for line in said.err.splitlines()]
    beats = [line["progress"] for line in lines if "progress" in line]
    assert beats, "off a terminal a line says that it lives"
    assert beats[0]["loss"] > 0
    assert len(beats[0]["accuracy"]) == 3
    card = (out / "README.md").read_text()
    assert f"--out {out}" in card or "m27quant" in card
    assert main([*argv, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["was_complete"] is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--taps", "1;2"), "no list of numbers"),
        (("--loss", "soft"), "none"),
        (("--layout", "flat"), "layout must be one of"),
        (("--cache-size", "much"), "not a size"),
        (("--heldout", "missing.jsonl"), "no such file"),
        (("--heldout", "150%"), "between 0 and 1"),
        (("--preset", "l3h6"), "no such preset"),
    ],
)
def test_bad_usage(
    options: tuple[str, ...],
    said: str,
    inputs: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["drafter", "train", "dflash", *inputs, "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_such_kind(inputs: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drafter", "train", "medusa", *inputs, "--out", str(tmp_path / "out")]) == 2
    assert "no such kind of drafter" in capsys.readouterr().err


def test_every_option_reaches_the_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []

    def train(kind: str, target: str, data: list[str], out: Path, options: TrainOptions, **rest: Any) -> Any:
        taken.extend([kind, target, data, out, options])
        raise m27quant.errors.UsageError("enough")

    monkeypatch.setattr(m27quant.drafters.train, "train_drafter", train)
    given = {
        "preset": "l3h5", "num_layers": 2, "taps": "1,2", "block_size": 6, "train_block_sizes": "4,6", "mask_token": 9,
        "intermediate_size": 7, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope_theta": 5.5,
        "draft_vocab_size": 44, "anchors_per_seq": 3, "loss_decay": 0.5, "num_steps": 5, "loss": "distill",
        "steps": 11, "batch_size": 3, "grad_accumulation": 2, "lr": 0.125, "adam_lr": 0.25, "optimizer": "muon",
        "weight_decay": 0.375, "warmup": 0.5, "schedule": "wsd", "clip": 0.75, "dtype": "f32", "max_length": 77,
        "seed": 3, "heldout": "0.5", "eval_every": 4, "eval_samples": 6, "save_every": 8, "overwrite": True,
        "force_unlock": True, "device": "cpu", "activations": "bf16", "kv_cache_dtype": "fp8", "revision": "main",
        "offline": True, "token": "hf_x", "cache_size": "none", "layout": "speculators",
    }  # fmt: skip
    argv = ["drafter", "train", "dflash", "--target", "T", "--data", "A", "--data", "B", "--out", "O"]
    for name, value in given.items():
        option = "--layers" if name == "num_layers" else "--" + name.replace("_", "-")
        argv += [option] if value is True else [option, str(value)]
    assert main(argv) == 2
    assert "enough" in capsys.readouterr().err
    kind, target, data, out, options = taken
    assert (kind, target, data, out) == ("dflash", "T", ["A", "B"], Path("O"))
    expected = given | {"taps": (1, 2), "train_block_sizes": (4, 6), "loss": 1.0, "cache_size": 0}
    # each excludes one of the others
    elsewhere = {"epochs": None, "loss_gamma": None, "resume": False, "init_from": None}
    assert {f.name: getattr(options, f.name) for f in fields(options)} == expected | elsewhere
