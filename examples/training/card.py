"""The model card of tiny-m27, rendered from measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model import ModelConfig

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en]
tags: [minimax_m2, fp8, moe, tiny, python]
---
# tiny-m27

A small, really trained MiniMax-M2 that writes Python, in the official FP8 layout. It exists so that every
command and test of m27quant runs on real input without a download: its text, its perplexity and its drafters'
acceptance mean something. It is no assistant.

| | |
|---|---|
| architecture | MiniMax-M2: hidden {hidden_size}, {num_hidden_layers} layers, \
{num_attention_heads} query and {num_key_value_heads} key/value heads of {head_dim} ({rotary_dim} rotated), \
QK-norm over the full projection, {num_local_experts} experts of {intermediate_size}, \
top-{num_experts_per_tok}, sigmoid routing with a selection bias, untied head |
| parameters | {parameters:,} |
| files | {megabytes:.2f} MB without this card: E4M3 in 128x128 blocks with `weight_scale_inv`, \
BF16 embedding, head and norms, F32 router and bias |
| tokenizer | byte-level BPE of {vocab_size}, M2's special tokens last, `<reserved_mask>` free for drafters |
| training | {steps:,} steps of 6,144 tokens, {training_minutes:.0f} minutes on two CPU threads, \
the machine shared with other work |

The oddities of the official checkpoint are kept on purpose: shards count from 0 with a denominator that is not
their number; `total_size` in the index is the size the weights would have in BF16; config.json names no bos or
eos (they are in generation_config.json) and claims MTP modules of which there are no tensors; the tokenizer
says `GPT2Tokenizer` though its pre-tokenizer is its own. transformers 5.23 reads FP8 only in whole blocks, so it
does not open these files directly: sides of 272 and 64 are wanted here.

## Figures

Held out: the {num_heldout} files in `heldout.txt`, {heldout_tokens:,} tokens, which no training step has read.
Perplexity is over non-overlapping windows of 256 tokens, computed in float32 from the exported files unless it
says otherwise.

| perplexity | |
|---|---|
| FP8 export | **{perplexity_fp8:.3f}** |
| the same, by transformers from a float32 copy | {perplexity_transformers:.3f} |
| the same in BF16 | {perplexity_fp8_bf16:.3f} |
| the same, windows of 512 | {perplexity_fp8_512:.3f} |
| F32 masters before FP8 | {perplexity_masters:.3f} |
| unigram model (training counts plus one) | {unigram_perplexity:.1f} |
| unigram / FP8 export | **{ratio:.1f}** |

| behaviour | |
|---|---|
| repeated 8-grams in 128 greedy tokens | **{loop_share:.1%}** (original text: {loop_share_original:.1%}) |
| tokens whose experts the selection bias changes | {bias_changes:.1%} (by layer: {by_layer}) |

Repeated 8-grams: {num_prompts} prompts of 64 held-out tokens at even distances, 128 tokens of plain greedy
decoding each (nothing but the most likely next token); the share of the 8-grams ending in those 128 tokens that
occurred before in prompt or text, mean over prompts.

## How it was trained

Text: CPython {python}'s standard library without tests and generated tables, {num_train} modules,
{train_mb:.1f} MB, and {train_chats:,} chats made of their functions and docstrings in M2's turn format;
{train_tokens:,} tokens in all. Each module stands between `]~!b[` and `[e~[`. SHA-256 of names and texts:

    {train_sha256}  train
    {heldout_sha256}  held out

BF16 compute over F32 masters, Muon for matrices, Adam for the rest; the selection bias is nudged towards equal
load. In the last part of the steps the model also reads greedy text of its own, written from training prompts,
and tokens that complete an 8-gram for the second time are made less likely (sequence-level unlikelihood,
arXiv:1908.04319). The scripts are in `examples/training/`.

## Greedy samples

{samples}
## Files beside the weights

`heldout.txt`: the held-out modules, framed as in training; tokenized whole it gives exactly the tokens measured
above: {heldout_files}.

`calibration.jsonl`: pieces of training modules (`text`) and a few chats (`messages`), to calibrate a quantization
with.

## Licences

Weights, tokenizer and configuration: Apache-2.0. No weight of MiniMax's models was used. `heldout.txt` and
`calibration.jsonl` are excerpts of CPython {python}, copyright by the Python Software Foundation, all rights
reserved, under the PSF License in `LICENSE.python.txt`, which holds the full notice; the excerpts are unchanged
but for the framing.
"""


def render_card(figures: dict[str, Any], corpus: dict[str, Any], config: ModelConfig) -> str:
    samples = "".join(f"```text\n{s['prompt']}⏵{s['text']}\n```\n\n" for s in figures["samples"])
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__} | figures | corpus
    fields |= {
        "samples": "`⏵` marks where the model begins.\n\n" + samples,
        "by_layer": ", ".join(f"{share:.0%}" for share in figures["bias_changes_by_layer"]),
        "num_train": corpus["train_files"],
        "num_heldout": len(corpus["heldout_files"]),
        "train_mb": corpus["train_bytes"] / 1e6,
        "heldout_files": ", ".join(f"`{name}`" for name in corpus["heldout_files"]),
    }
    return CARD.format(**fields)


NVFP4 = "## Quantized to NVFP4\n"
BEHIND = "## How it was trained\n"

NVFP4_SECTION = """\

What `make demo` writes, against this checkpoint, over all {num_tokens:,} tokens of `heldout.txt` in windows of \
{seq_len},
computed in float32; the source's perplexity in these windows is {source:.3f}:

    m27quant verify demo-out/tiny-m27-nvfp4 --logits --source examples/tiny-m27 \\
        --text examples/tiny-m27/heldout.txt --num-samples {num_windows} --seq-len {seq_len} \
--activations nvfp4 --kv-cache-dtype fp8

| inputs of experts | KV cache | KL divergence: mean | 99% | largest | same likeliest token | perplexity | ratio |
|---|---|---|---|---|---|---|---|
{rows}

Divergence in nats a token. The command gives the first row; `--activations bf16` and `--kv-cache-dtype bf16` the next
three. `python examples/training/nvfp4.py` measures all of it again and writes this section.
{faults}
"""


@dataclass(frozen=True, kw_only=True)
class NvFp4Row:
    """What `m27quant verify --logits` measured in one way of computing."""

    inputs: str
    kv_cache: str
    fault: str
    """What was broken in the checkpoint for this row; empty where nothing was."""
    codes: tuple[str, ...]
    """Of the errors that were found."""
    num_tokens: int
    num_windows: int
    seq_len: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_source: float
    perplexity: float
    perplexity_ratio: float

    def cells(self) -> str:
        return (
            f"{self.kl_mean:.4f} | {self.kl_p99:.3f} | {self.kl_max:.3f} | {self.top1_agreement:.1%} | "
            f"{self.perplexity:.3f} | {self.perplexity_ratio:.3f}"
        )


def put_nvfp4_section(card: str, rows: Sequence[NvFp4Row]) -> str:
    """The card with this section before the one on training, in the place of a former one."""
    whole = [row for row in rows if not row.fault]
    faults = "".join(
        f"\nLast row: with the {row.fault}, found as {', '.join(row.codes) or 'nothing'}.\n"
        for row in rows
        if row.fault
    )
    first = whole[0]
    section = NVFP4_SECTION.format(
        num_tokens=first.num_tokens,
        num_windows=first.num_windows,
        seq_len=first.seq_len,
        source=first.perplexity_source,
        faults=faults,
        rows="\n".join(
            f"| {row.inputs}{', one expert halved' if row.fault else ''} | {row.kv_cache} | {row.cells()} |"
            for row in rows
        ),
    )
    above, _, below = card.partition(BEHIND)
    return above.partition(NVFP4)[0] + NVFP4 + section + BEHIND + below
