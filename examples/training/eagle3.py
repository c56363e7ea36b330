"""EAGLE3 in training: the head drafts on its own hidden states for some steps (training-time test, arXiv:2503.01840).

Slot i holds token i + 1 and the features of position i, and predicts token i + 2; at step j it holds token i + 1 + j
and its own output of the step before.

Shapes: B sequences, T positions, N slots, D hidden, F tapped features, W draft vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dflash import Target
from drafter_model import (
    DrafterSizes,
    MaskedAttention,
    added_mask,
    distillation,
    heads,
    init_layer,
    matrix,
    mlp,
    rotate_at,
)
from model import Parameters, rms_norm
from torch import Tensor

SIZES = DrafterSizes(num_hidden_layers=1)
HIDDEN_STATES = (2, 4, 5)
LAYER = "midlayer."


def init_eagle3(seed: int, head_WD: Tensor, s: DrafterSizes = SIZES, num_taps: int = 3) -> Parameters:
    """F32 masters; the head starts as the target's rows of the draft vocabulary."""
    generator, D = torch.Generator().manual_seed(seed), s.hidden_size
    params = {"fc.weight": matrix(generator, D, num_taps * D), "norm.weight": torch.ones(D)}
    params |= init_layer(LAYER, s, 2 * D, generator)
    return params | {f"{LAYER}hidden_norm.weight": torch.ones(D), "lm_head.weight": head_WD.float().clone()}


def draft_vocabulary(ids: Tensor, vocab_size: int, size: int) -> Tensor:
    """The most frequent tokens, ascending: int64 [size]."""
    counts = torch.bincount(ids.flatten(), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def forward(
    p: Parameters,
    taps_BTF: Tensor,
    ids_BT: Tensor,
    first: int,
    num_steps: int,
    target: Target,
    s: DrafterSizes = SIZES,
) -> list[Tensor]:
    """Normed hidden states [B, N - first, D] of each step for slots from `first` on, N = T - 1 - num_steps.

    Earlier slots give keys and values only.
    """
    (B, T), D, eps, dtype = ids_BT.shape, s.hidden_size, s.rms_norm_eps, p["fc.weight"].dtype
    N = T - 1 - num_steps
    hidden = F.linear(taps_BTF[:, :N], p["fc.weight"]).float()
    w = {name: p[f"{LAYER}self_attn.{name}_proj.weight"] for name in "qkvo"}
    seen, diagonal = (
        torch.ones(N, N, dtype=torch.bool).tril()[first:],
        torch.eye(N, dtype=torch.bool)[first:, first:],
    )
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs = []
    for j in range(num_steps):
        start = 0 if j == 0 else first
        embedded = F.embedding(ids_BT[:, start + 1 + j : 1 + j + N], target.embed)
        inputs = [
            rms_norm(embedded, p[f"{LAYER}input_layernorm.weight"], eps),
            rms_norm(hidden, p[f"{LAYER}hidden_norm.weight"], eps),
        ]
        u = torch.cat(inputs, -1)
        positions = torch.arange(start + j, j + N).expand(B, -1)
        k, v = (heads(F.linear(u, w[name]).flatten(0, 1), B, s.head_dim) for name in "kv")
        keys.append(rotate_at(k, positions, s))
        values.append(v)
        if j:
            seen = torch.cat([seen, diagonal], -1)
        graded = slice(first - start, None)
        q = heads(F.linear(u[:, graded], w["q"]).flatten(0, 1), B, s.head_dim)
        mask = added_mask(seen, dtype).expand(B, -1, -1)
        q = rotate_at(q, positions[:, graded], s)
        out = MaskedAttention.apply(q, torch.cat(keys, 2), torch.cat(values, 2), mask)
        hidden = hidden[:, graded] + F.linear(out.transpose(1, 2).flatten(2), w["o"])
        hidden = mlp(p, LAYER, hidden.reshape(-1, D), eps).view(B, -1, D)
        outputs.append(rms_norm(hidden, p["norm.weight"], eps))
    return outputs


def loss(
    p: Parameters, taps_BTF: Tensor, ids_BT: Tensor, final_BTD: Tensor, prompt_len: int, vocabulary_W: Tensor,
    target: Target, num_steps: int, decay: float, soft: float,
) -> Tensor:  # fmt: skip
    """Sum over steps j of decay**j times the mean over slots that predict the target's own text.

    The target's distribution is restricted to the draft vocabulary; where its choice is outside, a slot does not count.
    """
    T, first = ids_BT.shape[1], prompt_len - 1
    to_draft = torch.full((len(target.head),), -1)
    to_draft[vocabulary_W] = torch.arange(len(vocabulary_W))
    head_WD = target.head[vocabulary_W]
    total = torch.zeros(())
    for j, hidden in enumerate(forward(p, taps_BTF, ids_BT, first, num_steps, target)):
        stop = T - 1 - num_steps
        tokens = to_draft[ids_BT[:, first + 2 + j : stop + 2 + j]]
        known = tokens >= 0
        with torch.no_grad():
            teacher = F.linear(final_BTD[:, first + 1 + j : stop + 1 + j][known], head_WD).float().softmax(-1)
        logits = F.linear(hidden[known], p["lm_head.weight"]).float()
        total = total + decay**j * distillation(logits, teacher, tokens[known], soft).mean()
    return total


@torch.no_grad()
def accepted(
    p: Parameters, taps_BTF: Tensor, ids_BT: Tensor, prompt_len: int, num_steps: int, vocabulary_W: Tensor,
    target: Target,
) -> Tensor:  # fmt: skip
    """[B, T]: how many of `num_steps` drafts after each last committed token are the text; 0 where it ends."""
    result = torch.zeros_like(ids_BT)
    matches, first, stop = torch.ones(()), prompt_len - 1, ids_BT.shape[1] - 1 - num_steps
    for j, hidden in enumerate(forward(p, taps_BTF, ids_BT, first, num_steps, target)):
        drafts = vocabulary_W[F.linear(hidden, p["lm_head.weight"]).argmax(-1)]
        matches = matches * (drafts == ids_BT[:, first + 2 + j : stop + 2 + j])
        result[:, first + 1 : stop + 1] += matches.long()
    return result
