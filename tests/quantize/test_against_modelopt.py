"""What we write against what nvidia-modelopt itself writes, tensor by tensor.

modelopt quantizes transformers' MiniMax-M2 in BF16 with our own recipe file, forcing every token through every
expert, and exports it.  Weights and their scales must be the same bytes; ranges of activations may differ by one
step of BF16, because modelopt takes row by row what we take in larger chunks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from m27quant.recipes import load_recipe
from tests.checkpoints import random_tensors, read_tensors, stored, write_checkpoint
from tests.oracles import modelopt_model as oracle
from tests.quantize.models import SHAPES, Model, named_model, quantized, random_model, same_bytes
from tests.tolerance import AMAX_BF16_STEPS, bf16_steps

# modelopt says that it was not tested with this transformers; torch and it deprecate things of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = "nvfp4_experts_only-fp8_kv"
MAXIMUM = {"input_scale": 2688.0, "k_scale": 448.0, "v_scale": 448.0}
"""amax = scale * maximum."""


@pytest.fixture(params=[*SHAPES, "tiny-m27"])
def model(request: pytest.FixtureRequest, repository: Path, tmp_path: Path) -> Model:
    return named_model(request.param, repository, tmp_path)


def modelopts(
    model: Model,
    out: Path,
    batches: Sequence[oracle.Batch],
    *,
    ratio: float | None = 1.0,
    recipe: str = RECIPE,
) -> Path:
    """OUT as modelopt writes it, with our recipe's own section; `ratio` replaces its share of experts."""
    section = load_recipe(recipe).modelopt()["quantize"]
    assert section["algorithm"]["moe_calib_experts_ratio"] == 1.0
    section["algorithm"]["moe_calib_experts_ratio"] = ratio
    network = oracle.build(model.raw_config, model.tensors)
    return oracle.export(oracle.quantize(network, section, batches), out)


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def assert_bytes_equal(theirs: dict[str, torch.Tensor], mine: dict[str, torch.Tensor]) -> int:
    """Everything but ranges of activations is the same, to the byte; returns how many tensors that are."""
    assert set(theirs) == set(mine)
    exact = [name for name in theirs if leaf(name) not in MAXIMUM]
    for name in exact:
        assert same_bytes(theirs[name], mine[name]), name
    return len(exact)


def steps(theirs: dict[str, torch.Tensor], mine: dict[str, torch.Tensor]) -> dict[str, int]:
    """Per range of activations the BF16 steps between its two amax."""
    found = {}
    for name in theirs:
        if (maximum := MAXIMUM.get(leaf(name))) is not None:
            assert theirs[name].dtype == mine[name].dtype == torch.float32
            assert theirs[name].shape == mine[name].shape == ()
            found[name] = bf16_steps(float(theirs[name]) * maximum, float(mine[name]) * maximum)
            # of one amax there is one scale, to the last bit
            assert found[name] or theirs[name] == mine[name], name
    return found


def assert_shared_within_experts(tensors: dict[str, torch.Tensor]) -> None:
    """w1 and w3 of one expert have one input and one weight scale."""
    for name, value in tensors.items():
        if leaf(name) in ("input_scale", "weight_scale_2") and ".w1." in name:
            assert value == tensors[name.replace(".w1.", ".w3.")], name


def test_every_tensor_is_modelopts(model: Model, tmp_path: Path, record_property: Any) -> None:
    theirs = read_tensors(modelopts(model, tmp_path / "modelopt", oracle.unpadded(model.rows)))
    mine = read_tensors(quantized(model, tmp_path / "ours"))
    experts = model.raw_config["num_local_experts"] * model.raw_config["num_hidden_layers"]
    assert assert_bytes_equal(theirs, mine) > 9 * experts
    found = steps(theirs, mine)
    assert len(found) == 3 * experts + 2 * model.raw_config["num_hidden_layers"]
    record_property("largest_amax_difference_in_bf16_steps", max(found.values()))
    assert max(found.values()) <= AMAX_BF16_STEPS, {n: s for n, s in found.items() if s > AMAX_BF16_STEPS}
    assert_shared_within_experts(mine)
    assert_shared_within_experts(theirs)
    w2 = {
        float(v) for n, v in mine.items() if n.endswith("0.w2.input_scale") or n.endswith("1.w2.input_scale")
    }
    assert len(w2) > 1, "w2 has a range of its own in every expert"
    assert_same_configs(tmp_path / "modelopt", tmp_path / "ours")


def assert_same_configs(theirs: Path, mine: Path) -> None:
    """Both quantization sections are modelopt's, but for one entry that only modelopt >= 0.45 writes.

    Since then embeddings carry a (disabled) quantizer and so appear in the list; NVIDIA's own MiniMax-M2
    checkpoints, made before, do not have it, and no engine would quantize an embedding.
    """
    extra = "model.embed_tokens"
    a, b = (json.loads((f / "hf_quant_config.json").read_text()) for f in (theirs, mine))
    assert extra in a["quantization"]["exclude_modules"]
    a["quantization"]["exclude_modules"].remove(extra)
    assert a == b
    assert json.dumps(a) == json.dumps(b), "also the keys' order"
    a, b = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (theirs, mine))
    assert extra in a["ignore"]
    a["ignore"].remove(extra)
    assert a == b
    assert json.dumps(a) == json.dumps(b)


def test_a_cold_expert_is_measured_as_modelopt_measures_it(tmp_path: Path) -> None:
    """Every token goes through it for its range alone, none for the next layer's input."""
    model = random_model(tmp_path, SHAPES["gqa2"], seed=4)
    for layer in range(2):
        model.tensors[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"][3] = -100
    write_checkpoint(model.folder, SHAPES["gqa2"], tensors=model.tensors)
    theirs = read_tensors(modelopts(model, tmp_path / "modelopt", oracle.unpadded(model.rows)))
    mine = read_tensors(quantized(model, tmp_path / "ours"))
    assert_bytes_equal(theirs, mine)
    assert max(steps(theirs, mine).values()) <= AMAX_BF16_STEPS
    report = json.loads((tmp_path / "ours" / "quantization_report.json").read_text())
    assert report["summary"]["coverage"]["cold_experts"] == 2


def test_the_bf16_copy_gives_the_same_tensors_as_the_fp8_source(tmp_path: Path) -> None:
    shape = SHAPES["gqa2"]
    model = random_model(tmp_path, shape)
    copy = write_checkpoint(tmp_path / "bf16", shape, fp8=False, tensors=oracle.bf16_copy(model.tensors))
    from_fp8 = read_tensors(quantized(model, tmp_path / "a" / "out"))
    from_bf16 = read_tensors(quantized(model, tmp_path / "b" / "out", source=copy))
    assert assert_bytes_equal(from_fp8, from_bf16)
    assert set(steps(from_fp8, from_bf16).values()) == {0}


@pytest.mark.parametrize("recipe", ["nvfp4_experts_only-fp8_kv_cast", "nvfp4_experts_only"])
def test_the_other_recipes_are_modelopts_too(recipe: str, tmp_path: Path) -> None:
    """No scales of the KV cache in either; a cache that the configuration calls FP8 in the first."""
    model = random_model(tmp_path, SHAPES["gqa1"], seed=3)
    batches = oracle.unpadded(model.rows)
    theirs = read_tensors(modelopts(model, tmp_path / "modelopt", batches, recipe=recipe))
    mine = read_tensors(quantized(model, tmp_path / "ours", recipe=recipe))
    assert_bytes_equal(theirs, mine)
    assert max(steps(theirs, mine).values()) <= AMAX_BF16_STEPS
    assert not [name for name in mine if leaf(name) in ("k_scale", "v_scale")]
    assert_same_configs(tmp_path / "modelopt", tmp_path / "ours")
    section = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert ("kv_cache_scheme" in section) == recipe.endswith("cast")


@pytest.mark.parametrize("name", ["gqa2", "gqa4"])
def test_natural_coverage_is_modelopt_without_a_ratio(name: str, tmp_path: Path) -> None:
    """Routed tokens only, then one range per projection for all experts of a layer, also for one that is cold."""
    model = random_model(tmp_path, SHAPES[name], seed=1)
    model.tensors["model.layers.1.block_sparse_moe.e_score_correction_bias"][0] = -100
    write_checkpoint(model.folder, SHAPES[name], tensors=model.tensors)
    theirs = read_tensors(modelopts(model, tmp_path / "modelopt", oracle.unpadded(model.rows), ratio=None))
    mine = read_tensors(quantized(model, tmp_path / "ours", moe_calib="natural"))
    assert_bytes_equal(theirs, mine)
    assert max(steps(theirs, mine).values()) <= AMAX_BF16_STEPS
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        shared = {float(v) for n, v in mine.items() if n.startswith(prefix) and n.endswith(".w2.input_scale")}
        assert len(shared) == 1
    full = read_tensors(quantized(model, tmp_path / "full"))
    assert any(s > AMAX_BF16_STEPS for s in steps(mine, full).values()), "the two modes are told apart"


def test_padding_counts_for_modelopt_and_never_here(tmp_path: Path) -> None:
    """modelopt's data loader pads on the left, and what stands at padded places goes into its ranges.

    With random text the difference is some BF16 steps either way (the mask also selects another attention
    kernel); here the padding token's embedding points where the values of layer 0 are large.
    """
    shape, pad = SHAPES["gqa2"], 0
    tensors = random_tensors(shape, 2)
    v_proj = tensors["model.layers.0.self_attn.v_proj.weight"]
    loud = v_proj[v_proj.norm(dim=1).argmax()] / tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.embed_tokens.weight"][pad] = loud.bfloat16()
    model = random_model(tmp_path, shape, seed=2)
    rows = [[max(t, 1) for t in row] for row in model.rows]
    model = Model(model.folder, model.raw_config, stored(tensors), rows)
    write_checkpoint(model.folder, shape, tensors=model.tensors)
    mine = read_tensors(quantized(model, tmp_path / "ours"))

    (padded,) = oracle.left_padded(rows, pad)
    assert padded.attention_mask is not None
    file = tmp_path / "padded.jsonl"
    pairs = zip(padded.input_ids.tolist(), padded.attention_mask.tolist(), strict=True)
    file.write_text("".join(json.dumps({"input_ids": i, "attention_mask": m}) + "\n" for i, m in pairs))
    again = read_tensors(quantized(model, tmp_path / "again", dataset=[str(file)]))
    assert_bytes_equal(mine, again)
    assert set(steps(mine, again).values()) == {0}

    theirs = read_tensors(modelopts(model, tmp_path / "modelopt", [padded]))
    assert_bytes_equal(theirs, mine)
    name = "model.layers.0.self_attn.v_proj.v_scale"
    assert theirs[name] > 1.5 * mine[name]
