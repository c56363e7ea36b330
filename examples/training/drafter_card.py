"""The model cards of the tiny drafters, rendered from measured figures."""

from __future__ import annotations

from typing import Any

import dflash
import eagle3
from drafter_data import HELDOUT_PROMPT_LEN, TEXT_LEN
from train_drafter import DRAFT_VOCAB

CARD = """\
---
license: apache-2.0
base_model: ../tiny-m27
tags: [minimax_m2, speculative-decoding, {kind}, tiny, python]
---
# tiny-m27-{kind}

{what}

| | |
|---|---|
| parameters | {parameters:,} of its own, {megabytes:.2f} MB in BF16 |
{shape}

    m27quant run examples/tiny-m27 --drafter examples/tiny-m27-{kind} --prompt "def read_file(path):" --stats

## How much it drafts right

The target's own greedy text of {text_len} tokens behind {num_prompts} held-out prompts of {prompt_len} tokens (which
neither target nor drafter was trained on), F32, batch-invariant; end tokens do not end it. tau is tokens per forward
pass of the target, its own included: 1 + m_accept, over all steps of all prompts. Prompt lookup (`--drafter ngram`)
is measured at the same length with as many drafts.

| | tau | m_accept | C_1 .. C_k | prompt lookup: tau |
|---|---|---|---|---|
{rows}

C_k is the share of steps whose first k drafts were all accepted. With the drafter, with prompt lookup and without
either the {num_prompts} texts are the same, token for token. Of their 8-grams {loop_share:.1%} had occurred before in
prompt or text: the target is small and repeats itself, which helps every drafter, prompt lookup most of all.

## How it was trained

{history} Everything is in `examples/training/`:

    P=examples/training D=build/tiny-m27 T=build/drafters
    python $P/corpus.py           --out $D
    python $P/drafter_data.py     --data $D --out $T --groups {groups}
    python $P/train_drafter.py    {kind} --data $T --steps {steps}{options}
    python $P/export_drafter.py   {kind} --data $T --out examples/tiny-m27-{kind}
    python $P/evaluate_drafter.py {kind} --data $T

{data}

Weights: Apache-2.0. No weight of MiniMax's models or of any published drafter was used.
"""

OPTIONS = {"dflash": "", "eagle3": " --batch-size 16"}
"""Of train_drafter.py, where they are not its defaults."""
HISTORY = {
    "dflash": "One run with seed 0, resumed with other `--steps` after 500, 700, 800, 900 and 1,300 steps, the "
    "last two times with `--muon-lr 0.014 --adam-lr 0.0028` too.",
    "eagle3": "One run with seed 0.",
}
"""How the committed weights came about."""
DATA = """\
On-policy text: {sequences:,} prompts from the target's training text (16 to 256 tokens, a quarter of them beginnings of
documents), each continued greedily by the target for {text_len} tokens, with its hidden states. Muon for matrices, Adam
for the rest, BF16 over F32 masters; loss half cross-entropy with the target's distribution, half with the token it
chose."""

DFLASH = """\
A DFlash drafter for `examples/tiny-m27`, small and really trained, so that speculative decoding can be tried and tested
without a download. z-lab's and SpecForge's layout: neither embedding nor head, both are the target's."""
DFLASH_SHAPE = """\
| architecture | {layers} layers, {heads}/{kv_heads} heads of {head_dim}, all full attention, block {block} \
(trained with blocks of 8 and 16) |
| taps | `target_layer_ids` {ids}: outputs of these layers counted from 0, hidden states {states} |
| mask token | {mask}, the target's `<reserved_mask>` |"""
EAGLE3 = """\
An EAGLE3 head for `examples/tiny-m27`, small and really trained, so that speculative decoding can be tried and tested
without a download. SpecForge's layout: `midlayer.*`, a head of its own over {vocab:,} of 2,048 tokens with `d2t` and
`t2d`; the embedding is the target's."""
EAGLE3_SHAPE = """\
| architecture | one layer, {heads}/{kv_heads} heads of {head_dim} |
| taps | hidden states {states}, engines' defaults for 8 layers; stated twice: {ids} in `eagle_config` \
(SGLang adds one), {states} at the top level (vLLM takes them as they are) |
| draft vocabulary | {vocab:,} tokens, the most frequent ones of the training text |"""


def render(kind: str, f: dict[str, Any]) -> str:
    module = dflash if kind == "dflash" else eagle3
    s, states = module.SIZES, list(module.HIDDEN_STATES)
    facts = {
        "layers": s.num_hidden_layers, "heads": s.num_attention_heads, "kv_heads": s.num_key_value_heads,
        "head_dim": s.head_dim, "states": states, "ids": [h - 1 for h in states], "block": dflash.BLOCK_SIZE,
        "mask": dflash.MASK_TOKEN, "vocab": DRAFT_VOCAB,
    }  # fmt: skip
    what, shape = (DFLASH, DFLASH_SHAPE) if kind == "dflash" else (EAGLE3, EAGLE3_SHAPE)
    rows = [
        f"| {name} | **{r['drafter']['tau']:.3f}** | {r['drafter']['m_accept']:.3f} | "
        f"{' '.join(f'{c:.3f}' for c in r['drafter']['c_k'][:7])} | {r['ngram']['tau']:.3f} |"
        for name, r in f["settings"].items()
    ]
    return CARD.format(
        kind=kind, what=what.format(**facts), shape=shape.format(**facts), rows="\n".join(rows), text_len=TEXT_LEN,
        prompt_len=HELDOUT_PROMPT_LEN, data=DATA.format(sequences=256 * f["groups"], text_len=TEXT_LEN),
        options=OPTIONS[kind], history=HISTORY[kind],
        **{k: f[k] for k in ("parameters", "megabytes", "num_prompts", "loop_share", "groups", "steps")},
    )  # fmt: skip
