"""A checkpoint of M2.7's full shapes whose shards are headers alone: the file system stores no tensor byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m27quant.checkpoint.config import parse_config
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.quant_config import hf_quant_config, quantization_config
from m27quant.checkpoint.writer import split_into_shards
from m27quant.verify.inventory import expected_tensors
from tests.checkpoints import Shape

M27 = Shape(
    hidden_size=3072,
    intermediate_size=1536,
    num_hidden_layers=62,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    rotary_dim=64,
    num_local_experts=256,
    num_experts_per_tok=8,
    vocab_size=200064,
)


def exclude_list(layers: int) -> list[str]:
    """NVIDIA's list for this many layers."""
    gates = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(layers)]
    return sorted(["lm_head", *gates, *(f"model.layers.{i}.self_attn*" for i in range(layers))])


def as_expected(spec: TensorSpec) -> TensorSpec:
    return spec


def write_sparse(
    folder: Path, shape: Shape = M27, stored: Callable[[TensorSpec], TensorSpec] = as_expected
) -> Path:
    """Headers, index and configs of an NVFP4 checkpoint, good as it is; every tensor is a hole in its file."""
    folder.mkdir()
    raw: dict[str, Any] = shape.config(fp8=False)
    excluded = exclude_list(shape.num_hidden_layers)
    plans = split_into_shards(map(stored, expected_tensors(parse_config(raw))), 5_000_000_000)
    weight_map: dict[str, str] = {}
    for number, plan in enumerate(plans, 1):
        name = f"model-{number:05d}-of-{len(plans):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(plan.header)
            os.truncate(file.fileno(), plan.size)
        weight_map |= dict.fromkeys(plan.offsets, name)
    total = sum(plan.tensor_bytes for plan in plans)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    raw |= {"rope_theta": 5_000_000, "quantization_config": quantization_config(excluded, "fp8")}
    for name, value in (
        ("model.safetensors.index.json", index),
        ("config.json", raw),
        ("hf_quant_config.json", hf_quant_config(excluded, "fp8")),
        ("generation_config.json", {"eos_token_id": 200020}),
    ):
        (folder / name).write_text(json.dumps(value))
    return folder
