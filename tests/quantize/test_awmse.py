"""The recipe of least weighted error: the moments behind it, and what verify can say of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m27quant import verify_checkpoint
from m27quant.calib.moments import Moments
from m27quant.kernels import nvfp4_pack
from m27quant.kernels.nvfp4_pack.reference import encode, groups
from m27quant.verify.findings import VerifyResult
from tests.checkpoints import read_tensors
from tests.faults.weights import read, write
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

RECIPE = "nvfp4_experts_only_awmse-fp8_kv"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["gqa2"])


@pytest.fixture(scope="module")
def collected() -> list[Moments]:
    """The moments of every layer that `out` was packed by, once it is there."""
    return []


@pytest.fixture(scope="module")
def out(model: Model, collected: list[Moments], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "m27quant.layer_statistics.Moments", lambda *a: collected.append(Moments(*a)) or collected[-1]
        )
        return quantized(model, tmp_path_factory.mktemp("awmse") / "out", recipe=RECIPE)


def test_only_block_scales_and_codes_are_others_than_by_mse(out: Path, by_mse: Path) -> None:
    one, two = read_tensors(by_mse), read_tensors(out)
    assert set(one) == set(two)
    differ = {name for name in one if not same_bytes(one[name], two[name])}
    assert differ <= {n for n in one if ".experts." in n and n.endswith((".weight", ".weight_scale"))}
    assert len(differ) > 3 * 8 * 2


def test_every_matrix_is_packed_by_its_own_moments(model: Model, out: Path, collected: list[Moments]) -> None:
    tensors, layers = read_tensors(out), report(out)["layers"]
    for number, moments in enumerate(collected):
        channels = moments.weights(layers[number]["routed_tokens"], layers[number]["seen_tokens"][0])
        assert layers[number]["moments_sha256"] == channels.sha256
        for expert in (0, 5):
            module = f"model.layers.{number}.block_sparse_moe.experts.{expert}"
            weights = {p: weight_of(model, f"{module}.{p}") for p in ("w1", "w2", "w3")}
            for p, m in channels.of(expert).items():
                both = [weights[p]] if p == "w2" else [weights["w1"], weights["w3"]]
                amax = torch.stack([nvfp4_pack.amax(w) for w in both]).amax()
                again = nvfp4_pack.pack(weights[p], amax=amax, scales="mse", channel_weight=m)
                for part, tensor in again._asdict().items():
                    assert same_bytes(tensor, tensors[f"{module}.{p}.{part}"]), (module, p, part)


def test_the_report_says_what_was_gained(out: Path) -> None:
    for layer in report(out)["layers"]:
        assert set(layer["weighted_error"]) == {"w1", "w2", "w3"}
        for found in layer["weighted_error"].values():
            assert 0 < found["awmse"] < 0.85 * found["max"] < 0.05
    assert report(out)["recipe"]["algorithm"] == "awmse"


# ---- verify ------------------------------------------------------------------------------------------------


def full(folder: Path, model: Model) -> VerifyResult:
    return verify_checkpoint(folder, level="full", source=str(model.folder))


def weights(result: VerifyResult) -> set[tuple[str, str | None]]:
    """What was found of the weights."""
    return {(f.check.code, f.tensor) for f in result.findings if f.check.code.startswith("M27-W")}


def test_verify_says_what_it_cannot_repeat(model: Model, out: Path) -> None:
    result = full(out, model)
    assert weights(result) == {("M27-W026", None)}
    facts = result.facts["source"]
    assert (facts["matrices"], facts["exact"], facts["nearest_codes"]) == (48, 0, 48)


def test_a_code_that_is_not_the_nearest_is_found(model: Model, copy: Path) -> None:
    data = bytearray(read(copy, f"{MODULE}.weight"))
    data[100] ^= 0x10
    write(copy, f"{MODULE}.weight", bytes(data))
    assert ("M27-W015", f"{MODULE}.weight") in weights(full(copy, model))


def test_a_block_scale_without_codes_for_it_is_found(model: Model, copy: Path) -> None:
    data = bytearray(read(copy, f"{MODULE}.weight_scale"))
    data[40] += 1
    write(copy, f"{MODULE}.weight_scale", bytes(data))
    assert ("M27-W015", f"{MODULE}.weight") in weights(full(copy, model))


def test_a_global_scale_that_is_not_the_sources_is_found(model: Model, copy: Path) -> None:
    scale_2 = read_tensors(copy)[f"{MODULE}.weight_scale_2"] * 1.5
    write(copy, f"{MODULE}.weight_scale_2", scale_2.numpy().tobytes())
    assert (f"{MODULE}.weight") in {tensor for _, tensor in weights(full(copy, model))}


def test_consistent_scales_that_leave_nothing_of_the_weights_are_found(model: Model, copy: Path) -> None:
    tensors = read_tensors(copy)
    scale = torch.full_like(tensors[f"{MODULE}.weight_scale"].view(torch.uint8), 1).view(torch.float8_e4m3fn)
    codes = encode(groups(weight_of(model).float()), scale, tensors[f"{MODULE}.weight_scale_2"])
    write(copy, f"{MODULE}.weight_scale", scale.view(torch.uint8).numpy().tobytes())
    write(copy, f"{MODULE}.weight", codes.contiguous().numpy().tobytes())
    assert ("M27-W016", f"{MODULE}.weight") in weights(full(copy, model))


def test_without_a_report_it_is_another_recipe(model: Model, copy: Path) -> None:
    (copy / REPORT).unlink()
    assert {code for code, _ in weights(full(copy, model))} == {"M27-W017"}
