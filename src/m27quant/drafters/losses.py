"""The loss of drafted tokens: cross-entropy with the token that follows, with the target's distribution, or a mix.

Loss and gradient are computed together, some rows at a time: logits over a large vocabulary are never kept.

Shapes: R rows, D hidden, V rows of the head, n rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.drafters.layers import wide

Teacher = Callable[[slice], Tensor]
"""The target's logits [n, V] for some of the rows."""
LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**27}
"""Logits of one piece: as many as a core's cache takes, or as keep a GPU busy and its memory free."""


def head_loss(
    hidden_RD: Tensor,
    head_VD: Tensor,
    tokens_R: Tensor,
    weights_R: Tensor,
    teacher: Teacher | None,
    soft: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_r w_r l_r with l = soft H(target, drafter) + (1 - soft) (-log drafter[token]).

    Args:
        hidden_RD: after the drafter's final norm, in the compute dtype.
        head_VD: the drafter's head; it gets a gradient if it wants one.
        tokens_R: int64 rows of the head that are the tokens that follow; read where soft < 1 and for `hits`.
        weights_R: F32.
        teacher: gives the target's logits over the same V; read where soft > 0.
        soft: 0 to 1.

    Returns:
        (the sum, a scalar of F32 at least that gradients start from; l [R]; hits bool [R]: the best logit is the
        token's, the first of equals).
    """
    if soft > 0 and teacher is None:
        raise ValueError(f"soft is {soft}: the target's logits are needed")
    total, losses, hits = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_RD, head_VD, tokens_R, weights_R, teacher, soft, torch.is_grad_enabled()
    )
    return total, losses, hits


def pieces(rows_RD: Tensor, vocab_size: int) -> Iterator[slice]:
    """Rows whose logits are computed together."""
    step = max(1, LOGITS_AT_ONCE.get(rows_RD.device.type, LOGITS_AT_ONCE["cpu"]) // vocab_size)
    yield from (slice(start, start + step) for start in range(0, len(rows_RD), step))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor, weights: Tensor, teacher: Teacher | None,
        soft: float, learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (R, V), dtype = (len(hidden), len(head)), wide(hidden)
        losses, hits = hidden.new_empty(R, dtype=dtype), torch.empty_like(tokens, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden) if learning and ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=dtype) if learning and ctx.needs_input_grad[1] else None
        for rows in pieces(hidden, V):
            token_n1, logits = tokens[rows, None], F.linear(hidden[rows], head).to(dtype)
            hits[rows] = logits.argmax(-1) == token_n1[:, 0]
            log_q = torch.log_softmax(logits, -1)
            loss = (
                -(1 - soft) * log_q.gather(1, token_n1)[:, 0] if soft < 1 else torch.zeros_like(losses[rows])
            )
            p = None
            if soft > 0 and teacher is not None:
                p = torch.softmax(teacher(rows), -1, dtype=dtype)
                loss = loss - soft * torch.linalg.vecdot(p, log_q)
            losses[rows] = loss
            if grad_hidden is None and grad_head is None:
                continue
            grad = log_q.exp_()  # softmax - target, times the weight
            if p is not None:
                grad.sub_(p, alpha=soft)
            if soft < 1:
                grad.scatter_add_(1, token_n1, torch.full_like(token_n1, soft - 1, dtype=dtype))
            grad = grad.mul_(weights[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head += torch.mm(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(losses, hits)
        ctx.dtypes = hidden.dtype, head.dtype
        return (losses * weights).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        hidden, head = (None if t is None else (t * grad).to(dtype) for t, dtype in pairs)
        return hidden, head, None, None, None, None, None
