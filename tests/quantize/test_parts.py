"""Calibrate once, pack layers in many jobs, assemble: the bytes of one run, or exit code 1 and the reasons."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import m27quant.assemble
from m27quant import assemble_checkpoint, quantize_checkpoint
from m27quant.cli.app import main
from m27quant.errors import CheckpointError, FindingsError, UsageError
from tests.checkpoints import Shape, write_checkpoint, write_rows
from tests.faults.harness import tree

SMALL = Shape(
    hidden_size=48,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=4,
    vocab_size=2048,
)
SIDECARS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
CUTS = ((0, 1), (1, 3), (3, None))


@dataclass(frozen=True)
class Made:
    """A source, one run's result, and the same in three parts."""

    model: Path
    rows: Path
    whole: Path
    ranges: Path
    parts: list[Path]


@pytest.fixture(scope="module")
def made(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("parts")
    model = write_checkpoint(home / "model", SMALL)
    for name in SIDECARS:
        shutil.copy(repository / "examples/tiny-m27" / name, model / name)
    rows = write_rows(home / "rows.jsonl", vocab_size=SMALL.vocab_size)
    quantize_checkpoint(str(model), home / "whole", dataset=str(rows))
    quantize_checkpoint(str(model), home / "calibration", dataset=str(rows), calibrate_only=True)
    ranges = home / "calibration" / "calibration.json"
    parts = [home / f"part-{number}" for number in range(len(CUTS))]
    for part, layers in zip(parts, CUTS, strict=True):
        quantize_checkpoint(str(model), part, ranges=str(ranges), layers=layers)
    return Made(model, rows, home / "whole", ranges, parts)


@pytest.fixture
def copies(made: Made, tmp_path: Path) -> list[Path]:
    """The parts, to be broken."""
    return [Path(shutil.copytree(part, tmp_path / "parts" / part.name)) for part in made.parts]


def without_log(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith(".m27quant/")}


def test_the_assembled_parts_are_one_runs_bytes(made: Made, tmp_path: Path) -> None:
    before = [tree(part) for part in made.parts]
    result = assemble_checkpoint(reversed(made.parts), tmp_path / "out")  # type: ignore[arg-type]  # any order
    assert without_log(tree(tmp_path / "out")) == without_log(tree(made.whole))
    assert not result.was_complete
    assert [tree(part) for part in made.parts] == before, "parts stay as they are"
    assert assemble_checkpoint(made.parts, tmp_path / "out").was_complete


def test_parts_on_another_file_system_are_copied(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("m27quant.assemble.os.link", link)
    assemble_checkpoint(made.parts, tmp_path / "out")
    assert without_log(tree(tmp_path / "out")) == without_log(tree(made.whole))


def test_ranges_without_layers_pack_everything(made: Made, tmp_path: Path) -> None:
    quantize_checkpoint(str(made.model), tmp_path / "out", ranges=str(made.ranges))
    assert tree(tmp_path / "out") == tree(made.whole)


def test_a_finished_part_has_nothing_left_to_do(made: Made, copies: list[Path]) -> None:
    before = tree(copies[1])
    options: dict[str, Any] = {"ranges": str(made.ranges), "layers": CUTS[1]}
    quantize_checkpoint(str(made.model), copies[1], **options, resume=True)
    assert tree(copies[1]) == before
    with pytest.raises(UsageError, match=r"layers: .* then, .* now"):
        quantize_checkpoint(str(made.model), copies[1], ranges=str(made.ranges), layers=(0, 3), resume=True)


def test_a_finished_calibration_has_nothing_left_to_do(made: Made, tmp_path: Path) -> None:
    home = Path(shutil.copytree(made.ranges.parent, tmp_path / "calibration"))
    assert not list(home.rglob("hidden-*")), "nothing large is left"
    before = tree(home)
    quantize_checkpoint(str(made.model), home, dataset=str(made.rows), calibrate_only=True, resume=True)
    assert tree(home) == before
    with pytest.raises(UsageError, match="calibrate_only: "):
        quantize_checkpoint(str(made.model), home, dataset=str(made.rows), resume=True)


def test_cut_short_it_goes_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(m27quant.assemble, "_verify", fail)
        with pytest.raises(KeyboardInterrupt):
            assemble_checkpoint(made.parts, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assemble_checkpoint(made.parts, tmp_path / "out")
    assert without_log(tree(tmp_path / "out")) == without_log(tree(made.whole))


# -- refusals: exit code 1, everything named, nothing committed --------------------------------------


def refused(parts: list[Path], out: Path, *named: str) -> None:
    with pytest.raises(FindingsError) as caught:
        assemble_checkpoint(parts, out)
    assert caught.value.exit_code == 1
    for text in named:
        assert text in caught.value.message, caught.value.message
    assert not out.exists()


def test_layers_that_nobody_has_or_two_have(made: Made, tmp_path: Path) -> None:
    refused(made.parts[:1], tmp_path / "out", "layer-0001: in none", "layer-0003: in none", "head: in none")
    refused(
        [*made.parts, made.parts[1]], tmp_path / "out", "(2 faults)", "layer-0001: in two parts", "layer-0002"
    )


def test_damaged_files_are_all_named(copies: list[Path], tmp_path: Path) -> None:
    for part, layer in ((copies[0], "layer-0000"), (copies[1], "layer-0002")):
        (shard,) = (part / ".m27quant/work").glob(f"{layer}-*")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    refused(
        copies, tmp_path / "out", "(2 faults)", "layer-0000 is missing or damaged", "layer-0002 is missing"
    )


def test_unfinished_strange_and_other_runs_parts(made: Made, copies: list[Path], tmp_path: Path) -> None:
    journal = copies[0] / ".m27quant/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b'"step": "part"' not in line))
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other-ranges"
    quantize_checkpoint(str(made.model), other, dataset=str(made.rows), calibrate_only=True, num_samples=3)
    quantize_checkpoint(
        str(made.model), tmp_path / "others", ranges=str(other / "calibration.json"), layers=(1, 3)
    )
    parts = [copies[2], copies[0], tmp_path / "empty", tmp_path / "others"]
    refused(
        parts, tmp_path / "out", "part-0: unfinished", "empty: not a part", "others: of another run", "tokens"
    )


def test_errors_of_verify_refuse_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A source without tokenizer and generation_config.json: engines would not stop."""
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    for name in SIDECARS:
        (model / name).unlink()
    out = tmp_path / "out"
    argv = ["assemble", *map(str, made.parts), str(out), "--model", str(model), "--no-progress"]
    assert main(argv) == 1
    said = capfd.readouterr().err
    assert "verify finds 1 errors" in said
    assert "M27-F016" in said
    assert not out.exists()
    assert main([*argv, "--no-verify"]) == 0
    assert (out / "config.json").exists()


# -- the ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (0, 1)}, "--layers without --ranges"),
        ({"ranges": "nowhere.json"}, "no such file"),
        ({"ranges": "RANGES", "layers": (2, 2)}, "--layers 2:2: the model has layers 0 to 3"),
        ({"ranges": "RANGES", "layers": (0, 5)}, "--layers 0:5"),
        ({"ranges": "RANGES", "num_samples": 3}, "--num-samples beside --ranges"),
        ({"ranges": "RANGES", "max_shard_size": 4096}, "max_shard_size: "),
        ({"ranges": "RANGES", "recipe": "nvfp4_experts_only"}, "recipe: "),
    ],
    ids=str,
)
def test_what_cannot_be(options: dict[str, Any], said: str, made: Made, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {k: str(made.ranges) if v == "RANGES" else v for k, v in options.items()}
    with pytest.raises(UsageError) as caught:
        quantize_checkpoint(str(made.model), tmp_path / "out", **chosen)
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["layers"].pop(),
        lambda c: c["layers"][1]["w2_input_amax"].pop(),
        lambda c: c["layers"][1].update(k_amax=-1.0),
        lambda c: c["layers"][1].update(v_amax="1"),
        lambda c: c["layers"][1].pop("seen_tokens"),
        lambda c: c.update(lengths=[]),
        lambda c: c.update(dropped=[True]),
    ],
)
def test_damaged_ranges_are_refused(damage: Any, made: Made, tmp_path: Path) -> None:
    content = json.loads(made.ranges.read_text())
    damage(content)
    (tmp_path / "ranges.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"ranges\.json: (damaged|lacks)"):
        quantize_checkpoint(str(made.model), tmp_path / "out", ranges=str(tmp_path / "ranges.json"))
