"""Random drafters of any shape in the layouts of z-lab, SpecForge, modelopt and speculators."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROWS = 48, 2, 1, 16, 64
VOCAB, DRAFT_VOCAB = 2048, 256
BITS = {"BF16": 2, "F32": 4, "I64": 8, "I32": 4, "BOOL": 1, "U8": 1}
Tensors = dict[str, tuple[str, list[int], bytes]]


def zeros(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    size = BITS[dtype]
    for n in shape:
        size *= n
    return dtype, list(shape), bytes(size)


def offsets(tokens: list[int]) -> tuple[str, list[int], bytes]:
    """d2t: row i stands for token i + d2t[i]."""
    return "I64", [len(tokens)], struct.pack(f"<{len(tokens)}q", *(t - i for i, t in enumerate(tokens)))


def marks(tokens: list[int], vocab: int = VOCAB) -> tuple[str, list[int], bytes]:
    """t2d: which tokens the drafter knows."""
    known = set(tokens)
    return "BOOL", [vocab], bytes(int(i in known) for i in range(vocab))


KNOWN = list(range(3, 3 + 7 * DRAFT_VOCAB, 7))
"""Tokens of the reduced vocabulary."""


def _layer(prefix: str, width: int, per_head_norms: bool) -> Tensors:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.gate_proj": (ROWS, HIDDEN),
        "mlp.up_proj": (ROWS, HIDDEN),
        "mlp.down_proj": (HIDDEN, ROWS),
    }
    if per_head_norms:
        shapes |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    else:
        shapes["hidden_norm"] = (HIDDEN,)
    return {f"{prefix}.{name}.weight": zeros("BF16", *shape) for name, shape in shapes.items()}


def _sizes(layers: int) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": ROWS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "vocab_size": VOCAB,
    }


def dflash(layers: int = 2, taps: tuple[int, ...] = (1, 4, 8)) -> tuple[dict[str, Any], Tensors]:
    """z-lab, SpecForge, modelopt: taps are layers; neither embedding nor head."""
    config = _sizes(layers) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 8,
        "dflash_config": {"target_layer_ids": list(taps), "mask_token_id": 2040},
        "num_target_layers": 12,
        "tie_word_embeddings": False,
    }
    tensors: Tensors = {
        "fc.weight": zeros("BF16", HIDDEN, len(taps) * HIDDEN),
        "hidden_norm.weight": zeros("BF16", HIDDEN),
        "norm.weight": zeros("BF16", HIDDEN),
    }
    for layer in range(layers):
        tensors |= _layer(f"layers.{layer}", HIDDEN, True)
    return config, tensors


def dflash_speculators() -> tuple[dict[str, Any], Tensors]:
    """speculators: taps are hidden states, a reduced vocabulary with its own head."""
    flat, tensors = dflash()
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": {k: v for k, v in flat.items() if k in _sizes(1)},
        "aux_hidden_state_layer_ids": [2, 5, 9],
        "block_size": 8,
        "mask_token_id": 2040,
        "draft_vocab_size": DRAFT_VOCAB,
    }
    return config, tensors | _vocabulary()


def eagle3(prefix: str = "midlayer") -> tuple[dict[str, Any], Tensors]:
    """SpecForge (`midlayer`) and modelopt (`layers.0`); both lists of taps, so that every engine finds its own."""
    config = _sizes(1) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": DRAFT_VOCAB,
        "target_hidden_size": HIDDEN,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [2, 6, 9],
    }
    tensors: Tensors = {
        "fc.weight": zeros("BF16", HIDDEN, 3 * HIDDEN),
        "norm.weight": zeros("BF16", HIDDEN),
        **_layer(prefix, 2 * HIDDEN, False),
        **_vocabulary(),
    }
    return config, tensors


def eagle3_speculators() -> tuple[dict[str, Any], Tensors]:
    """speculators: taps are hidden states, with an embedding of its own."""
    flat, tensors = eagle3("layers.0")
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {k: v for k, v in flat.items() if k in _sizes(1)},
        "eagle_aux_hidden_state_layer_ids": [2, 6, 9],
        "draft_vocab_size": DRAFT_VOCAB,
    }
    return config, tensors | {"embed_tokens.weight": zeros("BF16", VOCAB, HIDDEN)}


def _vocabulary() -> Tensors:
    return {
        "lm_head.weight": zeros("BF16", DRAFT_VOCAB, HIDDEN),
        "d2t": offsets(KNOWN),
        "t2d": marks(KNOWN),
    }


def write_drafter(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder
