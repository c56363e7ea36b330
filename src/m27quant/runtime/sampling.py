"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, then one draw per position.

The draw of a position is a function of (seed, position) alone, so neither batches, nor preemption, nor drafts change
an output.  Every row is reduced by itself, in F64, over candidates in a fixed order: likelier first, then lower id.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m27quant.runtime.generation import SamplingParams

HEAD_CANDIDATES = 1024
"""Without top-k, top-p looks at so many candidates first: sorting the whole vocabulary is seldom needed."""


NO_CHOICE = -1
"""In place of a token where logits are NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of logits is the successor of."""

    params: SamplingParams
    """Complete: no None but max_tokens, seed and logprobs."""
    seed: int
    tokens: Sequence[int]
    """All ids before the one that is chosen: prompt, output, and on a drafted row its ancestors."""
    num_prompt: int
    stop_ids: frozenset[int]


def uniform(seed: int, position: int) -> float:
    """The one random number of a position, from 0 up to but not 1, in steps of 2**-53."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(logits_RV: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token for each row of F32 logits, or `NO_CHOICE`."""
    if not rows:
        return []
    largest, argmax = logits_RV.max(dim=-1)  # of equals the first; a NaN is the largest
    greedy = torch.where(largest.isfinite(), argmax, NO_CHOICE).tolist()
    plain = [row.params.is_greedy and not _is_adjusted(row) for row in rows]
    return [
        token if plain[index] or token == NO_CHOICE else _choose(logits_RV[index], rows[index])
        for index, token in enumerate(greedy)
    ]


def log_probabilities(logits_V: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Of the chosen token and of the `count` likeliest, before penalties and temperature, in nats."""
    log_p = torch.log_softmax(logits_V.double(), dim=-1)
    ids, _ = _sorted_candidates(logits_V, count) if count else (torch.empty(0, dtype=torch.int64), None)
    return float(log_p[token]), [(i, float(log_p[i])) for i in ids.tolist()]


def probabilities(logits_V: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """What a row is drawn from: candidate ids int64 [n], likeliest first, and their probabilities F64 [n].

    Nothing where settings leave no logit that is a number: all that is left stops, or a penalty is without bounds.
    """
    p = row.params
    assert p.top_k is not None
    assert p.top_p is not None
    assert p.min_p is not None
    logits_V = _adjusted(logits_V, row)
    if not bool(logits_V.max().isfinite()):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    if p.is_greedy:
        return logits_V.argmax().reshape(1), torch.ones(1, dtype=torch.float64)
    ids, logits = _candidates(logits_V, p)
    prob = torch.softmax(logits, dim=0)
    if p.top_p < 1:
        before = prob.cumsum(0) - prob
        kept = int((before < p.top_p).sum())  # the first always is
        ids, prob = ids[:kept], prob[:kept]
    if p.min_p:
        kept = int((prob >= p.min_p * prob[0]).sum())
        ids, prob = ids[:kept], prob[:kept]
    return ids, prob / prob.sum()


def _choose(logits_V: Tensor, row: Row) -> int:
    ids, prob = probabilities(logits_V, row)
    if len(ids) < 2:
        return int(ids[0]) if len(ids) else NO_CHOICE
    drawn = uniform(row.seed, len(row.tokens))
    at = torch.searchsorted(prob.cumsum(0), torch.tensor(drawn, dtype=torch.float64), right=True)
    last = int((prob > 0).sum()) - 1  # where rounding leaves the sum below 1
    return int(ids[min(int(at), last)])


def _candidates(logits_V: Tensor, p: SamplingParams) -> tuple[Tensor, Tensor]:
    """(ids, logits over temperature in F64) of what top-k leaves, or of enough for top-p; likeliest first."""
    assert p.temperature is not None
    V = len(logits_V)
    scaled_V = (logits_V.double() - logits_V.max().double()) / p.temperature
    if p.top_k and p.top_k < V:
        return _sorted_candidates(scaled_V, p.top_k)
    if p.top_p is not None and p.top_p < 1 and V > HEAD_CANDIDATES:
        ids, logits = _sorted_candidates(scaled_V, HEAD_CANDIDATES)
        log_total = torch.logsumexp(scaled_V, 0)
        if float(torch.logsumexp(logits, 0) - log_total) > math.log(p.top_p) + 1e-9:
            rest = (scaled_V.exp().sum() - logits.exp().sum()).clamp(min=0).log()
            # the rest takes part in the sum as one candidate, behind the end that top-p cuts at
            return torch.cat((ids, ids[-1:])), torch.cat((logits, rest[None].cpu()))
    return _sorted_candidates(scaled_V, V)


def _sorted_candidates(values_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values, largest first, of equals the lower id: (ids, values in F64)."""
    V = len(values_V)
    if count < V:
        least = torch.topk(values_V, count).values[-1]
        ids = (values_V >= least).nonzero().flatten()
    else:
        ids = torch.arange(V, device=values_V.device)
    values, order = values_V[ids].double().sort(descending=True, stable=True)
    return ids[order][:count].cpu(), values[:count].cpu()


def _is_adjusted(row: Row) -> bool:
    p = row.params
    return bool(
        p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.prescribed
        or len(row.tokens) - row.num_prompt < p.min_tokens
    )


def _adjusted(logits_V: Tensor, row: Row) -> Tensor:
    """Logits after penalties, without what `min_tokens` and `prescribed` exclude; the argument is left as it is."""
    if not _is_adjusted(row):
        return logits_V
    p, V = row.params, len(logits_V)
    logits_V = logits_V.clone()
    tokens = torch.as_tensor(row.tokens, dtype=torch.int64)
    if p.repetition_penalty is not None and p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.tokens))).to(logits_V.device)
        found = logits_V[seen]
        logits_V[seen] = torch.where(found > 0, found / p.repetition_penalty, found * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = torch.bincount(tokens[row.num_prompt :], minlength=V).to(logits_V.device)
        logits_V -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    may_stop = len(row.tokens) - row.num_prompt >= p.min_tokens
    if p.prescribed is not None:
        allowed, stops = p.prescribed.allowed(row.tokens[row.num_prompt :])
        if allowed:
            others = torch.ones(V, dtype=torch.bool, device=logits_V.device)
            others[list(allowed)] = False
            return logits_V.masked_fill(others, -math.inf)
        may_stop = may_stop and stops
    if not may_stop:
        logits_V[list(row.stop_ids)] = -math.inf
    return logits_V
