"""The sections that engines read: NVIDIA's 125 entries for M2.7, and what the rule must keep for any model."""

from __future__ import annotations

import fnmatch
import json

from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.config import parse_config
from m27quant.checkpoint.names import linear_modules
from m27quant.checkpoint.quant_config import (
    exclude_modules,
    hf_quant_config,
    output_config,
    quantization_config,
)
from tests.checkpoint.test_config import M27


def split(layers: int, experts: int) -> tuple[list[str], list[str]]:
    """(quantized, unquantized) modules of a model with quantized experts."""
    raw = M27 | {"num_hidden_layers": layers, "num_local_experts": experts, "attn_type_list": None}
    modules = list(linear_modules(parse_config(raw | {"num_experts_per_tok": 1})))
    quantized = [m for m in modules if ".experts." in m]
    return quantized, [m for m in modules if ".experts." not in m]


def nvidias(layers: int) -> list[str]:
    """The entries of nvidia/MiniMax-M2.7-NVFP4, by the rule that gives them."""
    gates = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(layers)]
    return sorted(["lm_head", *gates, *(f"model.layers.{i}.self_attn*" for i in range(layers))])


def test_m27_has_nvidias_125_entries() -> None:
    exclude = exclude_modules(*split(62, 256))
    assert len(exclude) == 125
    assert exclude == nvidias(62)
    assert exclude[:3] == ["lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.0.self_attn*"]


@given(st.integers(1, 130), st.integers(1, 12))
def test_any_number_of_layers_and_experts(layers: int, experts: int) -> None:
    assert exclude_modules(*split(layers, experts)) == nvidias(layers)


@given(st.sets(st.sampled_from([*split(12, 3)[0], *split(12, 3)[1]]), min_size=1))
def test_patterns_match_what_they_must_and_nothing_else(quantized: set[str]) -> None:
    every = {m for part in split(12, 3) for m in part}
    patterns = exclude_modules(quantized, every - quantized)
    for module in every:
        matched = any(fnmatch.fnmatchcase(module, p) for p in patterns)
        assert matched == (module not in quantized), module


def test_sections_are_modelopts_down_to_the_order() -> None:
    assert json.dumps(hf_quant_config(["lm_head"], "fp8")) == json.dumps(
        {
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": "FP8",
                "group_size": 16,
                "exclude_modules": ["lm_head"],
            },
        }
    )
    tensors = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert json.dumps(quantization_config(["lm_head"], "fp8")) == json.dumps(
        {
            "config_groups": {
                "group_0": {"input_activations": tensors, "weights": tensors, "targets": ["Linear"]}
            },
            "ignore": ["lm_head"],
            "quant_algo": "NVFP4",
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quant_method": "modelopt",
        }
    )
    assert quantization_config([], "fp8_cast") == quantization_config([], "fp8")
    assert "kv_cache_scheme" not in quantization_config([], None)
    assert hf_quant_config([], None)["quantization"]["kv_cache_quant_algo"] is None


def test_config_json_is_the_sources_with_one_section_replaced() -> None:
    written = output_config(M27, {"new": 1}, keep_auto_map=True)
    assert list(written) == [k for k in M27 if k != "quantization_config"] + ["quantization_config"]
    assert written == M27 | {"quantization_config": {"new": 1}}
    assert "auto_map" not in output_config(M27, {}, keep_auto_map=False)
