"""Measure an exported checkpoint and write its model card.

Every figure of the card comes from here and from nvfp4.py: read from the files that were exported, computed in
float32, held-out text only.  transformers is asked for the same perplexity from the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from card import render_card
from corpus import BOS
from fp8_checkpoint import read_dequantized, read_weights
from generation import generate_greedy, loop_share
from model import ModelConfig, Parameters, compute_copies, forward
from nvfp4 import write_section
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from train import PROMPT_LEN, TEXT_LEN, load_tokens, perplexity, unigram_perplexity, windows
from transformers import AutoModelForCausalLM

NUM_PROMPTS = 128
SAMPLE_PROMPTS = (
    "import os\nimport sys\n\ndef read_file(path):\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
)
SAMPLE_CHAT = "Write the function is_empty.\nReturn True if the queue is empty, False otherwise."


@torch.no_grad()
def bias_effect(params: Parameters, bias: Tensor, tokens: Tensor, config: ModelConfig) -> list[float]:
    """Per layer: share of tokens whose chosen experts would be others if the selection bias were zero."""
    inputs, _ = windows(tokens, 256)
    changed = torch.zeros(config.num_hidden_layers)
    for ids in inputs.split(16):
        scores: list[Tensor] = []
        forward(params, bias, ids, config, scores=scores)
        for n, score in enumerate(scores):
            with_bias, without = (
                s.topk(config.num_experts_per_tok, dim=-1).indices.sort(-1).values
                for s in (score + bias[n], score)
            )
            changed[n] += (with_bias != without).any(-1).sum()
    return (changed / inputs.numel()).tolist()


@torch.no_grad()
def transformers_perplexity(checkpoint: Path, tokens: Tensor) -> float:
    """The same perplexity from transformers' own model, float32.

    It gets a float32 copy under the same names: its FP8 reader (5.23) refuses blocks cut by an edge.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
        save_file(read_dequantized(checkpoint), Path(copy) / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            copy, dtype=torch.float32, output_loading_info=True
        )
    assert not any(report.values()), report
    model.eval()
    inputs, targets = windows(tokens, 256)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        total += F.cross_entropy(model(x).logits.flatten(0, 1), y.reshape(-1), reduction="sum").item()
    return math.exp(total / inputs.numel())


def samples(
    params: Parameters, bias: Tensor, tokenizer: Tokenizer, config: ModelConfig
) -> list[dict[str, str]]:
    """Greedy text after a few prompts, cut at the first end token."""
    turn = f"{BOS}]~b]system\nYou write Python.[e~[\n]~b]user\n{SAMPLE_CHAT}[e~[\n]~b]ai\n<think>\n"
    end = tokenizer.token_to_id("[e~[")
    result = []
    for prompt in [BOS + text for text in SAMPLE_PROMPTS] + [turn]:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        text = generate_greedy(params, bias, ids, 96, config)[0, ids.shape[1] :].tolist()
        text = text[: text.index(end)] if end in text else text
        result.append({"prompt": prompt, "text": tokenizer.decode(text, skip_special_tokens=False)})
    return result


def measure(data: Path, checkpoint: Path) -> dict[str, Any]:
    config, tokenizer = ModelConfig(), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    train, heldout = load_tokens(data / "train.bin"), load_tokens(data / "heldout.bin")
    text = (checkpoint / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text).ids
    assert ids == heldout.tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text

    params, bias = read_weights(checkpoint, config)
    state = torch.load(data / "state.pt", map_location="cpu")
    unigram = unigram_perplexity(train, heldout, config.vocab_size)
    fp8 = perplexity(params, bias, heldout, config)
    starts = torch.linspace(0, len(heldout) - PROMPT_LEN - TEXT_LEN, NUM_PROMPTS).long()[:, None]
    original = heldout[starts + torch.arange(PROMPT_LEN + TEXT_LEN)]
    texts = generate_greedy(params, bias, original[:, :PROMPT_LEN], TEXT_LEN, config)
    changed = bias_effect(params, bias, heldout, config)
    return {
        "steps": state["step"],
        "training_minutes": state["seconds"] / 60,
        "parameters": sum(w.numel() for w in params.values()) + bias.numel(),
        "megabytes": sum(p.stat().st_size for p in checkpoint.glob("*") if p.name != "README.md") / 1e6,
        "unigram_perplexity": unigram,
        "perplexity_masters": perplexity(state["masters"], state["bias"], heldout, config),
        "perplexity_fp8": fp8,
        "perplexity_fp8_512": perplexity(params, bias, heldout, config, length=512),
        "perplexity_fp8_bf16": perplexity(compute_copies(params, torch.bfloat16), bias, heldout, config),
        "perplexity_transformers": transformers_perplexity(checkpoint, heldout),
        "ratio": unigram / fp8,
        "loop_share": loop_share(texts, PROMPT_LEN),
        "loop_share_original": loop_share(original, PROMPT_LEN),
        "num_prompts": NUM_PROMPTS,
        "bias_changes": sum(changed) / len(changed),
        "bias_changes_by_layer": changed,
        "samples": samples(params, bias, tokenizer, config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an exported checkpoint and write its model card.")
    parser.add_argument(
        "--data", type=Path, default=Path("build/tiny-m27"), help="folder of the training run"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/tiny-m27"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.data, args.checkpoint)
    (args.data / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    corpus = json.loads((args.data / "corpus.json").read_text(encoding="utf-8"))
    (args.checkpoint / "README.md").write_text(render_card(figures, corpus, ModelConfig()), encoding="utf-8")
    print(json.dumps(figures, indent=2))
    write_section(args.checkpoint)


if __name__ == "__main__":
    main()
