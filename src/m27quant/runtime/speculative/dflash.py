"""DFlash: one forward pass over a block of masked slots drafts all of them (arXiv:2602.06036, z-lab/dflash).

A block is [anchor, mask, mask, ...]: the last committed token and as many masks as drafts are wanted.  Its slots see
each other and, in every layer, features of all positions before the anchor: norm(fc(taps)), which enter through the
layer's own key and value projections and are never changed by a layer.  Slot k predicts the token at its own position.
Keys and values of the features are kept for the whole committed history, those of a block never.

Shapes: b sequences, R rows of a block, m new positions, n committed positions, L layers, D hidden, H query heads,
J key/value heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.errors import UsageError
from m27quant.kernels.linear import linear
from m27quant.kernels.rms_norm import rms_norm
from m27quant.runtime.speculative.config import DFlashSettings, LayerAttention
from m27quant.runtime.speculative.context import ContextCache, attend, check_taps
from m27quant.runtime.speculative.decoder import LayerWeights, Shared, key_value, mlp, query
from m27quant.runtime.speculative.proposal import NOTHING, DraftRequest, Proposal, chain


@dataclass(frozen=True, slots=True)
class DFlashWeights:
    """All in the compute dtype."""

    fc: Tensor
    hidden_norm: Tensor
    norm: Tensor
    layers: tuple[LayerWeights, ...]
    shared: Shared


class DFlashDrafter:
    """Drafts chains of up to block_size - 1 tokens."""

    def __init__(
        self,
        settings: DFlashSettings,
        weights: DFlashWeights,
        taps: tuple[int, ...],
        *,
        num_draft_tokens: int | None = None,
        nbytes: int = 0,
    ) -> None:
        """Make a drafter without history.

        Args:
            settings: of its config.json.
            weights: in the dtype and on the device to compute with.
            taps: hidden states of the target, in the order of fc's columns.
            num_draft_tokens: drafts a step; a block then has one row more.  block_size - 1 where None.
            nbytes: of its own weights, what it borrows left out.

        Raises:
            UsageError: more drafts than a block has, or none.
        """
        most = settings.block_size - 1
        if num_draft_tokens is not None and not 1 <= num_draft_tokens <= most:
            raise UsageError(
                f"num_draft_tokens is {num_draft_tokens}; this drafter's block_size {settings.block_size} allows "
                f"1 to {most}"
            )
        self.settings, self.weights, self.taps = settings, weights, taps
        self.nbytes = nbytes
        self.num_draft_tokens = self.max_depth = num_draft_tokens or most
        s, fc = settings.sizes, weights.fc
        self.dtype, self.device = fc.dtype, fc.device
        self.context = ContextCache(
            s.num_hidden_layers, s.num_key_value_heads, s.head_dim, self.dtype, self.device
        )

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """Take in the new taps of every request, then draft for all in one forward pass."""
        self._take_in(requests)
        wanted = [request for request in requests if request.max_tokens > 0]
        drafts = iter(self._draft(wanted)) if wanted else iter(())
        return [chain(next(drafts)[: r.max_tokens]) if r.max_tokens > 0 else NOTHING for r in requests]

    def forget(self, sequence: int) -> None:
        self.context.forget(sequence)

    @torch.inference_mode()
    def forced_hidden(self, requests: Sequence[DraftRequest], texts: Sequence[Sequence[int]]) -> Tensor:
        """What the head reads at each place behind the requests' tokens, [b, num_draft_tokens, D].

        `texts` are the tokens that do follow; a block does not look at them.
        """
        self._take_in(requests)
        return self.block_hidden([(r.sequence, r.tokens[-1]) for r in requests])[:, 1:]

    def _take_in(self, requests: Sequence[DraftRequest]) -> None:
        """Append features of newly committed positions to the context, all requests in one product."""
        width = self.weights.fc.shape[1]
        known = [self.context.length(r.sequence) for r in requests]
        new = [
            check_taps(r.sequence, len(r.tokens), n, r.taps, width)
            for r, n in zip(requests, known, strict=True)
        ]
        counts = [len(taps) for taps in new]
        if not sum(counts):
            return
        s = self.settings.sizes
        taps = torch.cat(new).to(self.device, self.dtype)
        features = rms_norm(linear(taps, self.weights.fc), self.weights.hidden_norm, s.rms_norm_eps)
        positions = [torch.arange(n, n + count) for n, count in zip(known, counts, strict=True)]
        rotary = s.rope.table(torch.cat(positions).to(self.device), self.dtype)
        layers = [
            torch.stack(key_value(features, w, s.head_dim, s.rms_norm_eps, rotary))
            for w in self.weights.layers
        ]
        for request, kv_L2mJC in zip(requests, torch.split(torch.stack(layers), counts, dim=2), strict=True):
            if kv_L2mJC.shape[2]:
                self.context.append(request.sequence, kv_L2mJC)

    def _draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """num_draft_tokens tokens for each request."""
        hidden_bRD = self.block_hidden([(r.sequence, r.tokens[-1]) for r in requests])
        drafted = hidden_bRD[:, 1:]
        rows = linear(drafted.flatten(0, 1), self.weights.shared.head).argmax(-1)
        tokens: list[list[int]] = self.weights.shared.tokens(rows).view(drafted.shape[:2]).tolist()
        return tokens

    def block_hidden(self, anchors: Sequence[tuple[int, int]]) -> Tensor:
        """Hidden states after the final norm, [b, R, D], of blocks that begin with (sequence, anchor token)."""
        s, w = self.settings.sizes, self.weights
        R = self.num_draft_tokens + 1
        ids = torch.full((len(anchors), R), self.settings.mask_token_id)
        ids[:, 0] = torch.tensor([token for _, token in anchors])
        starts = torch.tensor([self.context.length(sequence) for sequence, _ in anchors])
        positions = (starts[:, None] + torch.arange(R)).flatten().to(self.device)
        rotary = s.rope.table(positions, self.dtype)
        x = w.shared.embedded(ids.flatten().to(self.device), self.dtype)
        for n, layer in enumerate(w.layers):
            h = rms_norm(x, layer.input_layernorm, s.rms_norm_eps)
            q = query(h, layer, s.head_dim, s.rms_norm_eps, rotary)
            k, v = key_value(h, layer, s.head_dim, s.rms_norm_eps, rotary)
            blocks = zip(anchors, *(torch.split(t, R) for t in (q, k, v)), strict=True)
            out = torch.cat([self._attend(n, sequence, *qkv) for (sequence, _), *qkv in blocks])
            x = mlp(x + linear(out, layer.o_proj), layer, s.rms_norm_eps)
        return rms_norm(x, w.norm, s.rms_norm_eps).view(len(anchors), R, -1)

    def _attend(self, layer: int, sequence: int, q_RHC: Tensor, k_RJC: Tensor, v_RJC: Tensor) -> Tensor:
        """One block's attention over context and block, [R, H*C]."""
        n, rule = self.context.length(sequence), self.settings.attention[layer]
        if n:
            first = 0 if rule.window is None else max(0, n - rule.window)
            keys, values = self.context.read(sequence)[layer, :, first:]
            k_RJC, v_RJC = torch.cat((keys, k_RJC)), torch.cat((values, v_RJC))
        seen = _seen(n, len(q_RHC), len(k_RJC), rule)
        return attend(q_RHC, k_RJC, v_RJC, None if seen is None else seen.to(self.device))


def _seen(anchor: int, rows: int, keys: int, rule: LayerAttention) -> Tensor | None:
    """What each slot sees of the last `keys` positions, block included: bool [rows, keys]; None where it sees all."""
    if rule.window is None and not rule.causal:
        return None
    at = torch.arange(anchor, anchor + rows)[:, None]
    key = torch.arange(anchor + rows - keys, anchor + rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if rule.causal:
        seen &= key <= at
    if rule.window is not None and rule.from_anchor:
        seen &= (key >= anchor - rule.window) | (key >= anchor)
    elif rule.window is not None:
        seen &= key > at - rule.window
    return seen
