"""The output checkpoint: exactly the tensors, types, shapes, names and files that the contract promises."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from m27quant import quantize_checkpoint
from m27quant.plan import make_plan
from m27quant.recipes import load_recipe
from tests.checkpoints import Shape, from_fp8, read_tensors, write_checkpoint, write_rows
from tests.quantize.models import SHAPES, Model, named_model, quantized, random_model, same_bytes
from tests.quantize.planned import M27, HeadersOnly

Expected = dict[str, tuple[str, list[int]]]
"""Name -> safetensors dtype and shape."""

TAGS = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}


def contract(c: dict[str, Any], *, kv_scales: bool = True) -> Expected:
    """What a checkpoint with this config.json holds, written down from the contract alone."""
    hidden, inter, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    expected: Expected = {
        "model.embed_tokens.weight": ("BF16", [c["vocab_size"], hidden]),
        "lm_head.weight": ("BF16", [c["vocab_size"], hidden]),
        "model.norm.weight": ("BF16", [hidden]),
    }
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        expected |= {
            f"{p}.input_layernorm.weight": ("BF16", [hidden]),
            f"{p}.post_attention_layernorm.weight": ("BF16", [hidden]),
            f"{p}.self_attn.q_norm.weight": ("BF16", [q]),
            f"{p}.self_attn.k_norm.weight": ("BF16", [kv]),
            f"{p}.self_attn.q_proj.weight": ("BF16", [q, hidden]),
            f"{p}.self_attn.k_proj.weight": ("BF16", [kv, hidden]),
            f"{p}.self_attn.v_proj.weight": ("BF16", [kv, hidden]),
            f"{p}.self_attn.o_proj.weight": ("BF16", [hidden, q]),
            f"{p}.block_sparse_moe.gate.weight": ("F32", [c["num_local_experts"], hidden]),
            f"{p}.block_sparse_moe.e_score_correction_bias": ("F32", [c["num_local_experts"]]),
        }
        if kv_scales:
            expected[f"{p}.self_attn.k_proj.k_scale"] = ("F32", [])
            expected[f"{p}.self_attn.v_proj.v_scale"] = ("F32", [])
        for expert in range(c["num_local_experts"]):
            for w, (n, k) in {"w1": (inter, hidden), "w2": (hidden, inter), "w3": (inter, hidden)}.items():
                m = f"{p}.block_sparse_moe.experts.{expert}.{w}"
                expected |= {
                    f"{m}.weight": ("U8", [n, k // 2]),
                    f"{m}.weight_scale": ("F8_E4M3", [n, k // 16]),
                    f"{m}.weight_scale_2": ("F32", []),
                    f"{m}.input_scale": ("F32", []),
                }
    return expected


def parsed_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(tensors, metadata, bytes before the data) of a safetensors file, by the format's definition."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    return header, header.pop("__metadata__", {}), 8 + length


@pytest.fixture(scope="module", params=[*SHAPES, "tiny-m27"])
def model(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    return named_model(request.param, repository, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One quantization under umask 022."""
    before = os.umask(0o022)
    yield quantized(model, tmp_path_factory.mktemp("quantized") / "out")
    os.umask(before)


# -- tensors ---------------------------------------------------------------------------------------


def test_names_types_and_shapes_are_exactly_the_contracts(model: Model, out: Path) -> None:
    found: Expected = {}
    for path in out.glob("*.safetensors"):
        header, metadata, begin = parsed_header(path)
        assert metadata == {"format": "pt"}
        assert begin % 8 == 0, "tensors are aligned"
        assert not set(header) & set(found)
        found |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    assert found == contract(model.raw_config)


def test_the_safetensors_library_opens_every_shard_and_agrees(out: Path) -> None:
    for path in out.glob("*.safetensors"):
        header, _, _ = parsed_header(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == set(header)
            for name in header:
                tensor = file.get_tensor(name)
                assert (tensor.dtype, list(tensor.shape)) == (
                    TAGS[header[name]["dtype"]],
                    header[name]["shape"],
                )


def test_what_is_not_quantized_keeps_its_bytes(model: Model, out: Path) -> None:
    """Router, bias, norms, embedding and head; attention is the BF16 dequantization of the source."""
    written = read_tensors(out)
    copied = 0
    for name, tensor in model.tensors.items():
        if ".experts." in name or name.endswith("_scale_inv"):
            continue
        scale = model.tensors.get(name + "_scale_inv")
        expected = tensor if scale is None else from_fp8(tensor, scale)
        assert same_bytes(written[name], expected), name
        copied += 1
    assert copied == 3 + 10 * model.raw_config["num_hidden_layers"]
    router = [n for n in written if ".gate." in n or "correction_bias" in n]
    assert all(model.tensors[n].dtype == torch.float32 for n in router)


def test_a_bf16_router_stays_bf16(tmp_path: Path) -> None:
    """A fine-tune may have saved its router so; its bytes are kept too."""
    model = random_model(tmp_path, SHAPES["gqa1"])
    tensors = {n: t.bfloat16() if "gate" in n or "bias" in n else t for n, t in model.tensors.items()}
    write_checkpoint(model.folder, SHAPES["gqa1"], tensors=tensors)
    written = read_tensors(quantized(model, tmp_path / "out"))
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert same_bytes(written[name], tensors[name])
    assert written[name].dtype == torch.bfloat16


def test_every_scale_is_a_positive_number(out: Path) -> None:
    for name, tensor in read_tensors(out).items():
        if "scale" in name:
            values = tensor.float()
            assert bool(torch.isfinite(values).all()), name
            assert float(values.min()) > 0, name


# -- files -----------------------------------------------------------------------------------------


def test_the_index_is_the_truth(model: Model, out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    total = 0
    for path in out.glob("*.safetensors"):
        header, _, begin = parsed_header(path)
        found |= dict.fromkeys(header, path.name)
        total += path.stat().st_size - begin
        assert (
            sum(b - a for a, b in (e["data_offsets"] for e in header.values())) == path.stat().st_size - begin
        )
    assert index == {"metadata": {"total_size": total}, "weight_map": found}
    assert list(index["weight_map"]) == sorted(found)
    count = len(set(found.values()))
    assert set(found.values()) == {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert count == model.raw_config["num_hidden_layers"] + 2, "one shard per layer, one for each end"


def test_config_json_is_the_sources_but_for_the_quantization(model: Model, out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    section = config.pop("quantization_config")
    source = {k: v for k, v in model.raw_config.items() if k != "quantization_config"}
    assert config == source
    assert list(config) == list(source)
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == "NVFP4"
    assert section["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert section["config_groups"] == {
        "group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}
    }
    assert section["ignore"] == exclude_list(model.raw_config["num_hidden_layers"])


def test_hf_quant_config_says_the_same(out: Path) -> None:
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    config = json.loads((out / "hf_quant_config.json").read_text())
    assert config == {
        "producer": section["producer"],
        "quantization": {
            "quant_algo": section["quant_algo"],
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": section["ignore"],
        },
    }
    assert config["producer"]["name"] == "modelopt"  # no other name is accepted by vLLM


@pytest.mark.parametrize("with_code", [True, False])
def test_auto_map_stays_where_its_code_comes_along(with_code: bool, tmp_path: Path) -> None:
    shape = SHAPES["gqa1"]
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    folder = write_checkpoint(tmp_path / "fp8", shape, config=shape.config() | {"auto_map": auto_map})
    for name in ("configuration_x.py", "modeling_x.py") if with_code else ("modeling_x.py",):
        (folder / name).write_text("raise SystemExit('never run')\n")
    rows = write_rows(tmp_path / "rows.jsonl")
    quantize_checkpoint(str(folder), tmp_path / "out", dataset=str(rows), device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("auto_map") == (auto_map if with_code else None)
    assert len(list((tmp_path / "out").glob("*.py"))) == (2 if with_code else 0)


def test_tokenizer_template_and_generation_config_come_along(model: Model, out: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        there = (model.folder / name).exists()
        assert (out / name).exists() == there
        if there:
            assert (out / name).read_bytes() == (model.folder / name).read_bytes()
    if (model.folder / "generation_config.json").exists():
        mine, source = (json.loads((f / "generation_config.json").read_text()) for f in (out, model.folder))
        assert mine == source


def test_modes_follow_the_umask(out: Path) -> None:
    everything = list(out.rglob("*"))
    assert len(everything) > 7
    modes = {p.relative_to(out): p.stat().st_mode & 0o777 for p in everything if p.is_file()}
    assert set(modes.values()) == {0o644}, {str(p): oct(m) for p, m in modes.items() if m != 0o644}
    assert {p.stat().st_mode & 0o777 for p in (out, *everything) if p.is_dir()} == {0o755}


def test_nothing_private_is_left_but_the_log(out: Path) -> None:
    private = {p.name for p in (out / ".m27quant").rglob("*")}
    assert private == {"run.log"}
    listed = json.loads((out / "quantization_report.json").read_text())["files"]
    assert sorted(listed) == sorted(p.name for p in out.iterdir() if p.is_file())


def test_no_path_of_this_machine_is_written(model: Model, out: Path) -> None:
    documents = [p for p in out.iterdir() if p.is_file() and p.suffix != ".safetensors"]
    assert len(documents) >= 4
    for path in documents:
        text = path.read_text()
        assert str(out.parent) not in text, path.name
        assert str(model.folder.parent) not in text, path.name


def test_small_shards_split_a_layer_and_change_no_tensor(tmp_path: Path) -> None:
    model = random_model(tmp_path, SHAPES["gqa4"])
    whole = quantized(model, tmp_path / "whole")
    limit = 100_000
    split = quantized(model, tmp_path / "split", max_shard_size=limit)
    a, b = read_tensors(whole), read_tensors(split)
    assert set(a) == set(b)
    assert all(same_bytes(a[name], b[name]) for name in a)
    sizes = {}
    for path in split.glob("*.safetensors"):
        header, _, begin = parsed_header(path)
        sizes[path.name] = (len(header), path.stat().st_size - begin)
    assert len(sizes) > 2 * len(list(whole.glob("*.safetensors")))
    assert all(size <= limit or count == 1 for count, size in sizes.values()), sizes
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(sizes)


# -- M2.7 itself, planned --------------------------------------------------------------------------


def exclude_list(layers: int) -> list[str]:
    """NVIDIA's list for MiniMax-M2.5 and M2.7, 125 entries at 62 layers, in the order of Python's sort."""
    gates = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(layers)]
    return sorted(["lm_head", *gates, *(f"model.layers.{i}.self_attn*" for i in range(layers))])


@pytest.mark.slow
def test_m27_is_planned_as_nvidia_published_it() -> None:
    """The element counts are those of NVIDIA's MiniMax-M2.7-NVFP4, which keeps attention in F32; we in BF16."""
    plan = make_plan(HeadersOnly(M27), load_recipe("nvfp4_experts_only-fp8_kv"), 5_000_000_000)
    assert plan.exclude == exclude_list(62)
    assert len(plan.exclude) == 125
    specs = [s for unit in plan.units for shard in unit.shards for s, _ in shard.offsets.values()]
    assert plan.num_tensors == len(specs) == 191_211
    assert {s.name: (s.dtype, list(s.shape)) for s in specs} == contract(M27)
    elements: Counter[str] = Counter()
    for spec in specs:
        elements[spec.dtype] += torch.Size(spec.shape).numel()
    router = 62 * (256 * 3072 + 256)
    scalars = 62 * (256 * 3 * 2 + 2)
    attention, others = 2_730_491_904, 1_278_796_288
    assert elements == {
        "U8": 112_340_238_336,
        "F8_E4M3": 14_042_529_792,
        "BF16": attention + others - router,
        "F32": router + scalars,
    }
    assert round(plan.tensor_bytes / 1e9, 1) == 134.5
    assert len(plan.shard_names()) == 64


@pytest.mark.parametrize(
    ("recipe", "kv_scales"),
    [("nvfp4_experts_only-fp8_kv", True), ("nvfp4_experts_only-fp8_kv_cast", False), ("nvfp4_experts_only", False)],
)  # fmt: skip
def test_only_the_calibrated_cache_has_scales(recipe: str, kv_scales: bool) -> None:
    config = Shape(num_hidden_layers=3).config()
    plan = make_plan(HeadersOnly(config), load_recipe(recipe), 10**9)
    names = {name for unit in plan.units for shard in unit.shards for name in shard.offsets}
    assert names == set(contract(config, kv_scales=kv_scales))
    assert plan.exclude == exclude_list(3)
