"""A forward pass over any checkpoint, streamed: one layer, one expert at a time in memory.

Whoever drives it calls, for each layer, `attention`, then `expert` for every expert, then `finish_layer`; so that
two models can go side by side.  Hidden states of all tokens stay in memory.

Shapes: T tokens of a batch, N of them routed to one expert, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.kernels import nvfp4_quantize
from m27quant.runtime import layer as M
from m27quant.runtime.loader import (
    attention_weights,
    dequantize_linear,
    read_plain,
    read_scalar,
    refuse_non_finite,
    router_weights,
)

Activations = Literal["nvfp4", "bf16"]
KvCache = Literal["fp8", "bf16"]
E4M3_MAX = 448.0
HEAD_ROWS = 16384
"""Rows of the head that are converted at a time."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What is rounded beside the weights, which are as they are stored."""

    activations: Activations = "bf16"
    """nvfp4: inputs of the experts' products, under the checkpoint's static `input_scale` (W4A4); bf16: none."""
    kv_cache: KvCache = "bf16"
    """fp8: keys and values to E4M3 under the checkpoint's `k_scale` and `v_scale`; bf16: not at all."""


@dataclass(slots=True)
class Batch:
    """Whole sequences one after another, and where their forward pass stands."""

    ids: torch.Tensor
    """int64 [T]."""
    lengths: tuple[int, ...]
    x: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, D]: the residual stream."""
    h: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, D]: what router and experts of the present layer see."""
    y: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, D]: what its experts have given so far."""
    routing: M.Routing | None = None
    """Where the router of the present layer, or of the last one, sends each token."""
    routed: M.Assignments | None = None
    """The same by expert."""

    def to(self, expert: int) -> M.Assignment:
        """The tokens that one expert of the present layer gets."""
        assert self.routed is not None, "attention() comes before the experts"
        return self.routed[expert]


def make_batches(sequences: Iterable[torch.Tensor], batch_tokens: int) -> list[Batch]:
    """Join sequences (int64 [length]) to batches of at most `batch_tokens` tokens; a longer one stands alone."""
    groups: list[list[torch.Tensor]] = []
    size = 0
    for ids in sequences:
        if not groups or size + len(ids) > batch_tokens:
            groups.append([])
            size = 0
        groups[-1].append(ids)
        size += len(ids)
    return [Batch(torch.cat(group), tuple(map(len, group))) for group in groups]


class StreamedModel:
    """One checkpoint's forward pass over some batches."""

    def __init__(
        self,
        source: Source,
        batches: Sequence[Batch],
        *,
        precision: Precision | None = None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Look up the first hidden states.

        Args:
            source: an FP8 or BF16 source, or an NVFP4 checkpoint.
            batches: token ids below the vocabulary's size; they belong to this model.
            precision: what is rounded beside the weights; nothing where None.
            device: of weights and hidden states.
            dtype: of weights, hidden states and logits.
        """
        self.source, self.config = source, source.config
        self.batches, self.precision = batches, precision or Precision()
        self.device, self.dtype = device, dtype
        for batch in batches:
            unique, where = torch.unique(batch.ids, return_inverse=True)
            rows = [source.read_rows(names.EMBEDDING, i, i + 1) for i in unique.tolist()]
            table = torch.cat(rows)
            refuse_non_finite(names.EMBEDDING, table)
            batch.x = table[where].to(device, dtype)

    def attention(self, layer: int) -> None:
        """Add the attention of norm(x) to x, and route every token."""
        weights = attention_weights(self.source, layer, self.device, self.dtype)
        router = router_weights(self.source, layer, self.device, self.dtype)
        c, kv_scales = self.config, self._kv_scales(layer)
        for batch in self.batches:
            positions = torch.cat([torch.arange(n, device=self.device) for n in batch.lengths])
            rotary = M.rotary_table(positions, c, self.dtype)
            batch.x = M.attention_block(batch.x, weights, c, rotary, _attend(batch.lengths, kv_scales))
            batch.h = M.moe_input(batch.x, router, c)
            batch.routing = M.route(batch.h, router, c.num_experts_per_tok)
            batch.routed = M.assignments(batch.routing, c.num_local_experts)
            batch.y = torch.zeros_like(batch.h)

    def load_expert(self, layer: int, index: int) -> M.Expert:
        """One expert of a layer, in the precision that was asked for."""
        return self.with_inputs(layer, index, self.expert_weights(layer, index))

    def expert_weights(self, layer: int, index: int) -> tuple[torch.Tensor, ...]:
        """w1, w2 and w3 of an expert: the same for every precision of one checkpoint."""
        modules = _modules(layer, index)
        return tuple(dequantize_linear(self.source, m, self.device, self.dtype) for m in modules)

    def with_inputs(self, layer: int, index: int, weights: tuple[torch.Tensor, ...]) -> M.Expert:
        """The expert of these weights, its inputs in the precision that was asked for."""
        w1, w2, w3 = weights
        if self.precision.activations == "bf16":
            return lambda h: F.linear(M.gated_activation(h, w1, w3), w2)
        s1, s2, s3 = (self._input_scale(m) for m in _modules(layer, index))
        s13 = torch.maximum(s1, s3)  # engines keep one for both, the larger
        quantize = nvfp4_quantize.fake_quantize
        return lambda h: F.linear(quantize(M.gated_activation(quantize(h, s13), w1, w3), s2), w2)

    def expert(self, index: int, apply: M.Expert) -> None:
        """Add to y the weighted output of one expert for the tokens that are routed to it."""
        for batch in self.batches:
            to = batch.to(index)
            if len(to.rows):
                M.add_output(batch.y, apply(batch.h[to.rows]), to)

    def finish_layer(self) -> None:
        """Add y to x: the layer is done, and what only it needed is let go."""
        for batch in self.batches:
            batch.x = batch.x + batch.y
            batch.h = batch.y = torch.empty(0)

    def layer(self, layer: int) -> None:
        """One whole layer; experts that no token is routed to are not read."""
        self.attention(layer)
        for index in range(self.config.num_local_experts):
            if any(len(batch.to(index).rows) for batch in self.batches):
                self.expert(index, self.load_expert(layer, index))
        self.finish_layer()

    def head(self) -> Head:
        """The final norm and the head."""
        norm = read_plain(self.source, names.FINAL_NORM).to(self.device, self.dtype)
        return Head(
            norm, read_plain(self.source, names.LM_HEAD).to(self.device), self.config.rms_norm_eps, self.dtype
        )

    def _kv_scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(k_scale, v_scale), 1 where the checkpoint has none as engines take it; None for a BF16 cache."""
        if self.precision.kv_cache == "bf16":
            return None
        k, v = (
            read_scalar(self.source, name) if name in self.source.tensors else torch.ones(())
            for name in (names.k_scale(layer), names.v_scale(layer))
        )
        return k.to(self.device), v.to(self.device)

    def _input_scale(self, module: str) -> torch.Tensor:
        scale = read_scalar(self.source, f"{module}.input_scale")
        if not nvfp4_quantize.is_usable(scale):
            raise CheckpointError(
                f"tensor '{escape(module)}.input_scale' is {float(scale)}: nothing can be divided by it",
                hint="quantize again, with every expert calibrated",
            )
        return scale.to(self.device)


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states to logits; the weight [V, D] stays as it is stored and is converted piece by piece."""

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float
    dtype: torch.dtype

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] in `dtype`."""
        h = M.rms_norm(x_TD, self.norm, self.eps)
        parts = torch.split(self.weight, HEAD_ROWS)
        return torch.cat([F.linear(h, part.to(self.dtype)) for part in parts], dim=1)


@torch.inference_mode()
def logits(
    source: Source,
    input_ids: list[int] | torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
) -> torch.Tensor:
    """Logits [T, vocab_size] (in `dtype`) of one sequence of T token ids, one layer in memory at a time.

    FP8 weights are taken as their BF16 dequantization, NVFP4 weights as what they stand for.

    Raises:
        UsageError: no tokens, or ids outside of the vocabulary.
        CheckpointError: damaged weights.
    """
    config = source.config
    ids = torch.as_tensor(input_ids, dtype=torch.int64).reshape(-1)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise UsageError(f"input_ids must be 1 or more ids from 0 to {config.vocab_size - 1}")
    batch = Batch(ids, (len(ids),))
    model = StreamedModel(source, [batch], precision=precision, device=torch.device(device), dtype=dtype)
    for index in range(config.num_hidden_layers):
        model.layer(index)
    return model.head()(batch.x)


def _modules(layer: int, index: int) -> list[str]:
    return [names.expert(layer, index, projection) for projection in names.EXPERT_PROJECTIONS]


def fake_quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What x becomes in an FP8 cache: E4M3(x / scale), saturating, times `scale` (F32 []), in x's dtype."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def _attend(lengths: Sequence[int], kv_scales: tuple[torch.Tensor, torch.Tensor] | None) -> M.Attend:
    """Causal attention within each sequence, keys and values as the cache gives them back."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kv_scales is not None:
            k, v = (fake_quantize_fp8(t, scale) for t, scale in zip((k, v), kv_scales, strict=True))
        parts = zip(*(torch.split(t, list(lengths)) for t in (q, k, v)), strict=True)
        return torch.cat([M.causal_attention(*part) for part in parts])

    return attend
