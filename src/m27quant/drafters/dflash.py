"""DFlash in training: blocks that start at sampled anchors, all of a sequence side by side (arXiv:2602.06036).

A block is [anchor, mask, mask, ...]; slot k predicts the token k after the anchor.  Its slots see features of the
positions before the anchor, and each other.

Shapes: B sequences, T positions, t those before the last anchor, A anchors, K slots of a block, R = B * A * K rows,
D hidden, F tapped features, J key/value heads, G query heads for each, C head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.drafters.attention import Sight, attend
from m27quant.drafters.batch import Batch, LossReport, Parameters, Shared
from m27quant.drafters.layers import LayerSpec, init_layer, matrix, mlp, rms_norm, rotary, rotate, wide
from m27quant.drafters.losses import head_loss
from m27quant.runtime.speculative.config import LayerAttention

FULL = LayerAttention(window=None, causal=False, from_anchor=False)


@dataclass(frozen=True, kw_only=True)
class DFlashSpec(LayerSpec):
    """A DFlash drafter."""

    block_size: int
    mask_token_id: int
    attention: tuple[LayerAttention, ...] = ()
    """What the slots of each layer see; everything before the anchor and the whole block where it is empty."""


def init_dflash(spec: DFlashSpec, generator: torch.Generator) -> Parameters:
    """F32 masters, by the names of z-lab's checkpoints.

    The deepest tap passes through `fc` at first, the others are mixed in a little: it learns faster so than from noise.
    """
    D = spec.hidden_size
    fc = matrix(generator, D, len(spec.hidden_states) * D, 0.1)
    fc[:, -D:] += torch.eye(D)
    params = {"fc.weight": fc}
    params |= {"hidden_norm.weight": torch.ones(D), "norm.weight": torch.ones(D)}
    for n in range(spec.num_hidden_layers):
        params |= init_layer(f"layers.{n}.", spec, D, generator)
        params |= {f"layers.{n}.self_attn.{x}_norm.weight": torch.ones(spec.head_dim) for x in "qk"}
    return params


def sample_anchors(
    batch: Batch, anchors_per_seq: int, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Distinct positions t of each sequence whose next token was written by the target, ascending.

    A sequence's anchors depend on its own generator (of a CPU, one each) and its own tokens alone.

    Returns:
        (anchors int64 [B, A], valid bool [B, A]): A is `anchors_per_seq`, or less where no sequence has so many; what
        is not valid is 0 and comes last.
    """
    written = F.pad(batch.learned_BT()[:, 1:], (0, 1))  # of the token that follows
    draws = torch.zeros(written.shape)
    for row, (generator, length) in enumerate(zip(generators, batch.lengths_B.tolist(), strict=True)):
        draws[row, :length] = torch.rand(length, generator=generator)
    draws = draws.to(written.device).masked_fill(~written, -1.0)
    most = min(anchors_per_seq, max(1, int(written.sum(1).max())))
    chosen, none = draws.topk(most, dim=1), written.shape[1]
    anchors = chosen.indices.masked_fill(chosen.values < 0, none).sort(1).values
    valid = anchors < none
    return anchors.masked_fill(~valid, 0), valid


def dflash_loss(
    params: Parameters,
    spec: DFlashSpec,
    batch: Batch,
    anchors: tuple[Tensor, Tensor],
    shared: Shared,
    *,
    slot_weights_K1: Tensor,
    soft: float,
) -> LossReport:
    """Weighted mean over slots k = 1..K-1 of all blocks.

    A slot counts as long as the target wrote every token from the one after the anchor to the slot's own.

    Args:
        params: in the compute dtype.
        spec: sizes.
        batch: sequences.
        anchors: what `sample_anchors` returned.
        shared: the target's embedding and head.
        slot_weights_K1: F32 [K - 1]; blocks have K slots, whatever `spec.block_size`.
        soft: share of distillation from the target's logits, 0 to 1.
    """
    anchors_BA, valid_BA = anchors
    (B, T), K1 = batch.ids_BT.shape, len(slot_weights_K1)
    at = anchors_BA[..., None] + torch.arange(1, K1 + 1, device=anchors_BA.device)
    inside, at = at < T, at.clamp(max=T - 1)
    row = torch.arange(B, device=at.device)[:, None, None]
    counted = (inside & batch.learned_BT()[row, at]).cumprod(-1).bool() & valid_BA[..., None]
    hidden_RD = block_hidden(
        params, spec, batch, anchors_BA, shared, K1 + 1, wanted_BAK=F.pad(counted, (1, 0))
    )
    weights = slot_weights_K1.to(at.device, wide(hidden_RD)).expand(counted.shape)[counted]
    weight = weights.sum()
    final_RD = batch.final_BTD[row, at - 1][counted].to(shared.head_VD.dtype) if soft > 0 else None
    total, losses, hits = head_loss(
        hidden_RD,
        shared.head_VD,
        batch.ids_BT[row, at][counted],
        weights / weight.clamp(min=1e-30),
        None if final_RD is None else lambda piece: F.linear(final_RD[piece], shared.head_VD),
        soft,
    )
    losses_BAK1 = torch.zeros_like(counted, dtype=losses.dtype).masked_scatter_(counted, losses)
    hits_BAK1 = torch.zeros_like(counted).masked_scatter_(counted, hits)
    sums = (x.sum((0, 1)) for x in (losses_BAK1, hits_BAK1, hits_BAK1.cumprod(-1), counted, counted))
    return LossReport(total, weight, *(x.to(losses.dtype) for x in sums))


def block_hidden(
    p: Parameters,
    spec: DFlashSpec,
    batch: Batch,
    anchors_BA: Tensor,
    shared: Shared,
    block: int,
    *,
    wanted_BAK: Tensor | None = None,
) -> Tensor:
    """Hidden states after the final norm of blocks of `block` slots that start at the anchors.

    Anchors should ascend; positions from the last one on are not read.

    Returns:
        [B, A, K, D], or of the wanted slots [number, D].
    """
    (B, A), K, eps, dtype = anchors_BA.shape, block, spec.rms_norm_eps, p["fc.weight"].dtype
    t, last = max(1, int(anchors_BA.max())), spec.num_hidden_layers - 1
    taps = batch.taps_BTF[:, :t].flatten(0, 1).to(dtype)
    context = rms_norm(F.linear(taps, p["fc.weight"]), p["hidden_norm.weight"], eps)
    slots = torch.arange(K, device=anchors_BA.device)
    at_context = rotary(spec.rope, torch.arange(t, device=slots.device), dtype)
    at_slots = rotary(spec.rope, anchors_BA[..., None] + slots, dtype)
    first_ids = batch.ids_BT.gather(1, anchors_BA).flatten()
    x = F.embedding(F.pad(first_ids, (0, 1), value=spec.mask_token_id), shared.embed_VD)
    x = x.to(wide(x))
    sights = {rule: _sight(rule, anchors_BA, slots) for rule in spec.attention or (FULL,)}
    for n in range(spec.num_hidden_layers):
        layer, rule = f"layers.{n}.", spec.attention[n] if spec.attention else FULL
        w = {name: p[f"{layer}self_attn.{name}.weight"] for name in ATTENTION}
        h = rms_norm(x, p[f"{layer}input_layernorm.weight"], eps)
        q, own_k, own_v = (F.linear(h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if n == 0:  # all masks are one row up to here
            x, q, own_k, own_v = (_spread(rows, K) for rows in (x, q, own_k, own_v))
        q = _heads(q, (B, A, K), w["q_norm"], at_slots, spec) * spec.head_dim**-0.5
        own_k = _heads(own_k, (B, A, K), w["k_norm"], at_slots, spec)
        k = _heads(F.linear(context, w["k_proj"]), (B, t), w["k_norm"], at_context, spec)
        q_BAKJGC = q.view(B, A, K, spec.num_key_value_heads, -1, spec.head_dim)
        out = attend(
            q_BAKJGC.permute(0, 3, 1, 4, 2, 5).contiguous(),
            k.transpose(1, 2).contiguous(),
            F.linear(context, w["v_proj"]).view(k.shape).transpose(1, 2).contiguous(),
            own_k.permute(0, 3, 1, 2, 4).contiguous(),
            own_v.view(own_k.shape).permute(0, 3, 1, 2, 4).contiguous(),
            sights[rule],
        )
        out = out.permute(0, 2, 4, 1, 3, 5).reshape(B * A * K, -1)
        if n == last and wanted_BAK is not None:  # nothing looks at the others any more
            wanted = wanted_BAK.flatten().nonzero()[:, 0]
            x, out = x[wanted], out[wanted]
        x = x + F.linear(out, w["o_proj"]).to(x.dtype)
        x = x + mlp(p, layer, rms_norm(x, p[f"{layer}post_attention_layernorm.weight"], eps)).to(x.dtype)
    x = rms_norm(x, p["norm.weight"], eps)
    return x if wanted_BAK is not None else x.view(B, A, K, -1)


def _spread(rows: Tensor, block: int) -> Tensor:
    """One row for each anchor, then the mask's -> a row for each slot of each block."""
    anchors, mask = rows[:-1, None], rows[-1].expand(len(rows) - 1, block - 1, -1)
    return torch.cat((anchors, mask), 1).flatten(0, 1)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def _heads(
    x: Tensor, rows: tuple[int, ...], norm: Tensor, at: tuple[Tensor, Tensor], spec: DFlashSpec
) -> Tensor:
    """Normed per head and rotated: [*rows, heads, C]."""
    heads = x.view(*rows, -1, spec.head_dim)
    return rotate(rms_norm(heads, norm, spec.rms_norm_eps), *at)


def _sight(rule: LayerAttention, anchors_BA: Tensor, slots_K: Tensor) -> Sight:
    """As `m27quant.runtime.speculative.dflash` has it."""
    begin, own = torch.zeros_like(anchors_BA)[..., None], None
    back = slots_K[:, None] - slots_K
    if rule.causal:
        own = back >= 0
    if rule.window is not None and rule.from_anchor:
        begin = anchors_BA[..., None] - rule.window
    elif rule.window is not None:
        begin = anchors_BA[..., None] + slots_K - rule.window + 1
        near = back < rule.window
        own = near if own is None else own & near
    return Sight(begin.clamp(min=0), anchors_BA, own)
