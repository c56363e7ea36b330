"""EAGLE3 in training: the head drafts on its own hidden states for some steps (training-time test, arXiv:2503.01840).

Slot i holds token i + 1 and the features of position i, turns at rotary position i, and predicts token i + 2.  At step
j it holds token i + 1 + j and its own output of the step before, turns at i + j, sees the committed slots up to its own
and its own steps from 1 on, and predicts token i + 2 + j.

Shapes: B sequences, T positions, N slots of a step, S steps, R rows, D hidden, F tapped features, V target vocabulary,
W draft vocabulary, J key/value heads, G query heads for each, C head dim.
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
from m27quant.drafters.losses import head_loss, pieces

LAYER = "midlayer."
UNKNOWN = -1


@dataclass(frozen=True, kw_only=True)
class Eagle3Spec(LayerSpec):
    """An EAGLE3 head of one layer."""

    draft_vocab_size: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a head knows."""

    tokens_W: Tensor
    """int64, ascending: what each row of the head stands for."""
    vocab_size: int
    """V."""

    def rows_V(self) -> Tensor:
        """int64 [V]: each token's row of the head, UNKNOWN where it has none."""
        rows = torch.full((self.vocab_size,), UNKNOWN, device=self.tokens_W.device)
        rows[self.tokens_W] = torch.arange(len(self.tokens_W), device=rows.device)
        return rows

    def tables(self) -> dict[str, Tensor]:
        """`d2t`, int64 [W] of offsets: token = row + d2t[row]; `t2d`, bool [V]: whether a token is known."""
        return {
            "d2t": self.tokens_W - torch.arange(len(self.tokens_W), device=self.tokens_W.device),
            "t2d": self.rows_V() != UNKNOWN,
        }


def draft_vocabulary(counts_V: Tensor, size: int) -> Vocabulary:
    """The `size` most frequent tokens; of equals those with the lower number."""
    best = counts_V.argsort(descending=True, stable=True)[:size]
    return Vocabulary(best.sort().values, len(counts_V))


def init_eagle3(spec: Eagle3Spec, generator: torch.Generator, head_WD: Tensor) -> Parameters:
    """F32 masters, by SpecForge's names; the head starts as the target's rows of the draft vocabulary."""
    D = spec.hidden_size
    params = {"fc.weight": matrix(generator, D, len(spec.hidden_states) * D), "norm.weight": torch.ones(D)}
    params |= init_layer(LAYER, spec, 2 * D, generator)
    return params | {f"{LAYER}hidden_norm.weight": torch.ones(D), "lm_head.weight": head_WD.float().clone()}


def eagle3_loss(
    params: Parameters,
    spec: Eagle3Spec,
    batch: Batch,
    shared: Shared,
    vocabulary: Vocabulary,
    *,
    num_steps: int = 7,
    decay: float = 0.8,
    soft: float = 1.0,
) -> LossReport:
    """sum_j decay^j (sum of step j's losses) / (tokens counted at step 0).

    A slot counts at step j as long as the target wrote tokens i + 2 to i + 2 + j, and where the last can be drafted:
    for distillation the target's first choice, for cross-entropy the token itself has to be in the draft vocabulary.
    The target's distribution is restricted to that vocabulary and renormalised.

    Args:
        params: in the compute dtype.
        spec: sizes.
        batch: sequences.
        shared: the target's embedding and head.
        vocabulary: the head's, on the device of `params`.
        num_steps: of the training-time test.
        decay: of a step's weight.
        soft: share of distillation from the target's logits, 0 to 1.
    """
    T, rows_BT = batch.ids_BT.shape[1], vocabulary.rows_V()[batch.ids_BT]
    starts = batch.learned_BT()[:, 2:].any(0).nonzero()  # slots that predict something in some sequence
    if not len(starts):
        return _nothing(params, num_steps)
    first, steps = int(starts[0, 0]), min(num_steps, T - 2)
    teacher_BNW, drafted_BN = None, rows_BT[:, first + 2 :] >= 0
    if soft > 0:
        teacher_BNW, known_BN = _teacher(batch.final_BTD[:, first + 1 : T - 1], shared, vocabulary)
        drafted_BN = known_BN & (drafted_BN | (soft == 1))
    hidden = chain_hidden(params, spec, batch, shared, first, steps)
    written = _written(batch.learned_BT()[:, first + 2 :], steps)
    counted = [mask & drafted_BN[:, j:] for j, mask in enumerate(written)]
    sizes, at_R = [int(mask.sum()) for mask in counted], _targets(counted)
    weight = torch.tensor(sizes[0], device=at_R.device, dtype=wide(hidden[0]))
    weights = torch.cat([weight.new_full((size,), decay**j) for j, size in enumerate(sizes)])
    total, losses, hits = head_loss(
        torch.cat([h[mask] for h, mask in zip(hidden, counted, strict=True)]),
        params["lm_head.weight"],
        rows_BT[:, first + 2 :].flatten()[at_R],
        weights / weight.clamp(min=1),
        None if teacher_BNW is None else lambda piece: teacher_BNW.flatten(0, 1)[at_R[piece]],
        soft,
    )
    sums = (
        [part.sum() for part in torch.split(losses, sizes)],
        [part.sum() for part in torch.split(hits, sizes)],
        _chains(counted, torch.split(hits, sizes)),
        [mask.sum() for mask in counted],
        [mask.sum() for mask in written],
    )
    padding = (0, num_steps - steps)
    return LossReport(total, weight, *(F.pad(torch.stack(x).to(losses.dtype), padding) for x in sums))


def _teacher(final_BND: Tensor, shared: Shared, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The target's logits over the draft vocabulary [B, N, W], and whether its first choice of all is in it [B, N]."""
    final_RD = final_BND.flatten(0, 1).to(shared.head_VD.dtype)
    rows_V = vocabulary.rows_V()
    choices = [
        F.linear(final_RD[piece], shared.head_VD).to(wide(final_RD)).argmax(-1)
        for piece in pieces(final_RD, len(shared.head_VD))
    ]
    logits = F.linear(final_RD, shared.head_VD[vocabulary.tokens_W])
    return logits.view(*final_BND.shape[:2], -1), (rows_V[torch.cat(choices)] >= 0).view(final_BND.shape[:2])


def _written(learned_BN: Tensor, steps: int) -> list[Tensor]:
    """For each step j, bool [B, N - j]: the target wrote what a slot predicts there and at all steps before."""
    masks = [learned_BN]
    for j in range(1, steps):
        masks.append(masks[-1][:, :-1] & learned_BN[:, j:])
    return masks


def _targets(counted: list[Tensor]) -> Tensor:
    """int64 [R]: where what each counted slot predicts stands among the B * N targets, step after step."""
    N = counted[0].shape[1]
    places = [mask.nonzero() for mask in counted]
    return torch.cat([place[:, 0] * N + place[:, 1] + j for j, place in enumerate(places)])


def _chains(counted: list[Tensor], hits: Sequence[Tensor]) -> list[Tensor]:
    """How many chains hit at each step and all steps before."""
    whole, sums = torch.ones_like(counted[0]), []
    for mask, found in zip(counted, hits, strict=True):
        whole = whole[:, : mask.shape[1]] & torch.zeros_like(mask).masked_scatter_(mask, found)
        sums.append(whole.sum())
    return sums


def _nothing(params: Parameters, num_steps: int) -> LossReport:
    """Of a batch that holds nothing to learn: zero, with gradients of zero."""
    zero = torch.stack([w.to(wide(w)).sum() * 0 for w in params.values()]).sum()
    sums = zero.detach().new_zeros(5, num_steps)
    return LossReport(zero, zero.detach(), *sums)


def chain_hidden(
    p: Parameters, spec: Eagle3Spec, batch: Batch, shared: Shared, first: int, num_steps: int
) -> list[Tensor]:
    """After the final norm, [B, N - j, D] for each step j, of slots from `first` on, N = T - 2 - first.

    Slots before give keys and values only.
    """
    (B, T), J, C = batch.ids_BT.shape, spec.num_key_value_heads, spec.head_dim
    eps, device = spec.rms_norm_eps, batch.ids_BT.device
    w = {name: p[f"{LAYER}self_attn.{name}_proj.weight"] for name in "qkvo"}
    hidden = F.linear(batch.taps_BTF[:, : T - 2].to(w["q"].dtype), p["fc.weight"])
    hidden = hidden.to(wide(hidden))
    k = v = torch.empty(0)
    own_k = own_v = hidden.new_empty(B, J, T - 2 - first, 0, C, dtype=w["q"].dtype)
    outputs = []
    for j in range(num_steps):
        start, stop = 0 if j == 0 else first, T - 2 - j
        embedded = F.embedding(batch.ids_BT[:, start + 1 + j : stop + 1 + j], shared.embed_VD)
        u = torch.cat(
            (
                rms_norm(embedded, p[f"{LAYER}input_layernorm.weight"], eps),
                rms_norm(hidden, p[f"{LAYER}hidden_norm.weight"], eps),
            ),
            -1,
        )
        turn = rotary(spec.rope, torch.arange(start + j, stop + j, device=device), u.dtype)
        new_k = rotate(F.linear(u, w["k"]).view(B, -1, J, C), *turn).transpose(1, 2).contiguous()
        new_v = F.linear(u, w["v"]).view(B, -1, J, C).transpose(1, 2).contiguous()
        if j == 0:
            k, v = new_k, new_v
        else:
            own_k, own_v = (
                torch.cat((own[:, :, :-1], new[..., None, :]), 3)
                for own, new in ((own_k, new_k), (own_v, new_v))
            )
        predicting = slice(first - start, None)
        q = F.linear(u[:, predicting], w["q"]).view(B, stop - first, -1, C)
        q = rotate(q, *(t[predicting] for t in turn)) * C**-0.5
        ends = torch.arange(first + 1, stop + 1, device=device).expand(B, -1)
        q_BJAGKC = q.view(B, stop - first, J, -1, 1, C).transpose(1, 2).contiguous()
        out = attend(q_BJAGKC, k, v, own_k, own_v, Sight(torch.zeros_like(ends)[..., None], ends))
        attended = F.linear(out.transpose(1, 2).reshape(B, stop - first, -1), w["o"])
        hidden = hidden[:, predicting] + attended.to(hidden.dtype)
        h = rms_norm(hidden, p[f"{LAYER}post_attention_layernorm.weight"], eps)
        hidden = hidden + mlp(p, LAYER, h).to(hidden.dtype)
        outputs.append(rms_norm(hidden, p["norm.weight"], eps))
        hidden = hidden[:, :-1]
    return outputs
