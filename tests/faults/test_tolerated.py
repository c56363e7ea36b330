"""What is odd about a source but no fault: quantized all the same, with a warning where the user may care."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from m27quant.cli.app import main
from tests.faults import corruptions as c
from tests.faults.conftest import Ended, Quantize


def weights(out: Path) -> dict[str, str]:
    """Shard name -> SHA-256."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in c.shards(out)}


@pytest.fixture
def undisturbed(good: Path, tmp_path: Path, quantize: Quantize) -> dict[str, str]:
    assert quantize(good, tmp_path / "undisturbed").code == 0
    return weights(tmp_path / "undisturbed")


def the_warning(ended: Ended, fragment: str) -> str:
    (found,) = (w for w in ended.warnings if fragment in w)
    return found


@pytest.mark.parametrize("name", c.HOSTILE_NAMES)
def test_hostile_names_are_data(
    name: str, model: Path, tmp_path: Path, quantize: Quantize, undisturbed: dict[str, str]
) -> None:
    c.add_tensor(model, c.HOSTILE_NAMES[name])
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    said = the_warning(ended, "left out")
    assert said.isprintable()
    assert len(said) < 400
    assert weights(tmp_path / "out") == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "undisturbed"]


@pytest.mark.parametrize("name", c.HOSTILE_NAMES)
def test_hostile_names_are_shown_escaped_on_a_terminal_too(
    name: str, model: Path, tmp_path: Path, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = c.HOSTILE_NAMES[name]
    c.index_names_absent(hostile)(model)
    assert main(["quantize", str(model), str(tmp_path / "out"), "--dataset", str(rows)]) == 3
    said = capfd.readouterr()
    assert said.out == ""
    assert all(line.isprintable() for line in said.err.split("\n"))
    (line,) = (x for x in said.err.splitlines() if x.startswith("error: "))
    if hostile.isprintable() and len(hostile) <= 200:
        assert f"'{hostile}'" in line
    assert "Traceback" not in said.err


def test_a_tensor_in_two_shards_is_taken_where_the_index_says(
    model: Path, tmp_path: Path, quantize: Quantize, undisturbed: dict[str, str]
) -> None:
    c.same_tensor_twice(model)
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    assert "model-00001-of-00005.safetensors holds 1 tensors" in the_warning(ended, "ignored")
    assert weights(tmp_path / "out") == undisturbed


def test_a_tensor_that_the_index_lacks_is_left_out(
    model: Path, tmp_path: Path, quantize: Quantize, undisturbed: dict[str, str]
) -> None:
    c.add_tensor(model, "stray", in_index=False)
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    assert "'stray'" in the_warning(ended, "ignored")
    assert weights(tmp_path / "out") == undisturbed


def test_the_layout_of_the_hubs_cache_is_accepted(
    good: Path, tmp_path: Path, quantize: Quantize, undisturbed: dict[str, str]
) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert quantize(snapshot, tmp_path / "out").code == 0
    assert weights(tmp_path / "out") == undisturbed

    outside = shutil.move(cache / "blobs", tmp_path / "blobs")
    (cache / "blobs").symlink_to(outside)
    assert quantize(snapshot, tmp_path / "out2").code == 0, "the cache's own folder may be a link"

    first = c.shards(snapshot)[0]
    target = first.resolve()
    first.unlink()
    first.symlink_to(shutil.copy(target, tmp_path / "elsewhere"))
    assert quantize(snapshot, tmp_path / "out3").code == 3


def test_links_within_the_folder_are_accepted(
    model: Path, tmp_path: Path, quantize: Quantize, undisturbed: dict[str, str]
) -> None:
    first = c.shards(model)[0]
    first.rename(model / "stored")
    first.symlink_to("stored")
    assert quantize(model, tmp_path / "out").code == 0
    assert weights(tmp_path / "out") == undisturbed


def test_a_wrong_total_size_is_no_fault(model: Path, tmp_path: Path, quantize: Quantize) -> None:
    c.edit_json(model / c.INDEX, lambda index: index["metadata"].update(total_size=-5))
    assert quantize(model, tmp_path / "out").code == 0


def test_custom_code_is_never_run(model: Path, tmp_path: Path, quantize: Quantize) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    (model / "modeling_evil.py").write_text(code)
    c.config(auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})(model)
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    assert "modeling_evil.py" in the_warning(ended, "was not run")
    assert not ran.exists()
    assert (tmp_path / "out" / "modeling_evil.py").read_text() == code
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "target",
    ["gone.Model", "../../etc/x.Model", "/etc/passwd.Model", "org/repo--code.Model", "x" * 5000, "", 7, None, ["a"]],
    ids=str,
)  # fmt: skip
def test_custom_code_that_is_not_there_is_not_named(
    target: object, model: Path, tmp_path: Path, quantize: Quantize
) -> None:
    c.config(auto_map={"AutoModelForCausalLM": target})(model)
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    assert the_warning(ended, "auto_map is left out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_what_does_not_lie_beside_the_weights_is_said(
    model: Path, tmp_path: Path, quantize: Quantize
) -> None:
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    for missing in ("no tokenizer.json", "no generation_config.json", "no chat template"):
        assert the_warning(ended, missing)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors") == [
        ".m27quant",
        "README.md",
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
        "quantization_report.json",
    ]


def test_numbers_and_strings_of_config_json_come_through(
    model: Path, tmp_path: Path, quantize: Quantize
) -> None:
    odd = {"text": "\ud800\x00\u202e[/x]", "small": 1e-300, "big": 2**80, "nested": [[[{}]]], "none": None}
    c.config(odd=odd)(model)
    assert quantize(model, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["odd"] == odd
