"""DFlash in training: blocks that start at sampled anchors, all of a sequence side by side (arXiv:2602.06036).

Shapes: B sequences, T positions, A anchors, K slots of a block, R = A * K rows, D hidden, F tapped features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

SIZES = DrafterSizes(num_hidden_layers=3)
BLOCK_SIZE = 16
MASK_TOKEN = 2047
HIDDEN_STATES = (2, 3, 4, 5, 6)


@dataclass(frozen=True, slots=True)
class Target:
    """What the drafter borrows: embedding and head [V, D], in the compute dtype."""

    embed: Tensor
    head: Tensor


def init_dflash(seed: int, s: DrafterSizes = SIZES, num_taps: int = len(HIDDEN_STATES)) -> Parameters:
    """F32 masters."""
    generator = torch.Generator().manual_seed(seed)
    params = {"fc.weight": matrix(generator, s.hidden_size, num_taps * s.hidden_size)}
    params |= {"hidden_norm.weight": torch.ones(s.hidden_size), "norm.weight": torch.ones(s.hidden_size)}
    for n in range(s.num_hidden_layers):
        params |= init_layer(f"layers.{n}.", s, s.hidden_size, generator)
        params |= {f"layers.{n}.self_attn.{x}_norm.weight": torch.ones(s.head_dim) for x in "qk"}
    return params


def forward(
    p: Parameters, taps_BTF: Tensor, ids_BT: Tensor, anchors_BA: Tensor, block: int, target: Target,
    s: DrafterSizes = SIZES, mask_token: int = MASK_TOKEN,
) -> Tensor:  # fmt: skip
    """Normed hidden states [B, A, block - 1, D] of all slots but the anchor's own.

    A slot sees the features of positions before its anchor and the slots of its own block.
    """
    (B, T), A, eps, dtype = ids_BT.shape, anchors_BA.shape[1], s.rms_norm_eps, p["fc.weight"].dtype
    context = rms_norm(F.linear(taps_BTF.flatten(0, 1), p["fc.weight"]), p["hidden_norm.weight"], eps)
    block_ids = torch.full((B, A, block), mask_token)
    block_ids[..., 0] = ids_BT.gather(1, anchors_BA)
    x = F.embedding(block_ids.flatten(), target.embed).float()
    rows = (anchors_BA[..., None] + torch.arange(block)).flatten(1)
    positions = torch.arange(T).expand(B, T)
    before = torch.arange(T) < anchors_BA.repeat_interleave(block, 1)[..., None]
    own = (torch.arange(A * block) // block)[:, None] == torch.arange(A * block) // block
    mask = added_mask(torch.cat([before, own.expand(B, -1, -1)], -1), dtype)
    for n in range(s.num_hidden_layers):
        layer = f"layers.{n}."
        w = {name: p[f"{layer}self_attn.{name}.weight"] for name in ATTENTION}
        h = rms_norm(x, p[f"{layer}input_layernorm.weight"], eps)

        def keys(source: Tensor, at: Tensor, w: Parameters = w) -> Tensor:
            k = rms_norm(heads(F.linear(source, w["k_proj"]), B, s.head_dim), w["k_norm"], eps)
            return rotate_at(k, at, s)

        q = rms_norm(heads(F.linear(h, w["q_proj"]), B, s.head_dim), w["q_norm"], eps)
        k = torch.cat([keys(context, positions), keys(h, rows)], 2)
        v = torch.cat([heads(F.linear(source, w["v_proj"]), B, s.head_dim) for source in (context, h)], 2)
        out = MaskedAttention.apply(rotate_at(q, rows, s), k, v, mask)
        x = x + F.linear(out.transpose(1, 2).flatten(2).flatten(0, 1), w["o_proj"])
        x = mlp(p, layer, x, eps)
    return rms_norm(x.view(B, A, block, -1)[:, :, 1:], p["norm.weight"], eps)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def loss(
    p: Parameters, taps_BTF: Tensor, ids_BT: Tensor, final_BTD: Tensor, anchors_BA: Tensor, block: int,
    target: Target, gamma: float, soft: float,
) -> Tensor:  # fmt: skip
    """Weighted mean over slots k = 1.., weights exp(-(k - 1) / gamma); slots beyond the text do not count."""
    B, T = ids_BT.shape
    hidden = forward(p, taps_BTF, ids_BT, anchors_BA, block, target)
    at = anchors_BA[..., None] + torch.arange(1, block)
    inside = at < T
    at = at.clamp(max=T - 1)
    row = torch.arange(B)[:, None, None]
    weights = torch.exp(-(torch.arange(block - 1) / gamma)).expand_as(at)[inside]
    with torch.no_grad():
        teacher = F.linear(final_BTD[row, at - 1][inside], target.head).float().softmax(-1)
    logits = F.linear(hidden[inside], target.head).float()
    per_slot = distillation(logits, teacher, ids_BT[row, at][inside], soft)
    return (per_slot * weights).sum() / weights.sum()


@torch.no_grad()
def accepted(
    p: Parameters, taps_BTF: Tensor, ids_BT: Tensor, prompt_len: int, block: int, target: Target
) -> Tensor:
    """[B, T]: how many of the block - 1 drafts from each anchor are the text that follows; 0 where it ends."""
    B, T = ids_BT.shape
    result = torch.zeros(B, T, dtype=torch.int64)
    for part in torch.arange(prompt_len, T - block + 1).split(24):
        anchors = part.expand(B, -1)
        drafts = F.linear(forward(p, taps_BTF, ids_BT, anchors, block, target), target.head).argmax(-1)
        text = ids_BT[torch.arange(B)[:, None, None], anchors[..., None] + torch.arange(1, block)]
        result[:, part] = (drafts == text).long().cumprod(-1).sum(-1)
    return result
