"""MiniMax-M2.7 and drafters for it at their full sizes, as headers alone: no tensor byte is stored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from m27quant.checkpoint.drafter_config import expected_tensors, parse_drafter
from m27quant.checkpoint.quant_config import hf_quant_config, quantization_config
from m27quant.verify.collect import Findings
from tests.verify.sparse import M27, exclude_list, write_sparse

CONTEXT = 204_800
SIZES: dict[str, Any] = {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000,
    "vocab_size": 200_064,
}
DFLASH = SIZES | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_hidden_layers": 5,
    "intermediate_size": 8192,
    "block_size": 8,
    "dflash_config": {"target_layer_ids": [1, 16, 30, 44, 59], "mask_token_id": 200_054},
}
EAGLE3 = SIZES | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "intermediate_size": 8192,
    "draft_vocab_size": 32_000,
    "target_hidden_size": 3072,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 30, 58], "use_aux_hidden_state": True},
}
"""As SpecForge trains it: taps are nested layers, which every engine's defaults are, too."""


def write_m27(folder: Path) -> Path:
    """134.5 GB of NVFP4 as far as headers go."""
    write_sparse(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": CONTEXT}))
    return folder


def write_configs(folder: Path) -> Path:
    """What of it is arithmetic: the configs without the 191,211 headers."""
    folder.mkdir()
    raw = M27.config(fp8=False) | {"rope_theta": 5_000_000, "max_position_embeddings": CONTEXT}
    excluded = exclude_list(M27.num_hidden_layers)
    raw["quantization_config"] = quantization_config(excluded, "fp8")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(excluded, "fp8")))
    return folder


def write_drafter(folder: Path, config: dict[str, Any]) -> Path:
    """A drafter of this config, its tensors holes in one file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parsed = parse_drafter(config, Findings())
    assert parsed is not None
    taps = len(parsed.section()["target_layer_ids"]) if parsed.kind == "dflash" else 3
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("BF16", shape) for name, shape in expected_tensors(parsed, taps)
    }
    if parsed.kind == "eagle3":
        shapes |= {
            "lm_head.weight": ("BF16", (parsed.draft_vocab_size, parsed.hidden_size)),
            "d2t": ("I64", (parsed.draft_vocab_size,)),
            "t2d": ("BOOL", (parsed.vocab_size,)),
        }
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = {"BF16": 2, "I64": 8, "BOOL": 1}[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + offset)
    return folder
