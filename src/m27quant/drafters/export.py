"""The drafter's folder: config.json in the layouts that vLLM and SGLang load, weights, card, curve.

DFlash in z-lab's layout (`dflash_config.target_layer_ids`, layers counted from 0), EAGLE3 in SpecForge's (the same ids
in `eagle_config`, hidden states at the top level), or both in that of speculators (hidden states).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m27quant.checkpoint.config import ARCHITECTURE
from m27quant.drafters.card import CURVE, render
from m27quant.drafters.curve import draw
from m27quant.drafters.prepare import Prepared
from m27quant.drafters.presets import Shape
from m27quant.drafters.state import CONFIG, TrainingFolder
from m27quant.runtime.speculative.eagle3 import DEFAULT_STEPS

CARD = "README.md"


def config_of(shape: Shape, layout: str = "plain") -> dict[str, Any]:
    """config.json."""
    if layout == "speculators":
        return _speculators(shape)
    return (_dflash if shape.kind == "dflash" else _eagle3)(shape) | _sizes(shape)


def name_in(layout: str, name: str) -> str:
    """A tensor's name in the file; speculators calls SpecForge's `midlayer` `layers.0`."""
    return name.replace("midlayer.", "layers.0.", 1) if layout == "speculators" else name


def _sizes(s: Shape) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "intermediate_size": s.intermediate_size,
        "max_position_embeddings": s.max_position_embeddings,
        "num_attention_heads": s.num_attention_heads,
        "num_hidden_layers": s.num_hidden_layers,
        "num_key_value_heads": s.num_key_value_heads,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": int(s.rope_theta) if s.rope_theta.is_integer() else s.rope_theta,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": s.vocab_size,
    }


def _dflash(s: Shape) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": s.block_size,
        "dflash_config": {
            "mask_token_id": s.mask_token_id,
            "target_layer_ids": [state - 1 for state in s.hidden_states],
        },
        "layer_types": ["full_attention"] * s.num_hidden_layers,
        "num_target_layers": s.num_target_layers,
    }


def _eagle3(s: Shape) -> dict[str, Any]:
    """Taps twice, as engines differ: SGLang reads the nested ids and adds one, vLLM the others as they are."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": s.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(s.hidden_states),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [state - 1 for state in s.hidden_states],
            "use_aux_hidden_state": True,
        },
        "target_hidden_size": s.hidden_size,
    }


def _speculators(s: Shape) -> dict[str, Any]:
    """Taps as hidden states, which vLLM and speculators take as they are."""
    layer = {"model_type": "qwen3" if s.kind == "dflash" else "llama"} | _sizes(s)
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": s.block_size - 1 if s.block_size else DEFAULT_STEPS,
    }
    common = {
        "speculators_model_type": s.kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": s.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"architectures": [ARCHITECTURE], "name_or_path": None},
        },
        "target_hidden_size": s.hidden_size,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "dtype": "bfloat16",
    }
    if s.kind == "dflash":
        layer["layer_types"] = ["full_attention"] * s.num_hidden_layers
        return common | {
            "architectures": ["DFlashSpeculator"],
            "aux_hidden_state_layer_ids": list(s.hidden_states),
            "block_size": s.block_size,
            "draft_vocab_size": s.vocab_size,
            "mask_token_id": s.mask_token_id,
            "sample_from_anchor": False,
        }
    return common | {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": s.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(s.hidden_states),
        "norm_before_residual": False,
    }


def write_drafter(
    plan: Prepared,
    masters: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    entries: Sequence[dict[str, Any]],
    folder: TrainingFolder,
    *,
    layout: str,
    command: str | None,
    last: int,
) -> dict[str, Any]:
    """Write everything; returns what `TrainResult` is made of."""
    config = config_of(plan.recipe.shape, layout)
    tensors = {name_in(layout, name): master.to(torch.bfloat16) for name, master in masters.items()} | dict(
        tables
    )
    steps = [entry for entry in entries if entry["event"] == "step"][-last:]
    evaluations = [entry for entry in entries if entry["event"] == "eval"]
    hits = [entry["accuracy"] for entry in steps]  # of blocks of one size, or of several in turn
    result = {
        "kind": plan.recipe.shape.kind,
        "steps": plan.steps,
        "loss": _mean([entry["loss"] for entry in steps]),
        "accuracy": [
            _mean([h[k] for h in hits if k < len(h)]) for k in range(max(map(len, hits), default=0))
        ],
        "heldout": {k: v for k, v in evaluations[-1].items() if k != "event"} if evaluations else None,
        "parameters": sum(master.numel() for master in masters.values()),
        "tensor_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }
    documents = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        CURVE: draw(entries).encode(),
        CARD: render(plan, config, result, command=command).encode(),
    }
    folder.finish(documents, tensors, result)
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
