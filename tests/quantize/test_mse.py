"""The recipe of least squared error, from source to verified checkpoint: only block scales and codes are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from m27quant import verify_checkpoint
from m27quant.errors import M27Error
from m27quant.kernels import nvfp4_pack
from m27quant.kernels.nvfp4_pack.reference import encode, groups
from m27quant.progress import Progress
from m27quant.verify.findings import VerifyResult
from tests.checkpoints import read_tensors
from tests.faults.weights import read, write
from tests.oracles import modelopt_sweep
from tests.quantize.models import (
    MODULE,
    REPORT,
    SHAPES,
    Model,
    quantized,
    random_model,
    report,
    same_bytes,
    weight_of,
)

RECIPE = "nvfp4_experts_only_mse-fp8_kv"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["gqa2"])


@pytest.fixture(scope="module")
def by_maxima(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(model, tmp_path_factory.mktemp("max") / "out")


@pytest.fixture(scope="module")
def out(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(model, tmp_path_factory.mktemp("mse") / "out", recipe=RECIPE)


def full(folder: Path, model: Model | None) -> VerifyResult:
    return verify_checkpoint(folder, level="full", source=None if model is None else str(model.folder))


def test_only_block_scales_and_codes_differ(by_maxima: Path, out: Path) -> None:
    one, two = read_tensors(by_maxima), read_tensors(out)
    assert set(one) == set(two)
    differ = {name for name in one if not same_bytes(one[name], two[name])}
    assert differ == {n for n in one if ".experts." in n and n.endswith((".weight", ".weight_scale"))}


def test_less_error_in_every_matrix_and_the_report_says_how_much(by_maxima: Path, out: Path) -> None:
    for before, after in zip(report(by_maxima)["layers"], report(out)["layers"], strict=True):
        assert "max_sqnr_db" not in before
        assert after["max_sqnr_db"] == before["sqnr_db"]
        for projection, values in after["sqnr_db"].items():
            assert all(v > b + 0.5 for v, b in zip(values, before["sqnr_db"][projection], strict=True))
    assert report(out)["recipe"]["algorithm"] == "mse"


def test_no_matrix_has_more_error_than_modelopts(model: Model, out: Path) -> None:
    tensors = read_tensors(out)
    weight = weight_of(model)
    mine = nvfp4_pack.PackedNVFP4(
        *(tensors[f"{MODULE}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    )
    theirs = nvfp4_pack.PackedNVFP4(*modelopt_sweep.pack(weight, weight.abs().max().float()))
    assert mine.weight_scale_2 == theirs.weight_scale_2
    noise = nvfp4_pack.squared_error(weight, None, mine).noise
    assert noise <= nvfp4_pack.squared_error(weight, None, theirs).noise


def test_killed_and_resumed_gives_the_same_files(model: Model, out: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.layer == 1:
            raise Killed

    again = tmp_path / "again"
    with pytest.raises(Killed):
        quantized(model, again, recipe=RECIPE, progress=kill)
    with pytest.raises(M27Error):  # the journal is of another recipe
        quantized(model, again, resume=True)
    quantized(model, again, recipe=RECIPE, resume=True)
    for path in (p for p in out.iterdir() if p.is_file()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_reference_writes_the_same(
    model: Model, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvfp4_pack, "_backend", lambda device: nvfp4_pack.reference)
    mine, theirs = read_tensors(out), read_tensors(quantized(model, tmp_path / "out", recipe=RECIPE))
    assert all(same_bytes(mine[name], theirs[name]) for name in mine)


# ---- verify ------------------------------------------------------------------------------------------------


def test_proven_with_the_source_and_sound_without(model: Model, out: Path) -> None:
    assert not errors(full(out, None))
    result = full(out, model)
    assert not errors(result)
    facts = result.facts["source"]
    assert facts["exact"] == facts["matrices"] == 3 * 8 * 2


def test_a_block_scale_one_step_off_is_found(model: Model, copy: Path) -> None:
    data = bytearray(read(copy, f"{MODULE}.weight_scale"))
    data[40] += 1
    write(copy, f"{MODULE}.weight_scale", bytes(data))
    assert ("M27-W015", f"{MODULE}.weight") in errors(full(copy, model))


def test_a_worse_scale_with_the_codes_for_it_is_found(model: Model, copy: Path) -> None:
    """Sound by itself, and by 1 of 1,456 blocks not what the report says."""
    tensors = read_tensors(copy)
    scale = tensors[f"{MODULE}.weight_scale"].clone()
    scale.view(torch.uint8)[3, 2] += 1
    codes = encode(groups(weight_of(model).float()), scale, tensors[f"{MODULE}.weight_scale_2"])
    write(copy, f"{MODULE}.weight_scale", scale.view(torch.uint8).numpy().tobytes())
    write(copy, f"{MODULE}.weight", codes.contiguous().numpy().tobytes())
    found = [f for f in full(copy, model).findings if f.check.code == "M27-W025"]
    assert [f.tensor for f in found] == [f"{MODULE}.weight"]
    assert "1 of 1,456 blocks, first at [3, 2]" in found[0].message
    assert not [code for code, _ in errors(full(copy, None)) if code != "M27-W001"]


def test_a_max_checkpoint_that_claims_to_be_the_best(model: Model, by_maxima: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_maxima, tmp_path / "copy"))
    document = report(folder)
    document["recipe"]["algorithm"] = "mse"
    (folder / REPORT).write_text(json.dumps(document))
    found = {f.check.code for f in full(folder, model).findings}
    assert "M27-W025" in found
    assert not found & {"M27-W014", "M27-W015", "M27-W016"}


def test_without_a_report_it_is_another_recipe(model: Model, copy: Path) -> None:
    (copy / REPORT).unlink()
    codes = {f.check.code for f in full(copy, model).findings if f.check.code.startswith("M27-W")}
    assert codes == {"M27-W017"}


def errors(result: VerifyResult) -> set[tuple[str, str | None]]:
    """What was found of the weights."""
    return {(f.check.code, f.tensor) for f in result.findings if f.check.code.startswith("M27-W")}
