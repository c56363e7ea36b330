"""The recipe of error feedback: the Hessians behind it, what the report tells of them, and what verify can say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant import verify_checkpoint
from m27quant.calib.hessians import LayerHessians
from m27quant.kernels import nvfp4_gptq, nvfp4_pack
from m27quant.kernels.nvfp4_gptq import Factor, factorize
from m27quant.report.page_words import made
from m27quant.report.recorded import read_recorded
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

RECIPE = "nvfp4_experts_only_gptq-fp8_kv"
SINGULAR = (0, 1)
"""Layer and expert whose w2 is given a Hessian that takes more damping than the first."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("model"), SHAPES["gqa1"])


@pytest.fixture(scope="module")
def factors() -> dict[tuple[int, int, str], Factor]:
    """By layer, expert and projection, once `out` is there."""
    return {}


@pytest.fixture(scope="module")
def out(
    model: Model, factors: dict[tuple[int, int, str], Factor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    layers: list[LayerHessians] = []

    class Watched(LayerHessians):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            layers.append(self)

        def factor(self, expert: int, projection: str) -> Factor:
            at = (len(layers) - 1, expert, projection)
            if at not in factors:
                factors[at] = super().factor(expert, projection)
                if (*SINGULAR, "w2") == at:
                    channels = model.raw_config["intermediate_size"]
                    factors[at] = factorize(torch.ones(channels, channels) - 0.05 * torch.eye(channels))
            return factors[at]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m27quant.layer_statistics.LayerHessians", Watched)
        return quantized(model, tmp_path_factory.mktemp("gptq") / "out", recipe=RECIPE)


def test_only_block_scales_and_codes_are_others_than_by_mse(out: Path, by_mse: Path) -> None:
    one, two = read_tensors(by_mse), read_tensors(out)
    assert set(one) == set(two)
    differ = {name for name in one if not same_bytes(one[name], two[name])}
    assert differ <= {n for n in one if ".experts." in n and n.endswith((".weight", ".weight_scale"))}
    assert len(differ) > 3 * 3 * 2


def test_every_matrix_is_packed_by_its_own_hessian(
    model: Model, out: Path, factors: dict[tuple[int, int, str], Factor]
) -> None:
    tensors, layers = read_tensors(out), report(out)["layers"]
    assert len(factors) == 2 * 3 * 3
    for (layer, expert, p), factor in factors.items():
        module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        both = [weight_of(model, f"{module}.{name}") for name in (("w2",) if p == "w2" else ("w1", "w3"))]
        amax = torch.stack([nvfp4_pack.amax(w) for w in both]).amax()
        again = nvfp4_gptq.pack(weight_of(model, f"{module}.{p}"), amax=amax, factor=factor)
        for part, tensor in again._asdict().items():
            assert same_bytes(tensor, tensors[f"{module}.{p}.{part}"]), (module, p, part)
        said = layers[layer]["hessians"]["w2" if p == "w2" else "w13"]
        at = expert if p == "w2" else 0
        assert said["damping"][at] == factor.damping
        assert (said["attempts"][at], said["dead_channels"][at]) == (factor.attempts, factor.dead)


def test_the_report_says_what_was_gained(out: Path) -> None:
    for number, layer in enumerate(report(out)["layers"]):
        assert set(layer["output_error"]) == {"w1", "w2", "w3"}
        for projection, found in layer["output_error"].items():
            limit = 0.75 if (number, projection) != (SINGULAR[0], "w2") else 1.0
            assert 0 < found["gptq"] < limit * found["max"] < 0.02
    assert report(out)["recipe"]["algorithm"] == "gptq"


def test_card_and_page_say_what_was_gained(out: Path, by_mse: Path) -> None:
    recorded, _ = read_recorded(out)
    rows = dict(made(recorded))
    shares = report(out)["summary"]["output_error_of_maxima"]
    said = f"w1 {shares['w1']:.2f}, w2 {shares['w2']:.2f}, w3 {shares['w3']:.2f} of that with scales from block maxima"
    assert rows["Error of outputs"] == said
    assert f"| {said} |" in (out / "README.md").read_text()
    assert "Error of" not in (by_mse / "README.md").read_text()
    other, _ = read_recorded(by_mse)
    assert "Error of outputs" not in dict(made(other))


def test_more_damping_than_the_first_is_said(out: Path) -> None:
    layer, expert = SINGULAR
    assert report(out)["layers"][layer]["hessians"]["w2"]["attempts"][expert] > 1
    (notice,) = [n for n in report(out)["notices"] if "damping" in n]
    assert "1 of 8 Hessians" in notice
    assert f"layer {layer}, expert {expert}, w2" in notice


# ---- verify ------------------------------------------------------------------------------------------------


def full(folder: Path, model: Model) -> VerifyResult:
    return verify_checkpoint(folder, level="full", source=str(model.folder))


def weights(result: VerifyResult) -> set[tuple[str, str | None]]:
    """What was found of the weights."""
    return {(f.check.code, f.tensor) for f in result.findings if f.check.code.startswith("M27-W")}


def test_verify_says_what_it_cannot_repeat(model: Model, out: Path) -> None:
    result = full(out, model)
    assert weights(result) == {("M27-W027", None)}
    facts = result.facts["source"]
    assert (facts["matrices"], facts["exact"], facts["as_measured"]) == (18, 0, 18)


def swapped_nibbles(codes: bytes) -> bytes:
    return bytes((byte << 4 | byte >> 4) & 0xFF for byte in codes)


def one_sign(codes: bytes) -> bytes:
    largest = max(range(len(codes)), key=lambda at: codes[at] & 7)
    return codes[:largest] + bytes([codes[largest] ^ 8]) + codes[largest + 1 :]


@pytest.mark.parametrize(("damage", "code"), [(one_sign, "M27-W028"), (swapped_nibbles, "M27-W010")])
def test_codes_that_were_changed_are_found(
    damage: Callable[[bytes], bytes], code: str, model: Model, copy: Path
) -> None:
    write(copy, f"{MODULE}.weight", damage(read(copy, f"{MODULE}.weight")))
    assert (code, f"{MODULE}.weight") in weights(full(copy, model))


def test_a_block_scale_that_was_changed_is_found(model: Model, copy: Path) -> None:
    data = bytearray(read(copy, f"{MODULE}.weight_scale"))
    data[40] += 1
    write(copy, f"{MODULE}.weight_scale", bytes(data))
    assert ("M27-W028", f"{MODULE}.weight") in weights(full(copy, model))


@pytest.mark.parametrize("factor", [1.5, 1.01])
def test_a_global_scale_that_is_not_the_sources_is_found(factor: float, model: Model, copy: Path) -> None:
    scale_2 = read_tensors(copy)[f"{MODULE}.weight_scale_2"] * factor
    write(copy, f"{MODULE}.weight_scale_2", scale_2.numpy().tobytes())
    codes = {code for code, tensor in weights(full(copy, model)) if tensor == f"{MODULE}.weight"}
    assert codes == {"M27-W016" if factor == 1.5 else "M27-W023"}


def test_another_experts_matrix_is_found(model: Model, copy: Path) -> None:
    other = MODULE.replace("experts.2", "experts.0")
    for part in ("weight", "weight_scale"):
        write(copy, f"{MODULE}.{part}", read(copy, f"{other}.{part}"))
    assert ("M27-W014", f"{MODULE}.weight") in weights(full(copy, model))


@pytest.mark.parametrize("said", [None, "20", 12.0])
def test_a_report_that_says_otherwise_is_found(said: Any, model: Model, copy: Path) -> None:
    document = report(copy)
    document["layers"][1]["sqnr_db"]["w2"][2] = said
    (copy / REPORT).write_text(json.dumps(document))
    assert weights(full(copy, model)) == {("M27-W027", None), ("M27-W028", f"{MODULE}.weight")}


def test_without_a_report_it_is_another_recipe(model: Model, copy: Path) -> None:
    (copy / REPORT).unlink()
    assert {code for code, _ in weights(full(copy, model))} == {"M27-W017"}
