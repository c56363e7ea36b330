"""A source of any size without data: what its headers would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m27quant.checkpoint.config import parse_config
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import Source

M27: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 204800,
    "model_type": "minimax_m2",
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "qk_norm_type": "per_layer",
    "quantization_config": {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
"""The fields of MiniMax-M2.7's public config.json that decide sizes."""


class HeadersOnly(Source):
    """The passed-through tensors of a checkpoint by name, type and shape."""

    def __init__(self, raw_config: dict[str, Any]) -> None:
        self.raw_config, self.config = raw_config, parse_config(raw_config)

    def info(self, name: str) -> TensorInfo:
        c = self.config
        tables = {"model.embed_tokens.weight", "lm_head.weight"}
        shape: tuple[int, ...] = (c.vocab_size, c.hidden_size) if name in tables else (c.hidden_size,)
        dtype = "BF16"
        if name.endswith("gate.weight"):
            dtype, shape = "F32", (c.num_local_experts, c.hidden_size)
        elif name.endswith("e_score_correction_bias"):
            dtype, shape = "F32", (c.num_local_experts,)
        elif name.endswith("q_norm.weight"):
            shape = (c.q_size,)
        elif name.endswith("k_norm.weight"):
            shape = (c.kv_size,)
        return TensorInfo(name, dtype, shape, Path("headers-only"), 0, 0)
