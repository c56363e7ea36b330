"""One decoder layer's calibration: all tokens through attention and router, then every expert over every token.

The two-pass trick of full-expert calibration.  Forcing top-k to all experts makes every expert see every token, so

* the input of w1 and w3 is the same for all experts: its amax is one reduction over the MoE input;
* the input of w2 needs w1 and w3 over all tokens, which is computed;
* w2 itself need only run for the tokens that are naturally routed to the expert, because only these propagate.

With E experts and K per token that is (2 E + K) / (3 E + 3 K) of the products of two separate passes: 0.66
for 256 and 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from m27quant.calib.activations import Chunk, Rows
from m27quant.calib.layer_ranges import LayerRanges, amax, amax_tensor, is_finite
from m27quant.calib.routing import Routings
from m27quant.checkpoint.config import M2Config
from m27quant.errors import CalibrationError
from m27quant.runtime import layer as M

MAX_DROPPED_SHARE = 0.10


@dataclass(slots=True)
class Dropped:
    """Sequences that produced NaN or Inf.  Their rows become zeros, which no maximum sees."""

    num_sequences: int
    sequences: set[int] = field(default_factory=set)

    def add(self, sequence: int) -> None:
        """Drop a sequence.

        Raises:
            CalibrationError: more than a tenth of all are gone; the model or the data are at fault.
        """
        self.sequences.add(sequence)
        if len(self.sequences) > MAX_DROPPED_SHARE * self.num_sequences:
            raise CalibrationError(
                f"{len(self.sequences)} of {self.num_sequences} calibration rows gave NaN or Inf, more than "
                f"{MAX_DROPPED_SHARE:.0%}",
                hint="check the source checkpoint and the calibration data; the result could not be trusted",
            )

    def update(self, sequences: Iterable[int]) -> None:
        """Drop what other ranks have dropped; raises as `add` does."""
        for sequence in sorted(set(sequences) - self.sequences):
            self.add(sequence)


def run_attention(
    chunks: Sequence[Chunk],
    rows: Rows,
    weights: M.AttentionWeights,
    router: M.RouterWeights,
    config: M2Config,
    ranges: LayerRanges,
    dropped: Dropped,
    tick: Callable[[Chunk], None],
) -> Routings:
    """x := x + attention(norm(x)) in `rows`; returns per chunk which tokens each expert gets.

    K is observed after norm and rotation, V as projected, the MoE input after its norm.
    """
    routed = Routings(chunks, config, router.gate.device)
    for number, chunk in enumerate(chunks):
        x = rows.read(chunk)
        rotary = M.rotary_table(_positions(chunk, x.device), config, x.dtype)
        attend = _observed_attention(chunk, ranges, dropped)
        x = M.attention_block(x, weights, config, rotary, attend)
        x = drop_non_finite(chunk, x, dropped)
        rows.write(chunk, x)
        h = M.moe_input(x, router, config)
        ranges.w13_input_amax = max(ranges.w13_input_amax, amax(h))
        routing = M.route(h, router, config.num_experts_per_tok)
        routed[number] = M.assignments(routing, config.num_local_experts)
        tick(chunk)
    return routed


def _positions(chunk: Chunk, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(n, device=device) for n in chunk.lengths])


def _observed_attention(chunk: Chunk, ranges: LayerRanges, dropped: Dropped) -> M.Attend:
    """Causal attention within each sequence of the chunk, noting the range of keys and values."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not ranges.add_kv(k, v):
            lengths = list(chunk.lengths)
            parts = zip(chunk.sequences, torch.split(k, lengths), torch.split(v, lengths), strict=True)
            for sequence, k_part, v_part in parts:
                if not ranges.add_kv(k_part, v_part) and sequence not in dropped.sequences:
                    dropped.add(sequence)
        out, at = torch.empty_like(q), 0
        for length in chunk.lengths:
            part = slice(at, at + length)
            out[part] = M.causal_attention(q[part], k[part], v[part])
            at += length
        return out

    return attend


def drop_non_finite(chunk: Chunk, x: torch.Tensor, dropped: Dropped) -> torch.Tensor:
    """Zero the rows of dropped sequences, dropping those that have become non-finite."""
    if not is_finite(amax(x)):
        at = 0
        for sequence, length in zip(chunk.sequences, chunk.lengths, strict=True):
            if sequence not in dropped.sequences and not is_finite(amax(x[at : at + length])):
                dropped.add(sequence)
            at += length
    at = 0
    for sequence, length in zip(chunk.sequences, chunk.lengths, strict=True):
        if sequence in dropped.sequences:
            x[at : at + length] = 0
        at += length
    return x


class Observer(Protocol):
    """What else is to be known of the experts' inputs than their largest values."""

    def add_inputs(self, h_TD: torch.Tensor) -> None:
        """A chunk of the MoE's input: once, not for every expert."""

    def add(self, expert: int, routed_h: torch.Tensor, act: torch.Tensor, routed_act: torch.Tensor) -> None:
        """A chunk through one expert: its input on routed tokens, its activation on all that count and on these."""

    def done(self, experts: Sequence[int]) -> None:
        """These experts have seen all chunks."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert in BF16: w1 [I, D], w2 [D, I], w3 [I, D]."""

    index: int
    w1: torch.Tensor
    w2: torch.Tensor
    w3: torch.Tensor


def run_experts(
    groups: Iterable[Sequence[ExpertWeights]],
    chunks: Sequence[Chunk],
    rows: Rows,
    out: Rows,
    routed: Routings,
    router: M.RouterWeights,
    config: M2Config,
    ranges: LayerRanges,
    *,
    full: bool,
    tick: Callable[[int], None],
    observers: Sequence[Observer] = (),
) -> None:
    """out := the MoE's output for all tokens of `rows`; ranges of every expert's w2 input.

    `full` measures over every token, else over the routed ones alone, which then share their largest.
    Experts add up in ascending order whatever the groups are.
    """
    ranges.w2_input_amax = [0.0] * config.num_local_experts
    first = True
    for group in groups:
        for chunk, assigned in zip(chunks, routed, strict=True):
            h = M.moe_input(rows.read(chunk), router, config)
            y = torch.zeros_like(h) if first else out.read(chunk)
            for observer in observers if first else ():
                observer.add_inputs(h)
            seen = []
            for expert in group:
                seen.append(_run_expert(expert, h, y, assigned[expert.index], full, observers))
                tick(expert.index)
            out.write(chunk, y)
            # one transfer per chunk: asking for each maximum would make an accelerator wait
            for expert, value in zip(group, torch.stack(seen).tolist(), strict=True):
                if not is_finite(value):
                    value = _finite_amax(expert, h, assigned[expert.index], full, ranges)
                ranges.w2_input_amax[expert.index] = max(ranges.w2_input_amax[expert.index], value)
        for observer in observers:
            observer.done([expert.index for expert in group])
        first = False
    if not full:
        ranges.w2_input_amax = [max(ranges.w2_input_amax)] * config.num_local_experts


def _run_expert(
    expert: ExpertWeights,
    h: torch.Tensor,
    y: torch.Tensor,
    to: M.Assignment,
    full: bool,
    observers: Sequence[Observer],
) -> torch.Tensor:
    """Add the expert's share to y; returns the amax of w2's input as a scalar tensor."""
    if full:
        act = M.gated_activation(h, expert.w1, expert.w3)
        routed_act = act[to.rows]
    elif len(to.rows):
        act = routed_act = M.gated_activation(h[to.rows], expert.w1, expert.w3)
    else:
        return h.new_zeros(())
    if observers:
        routed_h = h[to.rows]
        for observer in observers:
            observer.add(expert.index, routed_h, act, routed_act)
    if len(to.rows):
        M.add_expert(y, routed_act, expert.w2, to)
    return amax_tensor(act)


def _finite_amax(
    expert: ExpertWeights, h: torch.Tensor, to: M.Assignment, full: bool, ranges: LayerRanges
) -> float:
    """The amax over the tokens for which this expert stays finite; the others are counted."""
    act = M.gated_activation(h if full else h[to.rows], expert.w1, expert.w3)
    good = torch.isfinite(act).all(dim=1)
    ranges.non_finite_values += int((~good).sum())
    return amax(act[good])


def count_tokens(
    routed: Routings,
    chunks: Sequence[Chunk],
    dropped: Dropped,
    ranges: LayerRanges,
    *,
    full: bool,
) -> None:
    """Fill in how many tokens each expert saw and how many were routed to it, dropped sequences left out."""
    counts = [0] * routed.num_experts
    alive_tokens = 0
    for assigned, chunk in zip(routed, chunks, strict=True):
        alive = torch.cat(
            [
                torch.full((n,), s not in dropped.sequences)
                for s, n in zip(chunk.sequences, chunk.lengths, strict=True)
            ]
        )
        alive_tokens += int(alive.sum())
        for expert, count in enumerate(assigned.num_tokens):
            counts[expert] += int(alive[assigned[expert].rows.cpu()].sum()) if dropped.sequences else count
    ranges.routed_tokens = counts
    ranges.seen_tokens = [alive_tokens] * routed.num_experts if full else list(counts)
