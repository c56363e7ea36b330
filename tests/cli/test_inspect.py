"""`m27quant inspect`: what a source and a result are, from their headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m27quant.checkpoint.overview import inspect_checkpoint
from m27quant.cli.app import main
from m27quant.quantize import quantize_checkpoint
from tests.checkpoints import Shape, write_checkpoint, write_rows

SHAPE = Shape()
EXPERTS = SHAPE.num_hidden_layers * SHAPE.num_local_experts * 3
EXPERT_PARAMETERS = EXPERTS * SHAPE.hidden_size * SHAPE.intermediate_size


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("inspect") / "source", SHAPE)


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    out, rows = source.parent / "out", write_rows(source.parent / "rows.jsonl")
    quantize_checkpoint(str(source), out, dataset=str(rows), device="cpu")
    return out


def inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document: dict[str, Any] = json.loads(captured.out)
    assert document.pop("schema_version") == 1
    return document


def test_a_source(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(source, capsys)
    families = {f["name"]: f for f in found["families"]}
    assert (found["format"], found["kv_cache"]) == ("FP8 in blocks", "BF16")
    assert (found["producer"], found["excluded"]) == ("not named (fp8)", 3)
    assert families["experts"]["tensors"] == 2 * EXPERTS
    assert families["experts"]["parameters"] == EXPERT_PARAMETERS
    assert families["router"]["format"] == "F32"
    assert families["attention"]["format"] == "FP8 in blocks"
    assert "other" not in families
    assert len(found["shards"]) == 3
    assert sum(s["tensors"] for s in found["shards"]) == found["tensors"]
    assert sum(f["bytes"] for f in found["families"]) == found["bytes"]


def test_a_result_has_the_source_s_parameters(
    source: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = inspect(source, capsys), inspect(quantized, capsys)
    families = {f["name"]: f for f in after["families"]}
    assert (after["format"], after["kv_cache"]) == ("NVFP4", "FP8, 4 scale tensors")
    assert after["producer"].startswith("m27quant ")
    assert after["producer"].endswith(" (NVFP4)")
    assert families["experts"]["tensors"] == 4 * EXPERTS
    assert families["attention"]["format"] == "BF16"
    assert after["parameters"] == before["parameters"]
    idle = EXPERT_PARAMETERS * (SHAPE.num_local_experts - SHAPE.num_experts_per_tok)
    assert before["active_parameters"] == before["parameters"] - idle // SHAPE.num_local_experts
    assert after["architecture"]["weight_block_size"] is None


def test_for_people_and_quietly(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized)]) == 0
    out = capsys.readouterr().out
    for words in ("experts' format  NVFP4", "6 of 80, 2 for one token", "FP8, 4 scale tensors"):
        assert words in out
    assert main(["inspect", str(quantized), "--quiet"]) == 0
    assert capsys.readouterr().out == "NVFP4\n"


def test_shards_beyond_a_screen_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path, Shape(num_local_experts=2), num_shards=23)
    assert main(["inspect", str(folder)]) == 0
    assert "and 3 more; -v shows all" in capsys.readouterr().out
    assert main(["inspect", str(folder), "-v"]) == 0
    out = capsys.readouterr().out
    assert "more; -v" not in out
    assert "model-00022-of-00025.safetensors" in out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": "minimax_m2"}'])
def test_what_is_no_checkpoint_ends_in_3(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["inspect", str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": 7},
        {"quantization_config": {"kv_cache_scheme": [], "ignore": {}, "producer": "\x1b[2J"}},
        {"quantization_config": {"kv_cache_scheme": {"type": "\x1b[2J", "num_bits": []}, "quant_method": []}},
        {"quantization_config": {"producer": {"name": "\x1b[2J"}, "quant_algo": {"\x1b": 1}}},
    ],
)
def test_hostile_configs_are_described(
    change: dict[str, Any], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_tensors_of_no_known_family_are_shown(tmp_path: Path) -> None:
    import torch

    from tests.checkpoints import random_tensors, stored

    tensors = stored(random_tensors(SHAPE)) | {"model.mtp.0.weight": torch.zeros(3)}
    overview = inspect_checkpoint(write_checkpoint(tmp_path, SHAPE, tensors=tensors))
    assert [(f.name, f.format, f.tensors) for f in overview.families][-1] == ("other", "F32", 1)


def test_no_torch(source: Path) -> None:
    probe = (
        "import sys; from m27quant.cli.app import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe, "inspect", str(source)], check=True, capture_output=True)


def test_nothing_is_downloaded_for_a_glance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["inspect", "nobody/nothing"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hint: fetch it where there is a network: hf download nobody/nothing" in captured.err
