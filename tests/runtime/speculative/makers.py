"""Small random drafters as files, in the layouts of z-lab, SpecForge, modelopt and speculators; their target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from m27quant.checkpoint.config import M2Config

D, VOCAB, LAYERS = 24, 96, 12
Tensors = dict[str, Tensor]
Edit = Callable[[dict[str, Any], Tensors], None]

TARGET = M2Config(
    hidden_size=D, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, rotary_dim=4, rope_theta=5e6, rms_norm_eps=1e-6, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=VOCAB, max_position_embeddings=512, weight_block_size=None,
)  # fmt: skip


def random(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    fan_in = shape[-1] if len(shape) > 1 else 1
    return torch.randn(*shape, generator=generator) * scale * fan_in**-0.5


def norm(generator: torch.Generator, size: int) -> Tensor:
    return 1 + 0.2 * torch.randn(size, generator=generator)


def target_weights(seed: int = 1) -> tuple[Tensor, Tensor]:
    """(embedding, head), both [VOCAB, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, D, generator=generator), random(generator, VOCAB, D, scale=3.0)


def sizes(
    layers: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, rows: int = 20
) -> dict[str, Any]:
    return {
        "hidden_size": D, "intermediate_size": rows, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5, "rope_theta": 1000.0,
        "vocab_size": VOCAB, "hidden_act": "silu",
    }  # fmt: skip


def layer_tensors(g: torch.Generator, prefix: str, s: dict[str, Any], width: int, qk_norms: bool) -> Tensors:
    q, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    tensors = {
        "input_layernorm": norm(g, D), "post_attention_layernorm": norm(g, D),
        "self_attn.q_proj": random(g, q, width), "self_attn.k_proj": random(g, kv, width),
        "self_attn.v_proj": random(g, kv, width), "self_attn.o_proj": random(g, D, q),
        "mlp.gate_proj": random(g, s["intermediate_size"], D), "mlp.up_proj": random(g, s["intermediate_size"], D),
        "mlp.down_proj": random(g, D, s["intermediate_size"]),
    }  # fmt: skip
    if qk_norms:
        tensors |= {f"self_attn.{x}_norm": norm(g, s["head_dim"]) for x in "qk"}
    return {f"{prefix}{name}.weight": tensor for name, tensor in tensors.items()}


def draft_vocabulary(g: torch.Generator, size: int) -> tuple[Tensors, Tensor]:
    """({lm_head, d2t, t2d}, the tokens)."""
    known = torch.randperm(VOCAB, generator=g)[:size].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[known] = True
    head = random(g, size, D, scale=3.0)
    return {"lm_head.weight": head, "d2t": known - torch.arange(size), "t2d": t2d}, known


def dflash(
    seed: int = 0, *, layers: int = 2, taps: tuple[int, ...] = (1, 4, 8), block: int = 8, heads: int = 4,
    kv_heads: int = 2, head_dim: int = 8, **extra: Any,
) -> tuple[dict[str, Any], Tensors]:  # fmt: skip
    """z-lab's layout; `extra` goes into config.json."""
    g = torch.Generator().manual_seed(seed)
    s = sizes(layers, heads, kv_heads, head_dim)
    config = s | {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": block,
        "dflash_config": {"target_layer_ids": list(taps), "mask_token_id": VOCAB - 1}, "num_target_layers": LAYERS,
        "tie_word_embeddings": False,
    } | extra  # fmt: skip
    tensors = {
        "fc.weight": random(g, D, len(taps) * D),
        "hidden_norm.weight": norm(g, D),
        "norm.weight": norm(g, D),
    }
    for n in range(layers):
        tensors |= layer_tensors(g, f"layers.{n}.", s, D, True)
    return config, tensors


def dflash_speculators(
    seed: int = 0, *, draft_vocab: int = 40, **layer_extra: Any
) -> tuple[dict[str, Any], Tensors]:
    """speculators' layout with a reduced vocabulary."""
    flat, tensors = dflash(seed)
    config = {
        "architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "block_size": 8,
        "transformer_layer_config": {k: v for k, v in flat.items() if k in sizes(1)} | layer_extra,
        "aux_hidden_state_layer_ids": [2, 5, 9], "mask_token_id": VOCAB - 1, "draft_vocab_size": draft_vocab,
    }  # fmt: skip
    return config, tensors | draft_vocabulary(torch.Generator().manual_seed(seed + 100), draft_vocab)[0]


def eagle3(
    seed: int = 0, *, prefix: str = "midlayer.", draft_vocab: int | None = 40, num_taps: int = 3, **extra: Any
) -> tuple[dict[str, Any], Tensors]:
    """SpecForge (`midlayer.`), modelopt (`layers.0.`); draft_vocab None: the target's head is borrowed."""
    g = torch.Generator().manual_seed(seed)
    s = sizes(1)
    config = s | {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
        "draft_vocab_size": draft_vocab or VOCAB, "target_hidden_size": D,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True},
    } | extra  # fmt: skip
    tensors = {"fc.weight": random(g, D, num_taps * D), "norm.weight": norm(g, D)}
    tensors |= layer_tensors(g, prefix, s, 2 * D, False) | {f"{prefix}hidden_norm.weight": norm(g, D)}
    if draft_vocab is not None:
        tensors |= draft_vocabulary(g, draft_vocab)[0]
    return config, tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def history(num_tokens: int, width: int, seed: int = 5) -> tuple[list[int], Tensor]:
    """(tokens, taps [num_tokens - 1, width]) of a made-up sequence."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB - 1, (num_tokens,), generator=g).tolist()
    return tokens, torch.randn(num_tokens - 1, width, generator=g)
