"""Export a trained drafter in the layout that engines load: z-lab's and SpecForge's for DFlash, SpecForge's for EAGLE3.

python export_drafter.py dflash --data build/drafters --out examples/tiny-m27-dflash
python export_drafter.py eagle3 --data build/drafters --out examples/tiny-m27-eagle3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import dflash
import eagle3
import torch
from drafter_model import DrafterSizes
from model import ModelConfig
from safetensors.torch import save_file
from train_drafter import DRAFT_VOCAB


def sizes(s: DrafterSizes, target: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "intermediate_size": s.intermediate_size,
        "max_position_embeddings": target.max_position_embeddings,
        "num_attention_heads": s.num_attention_heads,
        "num_hidden_layers": s.num_hidden_layers,
        "num_key_value_heads": s.num_key_value_heads,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": int(s.rope_theta),
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": target.vocab_size,
    }


def dflash_config(target: ModelConfig) -> dict[str, Any]:
    """The ids count layers from 0: hidden state = id + 1."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": dflash.BLOCK_SIZE,
        "dflash_config": {
            "mask_token_id": dflash.MASK_TOKEN,
            "target_layer_ids": [h - 1 for h in dflash.HIDDEN_STATES],
        },
        "layer_types": ["full_attention"] * dflash.SIZES.num_hidden_layers,
        "num_target_layers": target.num_hidden_layers,
    } | sizes(dflash.SIZES, target)


def eagle3_config(target: ModelConfig) -> dict[str, Any]:
    """Taps twice, as engines differ: SGLang reads the nested ids and adds one, vLLM the others as they are."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_aux_hidden_state_layer_ids": list(eagle3.HIDDEN_STATES),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [h - 1 for h in eagle3.HIDDEN_STATES],
            "use_aux_hidden_state": True,
        },
        "target_hidden_size": target.hidden_size,
    } | sizes(eagle3.SIZES, target)


def export(kind: str, data: Path, out: Path) -> None:
    state, target = torch.load(data / f"{kind}.pt"), ModelConfig()
    config = dflash_config(target) if kind == "dflash" else eagle3_config(target)
    tensors = {name: w.bfloat16().contiguous() for name, w in state["masters"].items()} | state["tables"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(sorted(tensors.items())), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    print(f"step {state['step']}: {(out / 'model.safetensors').stat().st_size / 1e6:.2f} MB in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a trained drafter.")
    parser.add_argument("kind", choices=("dflash", "eagle3"))
    parser.add_argument(
        "--data", type=Path, default=Path("build/drafters"), help="folder with the training state"
    )
    parser.add_argument("--out", type=Path, required=True, help="the drafter's folder")
    args = parser.parse_args()
    export(args.kind, args.data, args.out)


if __name__ == "__main__":
    main()
