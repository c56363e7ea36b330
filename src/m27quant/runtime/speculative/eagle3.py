"""EAGLE3: one decoder layer that reads the target's features and then its own output (arXiv:2503.01840).

Slot i holds token i + 1 and the features of position i, turns at rotary position i, and predicts token i + 2.  A call
extends the slots of the committed history, whose keys and values are kept; from the last one a chain or a tree is
drafted, each node from its token and its parent's hidden state.  Keys and values of drafts are dropped.

Shapes: b sequences, m new slots, F nodes of a frontier, N tree nodes that were expanded, D hidden, H query heads,
J key/value heads, C head_dim, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from m27quant.kernels.linear import linear
from m27quant.kernels.rms_norm import rms_norm
from m27quant.runtime.speculative.config import Eagle3Settings
from m27quant.runtime.speculative.context import ContextCache, attend, check_taps
from m27quant.runtime.speculative.decoder import LayerWeights, Rotary, Shared, key_value, mlp, query
from m27quant.runtime.speculative.proposal import NOTHING, DraftRequest, Proposal
from m27quant.runtime.speculative.tree import Growth, check_shape, num_candidates

DEFAULT_STEPS, DEFAULT_TREE = 3, 8


@dataclass(frozen=True, slots=True)
class Eagle3Weights:
    """All in the compute dtype."""

    fc: Tensor
    hidden_norm: Tensor
    norm: Tensor
    layer: LayerWeights
    shared: Shared
    fc_norm: tuple[Tensor, ...] = ()
    """One for each tap."""
    input_norm: Tensor | None = None


@dataclass(slots=True)
class _Drafted:
    """Keys and values of expanded nodes, and which of them each node of the frontier descends from."""

    keys_bNJC: Tensor
    values_bNJC: Tensor
    seen_bFN: Tensor


class Eagle3Drafter:
    """Drafts chains (top-1) or trees; flags as SGLang means them."""

    def __init__(
        self,
        settings: Eagle3Settings,
        weights: Eagle3Weights,
        taps: tuple[int, ...],
        *,
        num_steps: int = DEFAULT_STEPS,
        topk: int = 1,
        num_draft_tokens: int | None = None,
        nbytes: int = 0,
    ) -> None:
        """Make a drafter without history.

        Args:
            settings: of its config.json.
            weights: in the dtype and on the device to compute with.
            taps: hidden states of the target, in the order of fc's columns.
            num_steps: depth of the tree; it takes num_steps - 1 forward passes beside the extension.
            topk: children of a node, and nodes of a frontier.
            num_draft_tokens: rows that the target verifies, the root included; with top-1 num_steps + 1 in any case.
            nbytes: of its own weights, what it borrows left out.

        Raises:
            UsageError: settings that make no tree.
        """
        if num_draft_tokens is None or topk == 1:
            most = num_candidates(num_steps, topk) + 1
            num_draft_tokens = most if topk == 1 else min(DEFAULT_TREE, most)
        check_shape(num_steps, topk, num_draft_tokens, len(weights.shared.head))
        self.settings, self.weights, self.taps = settings, weights, taps
        self.nbytes = nbytes
        self.num_steps = self.max_depth = num_steps
        self.topk = topk
        self.num_draft_tokens = num_draft_tokens - 1
        s, fc = settings.sizes, weights.fc
        self.dtype, self.device = fc.dtype, fc.device
        self.context = ContextCache(1, s.num_key_value_heads, s.head_dim, self.dtype, self.device)
        self._last: dict[int, Tensor] = {}
        """Hidden state [D] of each sequence's last slot."""

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """Extend every history, then draft for all together, a level at a time."""
        self._extend(requests)
        wanted = [r for r in requests if r.max_tokens > 0 and r.sequence in self._last]
        drafts = iter(self._draft(wanted)) if wanted else iter(())
        chosen = {r.sequence for r in wanted}
        return [next(drafts) if r.sequence in chosen else NOTHING for r in requests]

    def forget(self, sequence: int) -> None:
        self.context.forget(sequence)
        self._last.pop(sequence, None)

    @torch.inference_mode()
    def forced_hidden(self, requests: Sequence[DraftRequest], texts: Sequence[Sequence[int]]) -> Tensor:
        """What the head reads at each place of chains behind the requests' tokens, [b, num_steps, D].

        The chains are fed `texts`, the tokens that do follow, not what they draft themselves.
        """
        self._extend(requests)
        hidden_bFD = torch.stack([self._last[r.sequence] for r in requests])[:, None]
        drafted: _Drafted | None = None
        places = [hidden_bFD]
        only = torch.zeros(len(requests), 1, dtype=torch.int64, device=self.device)
        for step in range(self.num_steps - 1):
            tokens = torch.tensor([[text[step]] for text in texts], device=self.device)
            parents = self._recurrent(hidden_bFD)
            hidden_bFD, drafted = self._step(requests, step, tokens, parents, only, drafted)
            places.append(hidden_bFD)
        return rms_norm(torch.cat(places, 1), self.weights.norm, self.settings.sizes.rms_norm_eps)

    # -- the committed history ----------------------------------------------------------------------

    def _extend(self, requests: Sequence[DraftRequest]) -> None:
        """Append the slots of newly committed positions; of each sequence only the last one is computed whole."""
        known = [self.context.length(r.sequence) for r in requests]
        width = self.weights.fc.shape[1]
        new = [
            check_taps(r.sequence, len(r.tokens), n, r.taps, width)
            for r, n in zip(requests, known, strict=True)
        ]
        grown = [i for i, taps in enumerate(new) if len(taps)]
        if not grown:
            return
        counts = [len(new[i]) for i in grown]
        tokens = [token for i in grown for token in requests[i].tokens[known[i] + 1 :]]
        positions = [torch.arange(known[i], known[i] + count) for i, count in zip(grown, counts, strict=True)]
        s = self.settings.sizes
        rotary = s.rope.table(torch.cat(positions).to(self.device), self.dtype)
        features = self._features(torch.cat([new[i] for i in grown]))
        u, residual = self._inputs(torch.tensor(tokens, device=self.device), features)
        kv = torch.stack(key_value(u, self.weights.layer, s.head_dim, s.rms_norm_eps, rotary))
        for i, kv_2mJC in zip(grown, torch.split(kv, counts, dim=1), strict=True):
            self.context.append(requests[i].sequence, kv_2mJC[None])
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        turned: Rotary = (rotary[0][last], rotary[1][last])
        q = query(u[last], self.weights.layer, s.head_dim, s.rms_norm_eps, turned)
        sequences = [requests[i].sequence for i in grown]
        out = [attend(q[j : j + 1], *self.context.read(n)[0]) for j, n in enumerate(sequences)]
        hidden = self._output(residual[last], torch.cat(out))
        self._last |= dict(zip(sequences, hidden, strict=True))

    def _features(self, taps: Tensor) -> Tensor:
        """What fc makes of the taps, [m, D]."""
        w, eps = self.weights, self.settings.sizes.rms_norm_eps
        x = taps.to(self.device, self.dtype)
        if w.fc_norm:
            parts = x.chunk(len(w.fc_norm), dim=-1)
            x = torch.cat(
                [rms_norm(part, norm, eps) for part, norm in zip(parts, w.fc_norm, strict=True)], dim=-1
            )
        if w.input_norm is not None:
            x = rms_norm(x, w.input_norm, eps)
        return linear(x, w.fc)

    # -- the layer ----------------------------------------------------------------------------------

    def _inputs(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the projections read, [.., 2D], the embedding first, and the residual branch, [.., D]."""
        w, eps = self.weights, self.settings.sizes.rms_norm_eps
        embedded = rms_norm(w.shared.embedded(tokens, self.dtype), w.layer.input_layernorm, eps)
        normed = rms_norm(hidden, w.hidden_norm, eps)
        residual = normed if self.settings.norm_before_residual else hidden
        return torch.cat((embedded, normed), dim=-1), residual

    def _output(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output behind attention [T, H*C], before the final norm: [T, D]."""
        w = self.weights.layer
        return mlp(residual + linear(attended, w.o_proj), w, self.settings.sizes.rms_norm_eps)

    def _log_probs(self, hidden_TD: Tensor) -> Tensor:
        """F32 [T, V], at temperature 1 whatever a request's own is."""
        normed = rms_norm(hidden_TD, self.weights.norm, self.settings.sizes.rms_norm_eps)
        logits = linear(normed, self.weights.shared.head).float() * self.settings.logit_scale
        return logits.log_softmax(dim=-1)

    def _recurrent(self, hidden: Tensor) -> Tensor:
        """What the next draft step reads of a hidden state."""
        if not self.settings.norm_output:
            return hidden
        return rms_norm(hidden, self.weights.norm, self.settings.sizes.rms_norm_eps)

    # -- drafting -----------------------------------------------------------------------------------

    def _draft(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """A tree for each request."""
        shared, k = self.weights.shared, self.topk
        limits = [min(r.max_tokens, self.num_draft_tokens) for r in requests]
        hidden_bFD = torch.stack([self._last[r.sequence] for r in requests])[:, None]
        growth = Growth(k)
        frontier = growth.start(self._log_probs(hidden_bFD[:, 0]))
        drafted: _Drafted | None = None
        for step, _ in pairwise(range(min(self.num_steps, max(limits)))):
            rows = torch.arange(len(requests), device=self.device)[:, None]
            parents = self._recurrent(hidden_bFD)[rows, frontier.parents_bF]
            tokens = shared.tokens(frontier.rows_bF)
            hidden_bFD, drafted = self._step(requests, step, tokens, parents, frontier.parents_bF, drafted)
            log_probs = self._log_probs(hidden_bFD.flatten(0, 1)).view(len(requests), k, -1)
            frontier = growth.grow(frontier, log_probs)
        trees = growth.prune(self.num_draft_tokens, limits)
        return [Proposal(shared.tokens(torch.tensor(r, device=self.device)).tolist(), p) for r, p in trees]

    def _step(
        self,
        requests: Sequence[DraftRequest],
        step: int,
        tokens_bF: Tensor,
        parents_bFD: Tensor,
        origin_bF: Tensor,
        drafted: _Drafted | None,
    ) -> tuple[Tensor, _Drafted]:
        """One forward pass of a frontier: (hidden states [b, F, D], all expanded nodes).

        `parents_bFD` are hidden states of the nodes `origin_bF` of the frontier before.
        """
        s, w, (b, F) = self.settings.sizes, self.weights.layer, tokens_bF.shape
        u, residual = self._inputs(tokens_bF.flatten(), parents_bFD.flatten(0, 1))
        lengths = [self.context.length(r.sequence) for r in requests]
        positions = torch.tensor(lengths, device=self.device).repeat_interleave(F) + step
        rotary = s.rope.table(positions, self.dtype)
        q = query(u, w, s.head_dim, s.rms_norm_eps, rotary).view(b, F, -1, s.head_dim)
        k, v = (t.view(b, F, -1, s.head_dim) for t in key_value(u, w, s.head_dim, s.rms_norm_eps, rotary))
        drafted = _descend(drafted, origin_bF, k, v)
        out = []
        for i, request in enumerate(requests):
            keys, values = self.context.read(request.sequence)[0]
            seen = torch.cat(
                (torch.ones(F, len(keys), dtype=torch.bool, device=self.device), drafted.seen_bFN[i]), 1
            )
            keys, values = (
                torch.cat((keys, drafted.keys_bNJC[i])),
                torch.cat((values, drafted.values_bNJC[i])),
            )
            out.append(attend(q[i], keys, values, seen))
        return self._output(residual, torch.cat(out)).view(b, F, -1), drafted


def _descend(before: _Drafted | None, parents_bF: Tensor, k_bFJC: Tensor, v_bFJC: Tensor) -> _Drafted:
    """Add a frontier's keys and values; each node sees what its parent saw, and itself."""
    b, F = parents_bF.shape
    own = torch.eye(F, dtype=torch.bool, device=parents_bF.device).expand(b, F, F)
    if before is None:
        return _Drafted(k_bFJC, v_bFJC, own)
    inherited = before.seen_bFN[torch.arange(b, device=parents_bF.device)[:, None], parents_bF]
    return _Drafted(
        torch.cat((before.keys_bNJC, k_bFJC), 1),
        torch.cat((before.values_bNJC, v_bFJC), 1),
        torch.cat((inherited, own), 2),
    )
