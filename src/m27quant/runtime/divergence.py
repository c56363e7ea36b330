"""How far next-token distributions are from a reference's, token by token.

Shapes: T tokens, R of them at a time, D hidden, V vocabulary, N tokens that are likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from m27quant.runtime.streamed import Head

LOGIT_ELEMENTS = 2**24
"""Logits of each model that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One model's figures for each of T tokens, on the CPU; they are NaN where one of its logits is not finite."""

    finite: torch.Tensor
    """Bool [T]: all its logits are."""
    nll: torch.Tensor
    """F64 [T]: negative log-likelihood of the token that follows, in nats; 0 where none does, in any case."""
    kl: torch.Tensor
    """F64 [T]: KL divergence in nats of its distribution from the reference's; 0 for the reference itself."""
    top1: torch.Tensor
    """F64 [T]: 1 where it holds the reference's likeliest token for the likeliest, else 0."""
    top_n: torch.Tensor
    """F64 [T]: share of the reference's N likeliest tokens that are among its N likeliest."""


def token_scores(
    heads: Sequence[Head], x: Sequence[torch.Tensor], targets_T: torch.Tensor, *, num_likeliest: int = 8
) -> list[TokenScores]:
    """Score models by their last hidden states, the reference first.

    Distributions are computed in F64 from the heads' logits.

    Args:
        heads: each model's final norm and head.
        x: each model's hidden states [T, D] behind its last layer.
        targets_T: int64 [T], the token that follows each one, -1 where none does.
        num_likeliest: N; all of a vocabulary that is smaller.
    """
    step = max(1, LOGIT_ELEMENTS // len(heads[0].weight))
    parts: list[list[TokenScores]] = [[] for _ in heads]
    for begin in range(0, len(targets_T), step):
        rows = slice(begin, begin + step)
        reference = _distribution(heads[0], x[0][rows])
        for model, (head, x_TD) in enumerate(zip(heads, x, strict=True)):
            ours = _distribution(head, x_TD[rows]) if model else reference
            parts[model].append(_score(reference, ours, targets_T[rows].to(ours.device), num_likeliest))
    return [joined(each) for each in parts]


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """The scores of several pieces of text, one after another."""
    return TokenScores(
        *(torch.cat([getattr(part, name) for part in parts]) for name in TokenScores.__slots__)
    )


def _distribution(head: Head, x_RD: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, F64 [R, V]; NaN in every column of a row where a logit is not finite."""
    logits_RV = head(x_RD).double()
    bad_R1 = ~logits_RV.isfinite().all(-1, keepdim=True)
    return F.log_softmax(logits_RV, dim=-1).masked_fill_(bad_R1, math.nan)


def _score(
    log_p_RV: torch.Tensor, log_q_RV: torch.Tensor, targets_R: torch.Tensor, num_likeliest: int
) -> TokenScores:
    p_RV = log_p_RV.exp()
    # 0 * (-inf - x) would be NaN where a token is impossible to the reference
    kl_R = torch.where(p_RV == 0, 0, p_RV * (log_p_RV - log_q_RV)).sum(-1)
    likeliest_p_RN, likeliest_q_RN = (
        log_RV.topk(min(num_likeliest, log_RV.shape[1]), dim=-1).indices for log_RV in (log_p_RV, log_q_RV)
    )
    among_R = (likeliest_p_RN[:, :, None] == likeliest_q_RN[:, None, :]).any(-1).double().mean(-1)
    same_R = (log_p_RV.argmax(-1) == log_q_RV.argmax(-1)).double()
    nll_R = -log_q_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0]
    bad_R = kl_R.isnan()
    figures = (
        ~log_q_RV[:, 0].isnan(),
        torch.where(targets_R < 0, 0, nll_R),
        kl_R,
        same_R.masked_fill(bad_R, math.nan),
        among_R.masked_fill(bad_R, math.nan),
    )
    return TokenScores(*(figure.cpu() for figure in figures))


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to noise in dB of two sums of squares: inf where there is no noise, -inf where all is noise or NaN."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def squares(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Sums of squares of what is right and of what differs from it, in F64, over all pairs (right, found)."""
    signal = noise = 0.0
    for right, found in pairs:
        signal += float(right.double().square().sum())
        noise += float((right.double() - found.double()).square().sum())
    return signal, noise
