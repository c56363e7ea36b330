"""transformers' MiniMax-M2 with the weights of an NVFP4 checkpoint, dequantized to BF16: the rival of the runtime.

Weights are put in place one by one, so that no more memory is taken than the model itself needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.checkpoint.source import Source
from m27quant.runtime.loader import dequantize_linear, read_plain

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CPU = torch.device("cpu")
MODES = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways to compute experts."""


def load(folder: Path) -> Any:
    """A model in BF16 in evaluation mode; its router in F32 as far as transformers lets it be."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    with open_checkpoint(Location(folder)) as source:
        raw = {k: v for k, v in source.raw_config.items() if k != "quantization_config"}
        raw |= {"use_mtp": False, "num_mtp_modules": 0}  # there are no such weights
        with torch.device("meta"):
            model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**raw)).to(torch.bfloat16)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        _assign(model, source)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def best_mode(model: Any, ids: torch.Tensor) -> str:
    """The fastest of `MODES` that works for a forward pass over `ids` [B, T]; it stays set."""
    from benchmarks.machine import interleaved

    seconds = {}
    for mode in MODES:
        try:
            model.set_experts_implementation(mode)
            with torch.inference_mode():
                seconds[mode] = interleaved({mode: lambda: model(ids)}, 3)[mode]
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            continue
    fastest = min(seconds, key=lambda mode: seconds[mode])
    model.set_experts_implementation(fastest)
    return fastest


def _assign(model: Any, source: Source) -> None:
    def put(module: Any, name: str, tensor: torch.Tensor) -> None:
        expected = getattr(module, name)
        assert expected.shape == tensor.shape, (name, expected.shape, tensor.shape)
        if name in module._buffers:
            module._buffers[name] = tensor
        else:
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))

    def plain(name: str) -> torch.Tensor:
        return read_plain(source, name).to(torch.bfloat16)

    put(model.model.embed_tokens, "weight", plain(names.EMBEDDING))
    put(model.model.norm, "weight", plain(names.FINAL_NORM))
    put(model.lm_head, "weight", plain(names.LM_HEAD))
    for index, layer in enumerate(model.model.layers):
        prefix = names.layer_prefix(index)
        for name in ("input_layernorm", "post_attention_layernorm"):
            put(getattr(layer, name), "weight", plain(f"{prefix}.{name}.weight"))
        for name in ("q_norm", "k_norm"):
            put(getattr(layer.self_attn, name), "weight", plain(f"{names.attention(index)}.{name}.weight"))
        for name in names.ATTENTION_PROJECTIONS:
            weight = dequantize_linear(source, f"{names.attention(index)}.{name}", CPU)
            put(getattr(layer.self_attn, name), "weight", weight)
        put(layer.mlp.gate, "weight", plain(names.gate(index)))
        put(layer.mlp, "e_score_correction_bias", read_plain(source, names.correction_bias(index)).float())
        _assign_experts(layer.mlp.experts, source, index, put)


def _assign_experts(experts: Any, source: Source, index: int, put: Any) -> None:
    c = source.config
    up = torch.empty(c.num_local_experts, 2 * c.intermediate_size, c.hidden_size, dtype=torch.bfloat16)
    down = torch.empty(c.num_local_experts, c.hidden_size, c.intermediate_size, dtype=torch.bfloat16)
    for expert in range(c.num_local_experts):
        w1, w2, w3 = (
            dequantize_linear(source, names.expert(index, expert, p), CPU) for p in names.EXPERT_PROJECTIONS
        )
        up[expert, : c.intermediate_size], up[expert, c.intermediate_size :], down[expert] = w1, w3, w2
    put(experts, "gate_up_proj", up)
    put(experts, "down_proj", down)
