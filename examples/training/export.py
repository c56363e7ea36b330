"""Export the training state as a checkpoint in MiniMax-M2's official layout.

python export.py --data build/tiny-m27 --out examples/tiny-m27
python evaluate.py --data build/tiny-m27 --checkpoint examples/tiny-m27      # measures it, writes its card
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from corpus import (
    BOS,
    EOS,
    MASK,
    PAD,
    PLAIN_ADDED,
    SPECIAL,
    UNK,
    chats,
    checksum,
    library_documents,
    split_heldout,
)
from fp8_checkpoint import write_weights
from model import ModelConfig
from tokenizers import Tokenizer

CALIBRATION_TEXTS, CALIBRATION_CHATS = 80, 8
CALIBRATION_CHARS = 1500


def model_config(config: ModelConfig) -> dict[str, Any]:
    """config.json with the official keys in their order; the MTP keys are mere claims, as they are there."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * config.num_hidden_layers,
        "dtype": "bfloat16",
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": int(config.rope_theta),
        "rotary_dim": config.rotary_dim,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": config.vocab_size,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "do_sample": True,
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 0.95,
        "transformers_version": "4.46.1",
    }


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """As the official one, its class included: readers must not let that class replace the pre-tokenizer."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token not in PLAIN_ADDED,
        }
        for token in [*SPECIAL, *PLAIN_ADDED, MASK]
    }  # fmt: skip
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": config.max_position_embeddings,
        "pad_token": PAD,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": UNK,
    }


def calibration_rows(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Pieces of training modules, at least 256 tokens each, one a module; then chats.

    Which ones is decided by the CRC32 of their names.
    """
    train, _ = split_heldout(library_documents())
    rows: list[dict[str, Any]] = []
    for document in sorted(train, key=lambda document: checksum(document.name)):
        start = (
            document.text.find("\n", checksum(document.name) % max(1, len(document.text) - CALIBRATION_CHARS))
            + 1
        )
        piece = document.text[start : start + CALIBRATION_CHARS]
        piece = piece[: piece.rfind("\n") + 1]
        if len(tokenizer.encode(piece).ids) >= 256 and len(rows) < CALIBRATION_TEXTS:
            rows.append({"text": piece})
    plain = [(name, row) for name, row in chats(train) if "tools" not in row]
    plain.sort(key=lambda item: checksum(item[0]))
    return rows + [row for _, row in plain[:CALIBRATION_CHATS]]


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config, tokenizer = ModelConfig(), Tokenizer.from_file(str(data / "tokenizer.json"))
    state = torch.load(data / "state.pt", map_location="cpu")
    write_weights(out, state["masters"], state["bias"], config)
    write_json(out / "config.json", model_config(config))
    write_json(out / "generation_config.json", generation_config(tokenizer))
    write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer, config))
    for name in ("tokenizer.json", "heldout.txt"):
        shutil.copyfile(data / name, out / name)
    shutil.copyfile(Path(__file__).with_name("chat_template.jinja"), out / "chat_template.jinja")
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", out / "LICENSE.python.txt")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in calibration_rows(tokenizer))
    (out / "calibration.jsonl").write_text(rows, encoding="utf-8")
    print(f"step {state['step']}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.2f} MB in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Export the training state in MiniMax-M2's official FP8 layout."
    )
    parser.add_argument("--data", type=Path, default=Path("build/tiny-m27"), help="folder with state.pt")
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-m27"), help="checkpoint folder")
    args = parser.parse_args()
    export(args.data, args.out)


if __name__ == "__main__":
    main()
