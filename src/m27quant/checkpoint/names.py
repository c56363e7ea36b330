"""Official tensor names of MiniMax-M2.x and what each should be, derived from the config alone.  No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from m27quant.checkpoint.config import GROUP_SIZE, M2Config

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PROJECTIONS = ("w1", "w2", "w3")
"""w1 is the gate, w3 the up and w2 the down projection."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor must be: safetensors dtype tag and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def layer_prefix(layer: int) -> str:
    """Name of a decoder layer."""
    return f"model.layers.{layer}"


def attention(layer: int) -> str:
    """Name of a layer's attention module."""
    return f"{layer_prefix(layer)}.self_attn"


def moe(layer: int) -> str:
    """Name of a layer's mixture of experts."""
    return f"{layer_prefix(layer)}.block_sparse_moe"


def gate(layer: int) -> str:
    """Name of a router's weight."""
    return f"{moe(layer)}.gate.weight"


def correction_bias(layer: int) -> str:
    """Name of a router's selection bias."""
    return f"{moe(layer)}.e_score_correction_bias"


def expert(layer: int, index: int, projection: str) -> str:
    """Module name of one expert matrix, without `.weight`."""
    return f"{moe(layer)}.experts.{index}.{projection}"


def k_scale(layer: int) -> str:
    """Name of the scale of cached keys."""
    return f"{attention(layer)}.k_proj.k_scale"


def v_scale(layer: int) -> str:
    """Name of the scale of cached values."""
    return f"{attention(layer)}.v_proj.v_scale"


def attention_shapes(c: M2Config) -> dict[str, tuple[int, int]]:
    """[out, in] of the four attention projections."""
    return {
        "q_proj": (c.q_size, c.hidden_size),
        "k_proj": (c.kv_size, c.hidden_size),
        "v_proj": (c.kv_size, c.hidden_size),
        "o_proj": (c.hidden_size, c.q_size),
    }


def expert_shapes(c: M2Config) -> dict[str, tuple[int, int]]:
    """[out, in] of the three matrices of an expert."""
    up = (c.intermediate_size, c.hidden_size)
    return {"w1": up, "w2": (c.hidden_size, c.intermediate_size), "w3": up}


def norm_shapes(c: M2Config, layer: int) -> dict[str, tuple[int]]:
    """The four norms of a decoder layer by full name."""
    return {
        f"{layer_prefix(layer)}.input_layernorm.weight": (c.hidden_size,),
        f"{layer_prefix(layer)}.post_attention_layernorm.weight": (c.hidden_size,),
        f"{attention(layer)}.q_norm.weight": (c.q_size,),
        f"{attention(layer)}.k_norm.weight": (c.kv_size,),
    }


def linear_modules(c: M2Config) -> Iterator[str]:
    """Every linear module of the model by official name, layer by layer, then the head."""
    for layer in range(c.num_hidden_layers):
        for projection in ATTENTION_PROJECTIONS:
            yield f"{attention(layer)}.{projection}"
        yield f"{moe(layer)}.gate"
        for index in range(c.num_local_experts):
            for projection in EXPERT_PROJECTIONS:
                yield expert(layer, index, projection)
    yield "lm_head"


def nvfp4_specs(module: str, shape: tuple[int, int]) -> list[TensorSpec]:
    """The four tensors of one NVFP4 linear of `shape` [out, in]."""
    n, k = shape
    return [
        TensorSpec(f"{module}.weight", "U8", (n, k // 2)),
        TensorSpec(f"{module}.weight_scale", "F8_E4M3", (n, k // GROUP_SIZE)),
        TensorSpec(f"{module}.weight_scale_2", "F32", ()),
        TensorSpec(f"{module}.input_scale", "F32", ()),
    ]
