"""Attention of drafters in training: keys that a whole sequence shares, and a few that belong to a group of queries.

A DFlash block sees the context before its anchor and its own slots; an EAGLE3 slot sees the committed history and its
own earlier steps.  Both are groups of queries with own keys.  The two products are joined by one softmax, so that the
own keys of one group never stand in another one's row, as they would in a mask over all keys.

Shapes: B sequences, J key/value heads, G query heads for each, A groups, K slots of a group, M = G * K queries of a
group, T shared keys, S own keys, C head dim; in a piece of the work n groups and t shared keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from m27quant.drafters.layers import wide

SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**27}
"""Scores of one piece: as many as a core's cache takes, or as keep a GPU busy and its memory free."""


@dataclass(frozen=True)
class Sight:
    """Which keys each query sees.

    The groups of a sequence should be in ascending order of `end_BA`: then the first pieces read few keys.
    """

    begin_BAK: Tensor
    """int64 [B, A, K] or [B, A, 1]: the first shared key."""
    end_BA: Tensor
    """int64 [B, A]: the shared key after the last one; a group may see none."""
    own_KS: Tensor | None = None
    """bool [K, S]: the own keys that each slot sees; all where None.  Each slot sees one at least."""

    @cached_property
    def reach(self) -> list[tuple[int, int]]:
        """The shared keys that some sequence's group sees, first and after the last, for each of the A groups."""
        begin = self.begin_BAK.amin((0, 2)).clamp(max=self.end_BA.amin(0))
        return list(zip(*torch.stack((begin, self.end_BA.amax(0))).tolist(), strict=True))

    def pieces(self, scores_per_key: int, most: int) -> list[_Piece]:
        """Consecutive groups whose scores are at most `most`, or single ones; `scores_per_key`: of one group."""
        pieces, start = [], 0
        while start < len(self.reach):
            stop, (begin, end) = start + 1, self.reach[start]
            for low, high in self.reach[stop:]:
                wider = min(begin, low), max(end, high)
                if (stop + 1 - start) * (wider[1] - wider[0]) * scores_per_key > most:
                    break
                stop, (begin, end) = stop + 1, wider
            pieces.append(_Piece(start, stop, begin, end))
            start = stop
        return pieces

    def added(self, piece: _Piece, dtype: torch.dtype) -> Tensor:
        """-inf where a shared key is not seen, else 0: [B, 1, n, 1, K or 1, t]."""
        at = torch.arange(piece.begin, piece.end, device=self.end_BA.device)
        groups = slice(piece.start, piece.stop)
        hidden = (at < self.begin_BAK[:, groups, :, None]) | (at >= self.end_BA[:, groups, None, None])
        added = torch.zeros(hidden.shape, dtype=dtype, device=at.device)
        return added.masked_fill_(hidden, float("-inf"))[:, None, :, None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Groups start to stop, and the shared keys begin to end that they see."""

    start: int
    stop: int
    begin: int
    end: int


def attend(
    q_BJAGKC: Tensor, k_BJTC: Tensor, v_BJTC: Tensor, own_k_BJASC: Tensor, own_v_BJASC: Tensor, sight: Sight
) -> Tensor:
    """softmax(q [k, own k]^T) [v, own v] over the keys that `sight` shows; queries come scaled.

    All contiguous, of one floating dtype, in which scores and probabilities are kept; S may be 0.  Gradients reach all
    five tensors.

    Returns:
        [B, J, A, G, K, C].
    """
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q_BJAGKC, k_BJTC, v_BJTC, own_k_BJASC, own_v_BJASC, sight
    )
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, sight: Sight
    ) -> Tensor:
        (B, J, A, G, K, C), S, M = q.shape, own_k.shape[3], q.shape[3] * q.shape[4]
        q, k, v = q.view(B * J, A, M, C), k.flatten(0, 1), v.flatten(0, 1)
        own_scores = torch.bmm(q.flatten(0, 1), own_k.flatten(0, 2).transpose(1, 2)).view(B * J, A, M, S)
        if sight.own_KS is not None:
            own_scores.view(B * J, A, G, K, S).masked_fill_(~sight.own_KS, float("-inf"))
        pieces = sight.pieces(B * J * M, SCORES_AT_ONCE.get(q.device.type, SCORES_AT_ONCE["cpu"]))
        out, own_p, kept = torch.empty_like(q), torch.empty_like(own_scores), []
        for piece in pieces:
            groups, keys = slice(piece.start, piece.stop), slice(piece.begin, piece.end)
            n, t = piece.stop - piece.start, piece.end - piece.begin
            scores = q.new_empty(B * J, n * M, t + S)
            products = torch.bmm(q[:, groups].flatten(1, 2), k[:, keys].transpose(1, 2))
            split = (B, J, n, G, K, t)
            torch.add(products.view(split), sight.added(piece, q.dtype), out=scores[..., :t].view(split))
            scores[..., t:] = own_scores[:, groups].flatten(1, 2)
            p = torch.softmax(scores, -1)
            out[:, groups] = torch.bmm(p[..., :t], v[:, keys]).view(B * J, n, M, C)
            own_p[:, groups] = p[..., t:].view(B * J, n, M, S)
            kept.append(p)
        out.flatten(0, 1).baddbmm_(own_p.flatten(0, 1), own_v.flatten(0, 2))
        ctx.save_for_backward(q, k, v, own_k, own_v, own_p, *kept)
        ctx.pieces, ctx.shape = pieces, (B, J, A, G, K, C)
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, own_p, *kept = ctx.saved_tensors
        (B, J, _, S, C), M = own_k.shape, q.shape[2]
        grad = grad.reshape(q.shape)
        own_grad_p = torch.bmm(grad.flatten(0, 1), own_v.flatten(0, 2).transpose(1, 2)).view(own_p.shape)
        grad_q, own_grad_s = torch.empty_like(q), torch.empty_like(own_p)
        # pieces add up: in F32 at least, and with the keys last, as the product is faster that way round
        grad_k, grad_v = (torch.zeros_like(k.transpose(1, 2), dtype=wide(k)) for _ in "kv")
        for piece, p in zip(ctx.pieces, kept, strict=True):
            groups, keys = slice(piece.start, piece.stop), slice(piece.begin, piece.end)
            n, t = piece.stop - piece.start, piece.end - piece.begin
            g, q_piece = grad[:, groups].flatten(1, 2), q[:, groups].flatten(1, 2)
            grad_v[..., keys] += torch.bmm(g.transpose(1, 2), p[..., :t])
            grad_p = torch.empty_like(p)
            torch.bmm(g, v[:, keys].transpose(1, 2), out=grad_p[..., :t])
            grad_p[..., t:] = own_grad_p[:, groups].flatten(1, 2)
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, groups] = torch.bmm(grad_s[..., :t], k[:, keys]).view(B * J, n, M, C)
            grad_k[..., keys] += torch.bmm(q_piece.transpose(1, 2), grad_s[..., :t])
            own_grad_s[:, groups] = grad_s[..., t:].view(B * J, n, M, S)
        own_grad = own_grad_s.flatten(0, 1)
        grad_q.flatten(0, 1).baddbmm_(own_grad, own_k.flatten(0, 2))
        shared = (t.to(k.dtype).transpose(1, 2).view(B, J, -1, C) for t in (grad_k, grad_v))
        own = (torch.bmm(own_grad.mT, q.flatten(0, 1)), torch.bmm(own_p.flatten(0, 1).mT, grad.flatten(0, 1)))
        return grad_q.view(ctx.shape), *shared, *(t.view(own_k.shape) for t in own), None
