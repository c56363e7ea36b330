"""The whole model in memory: weights of all layers, and one forward pass over rows of many sequences.

Shapes: T rows (tokens), D hidden, V vocabulary, S sequences, B blocks of a sequence, X longest tail of drafts, R rows
whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from m27quant.checkpoint.config import M2Config
from m27quant.kernels import fp8_kv_attention, rotary
from m27quant.kernels.linear import linear
from m27quant.kernels.rms_norm import rms_norm
from m27quant.runtime import layer as M
from m27quant.runtime.experts import Experts
from m27quant.runtime.kv_cache import KvCache
from m27quant.runtime.parallel import ALONE, Ranks

Observe = Callable[[int, Tensor, M.Routing], None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attention: M.AttentionWeights
    router: M.RouterWeights
    experts: Experts
    k_scale: Tensor
    """F32 []: of cached keys; 1 where the cache is not FP8."""
    v_scale: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a forward pass, on the model's device; see `fp8_kv_attention` for what a row attends to."""

    ids_T: Tensor
    """I64."""
    positions_T: Tensor
    """I64."""
    slots_T: Tensor
    """I64: where a row's key and value go."""
    block_table_SB: Tensor
    """I32."""
    sequence_T: Tensor
    """I32."""
    context_T: Tensor
    """I32."""
    tail_TX: Tensor | None
    """I32, -1 behind the end; None without drafts."""


class Model:
    """MiniMax-M2, or one rank's share of it."""

    def __init__(
        self,
        config: M2Config,
        *,
        embedding_VD: Tensor,
        layers: Sequence[LayerWeights],
        norm_D: Tensor,
        head_VD: Tensor,
        max_length: int,
        invariant: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        """Take the weights.

        Args:
            config: sizes.
            embedding_VD: BF16 or F32; its dtype is that of hidden states.
            layers: all of them.
            norm_D: the final norm.
            head_VD: the head.
            max_length: positions are below it.
            invariant: what a row gives depends on its sequence alone, bit for bit.
            ranks: who holds the other heads and experts.
        """
        self.config, self.invariant = config, invariant
        self.embedding, self.layers, self.norm, self.head = embedding_VD, layers, norm_D, head_VD
        self.ranks, self.ops = ranks, _ops(invariant, ranks)
        positions = torch.arange(max_length, device=embedding_VD.device)
        # once for all: a cosine's last bit may depend on how many are computed at a time
        self.rotary = M.rotary_table(positions, config, embedding_VD.dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def num_kv_heads(self) -> int:
        """Of this rank."""
        return self.config.num_key_value_heads // self.ranks.size

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        total = self.embedding.nbytes + self.norm.nbytes + self.head.nbytes
        for layer in self.layers:
            parts = (layer.attention, layer.router)
            total += sum(getattr(part, name).nbytes for part in parts for name in part.__slots__)
            total += layer.experts.nbytes
        return total

    def forward(
        self, rows: Rows, cache: KvCache, taps: Sequence[int] = (), observe: Observe | None = None
    ) -> Tensor:
        """The residual stream [T, D] behind the last layer; the rows' keys and values are in the cache then.

        `taps` are the hidden states (0: embeddings, j: behind layer j - 1) that go to the cache's taps.  `observe`
        gets of each layer its index, what its experts see [T, D], and the routing.
        """
        cos, sin = (table[rows.positions_T] for table in self.rotary)
        x_TD = self.embedding[rows.ids_T]
        _tap(cache, taps, 0, rows, x_TD)
        for index, layer in enumerate(self.layers):
            attend = self._attend(index, rows, cache)
            x_TD = M.attention_block(x_TD, layer.attention, self.config, (cos, sin), attend, self.ops)
            h_TD = M.moe_input(x_TD, layer.router, self.config, self.ops)
            routing = M.route(h_TD, layer.router, self.config.num_experts_per_tok, invariant=self.invariant)
            if observe is not None:
                observe(index, h_TD, routing)
            x_TD = x_TD + self.ops.reduce(layer.experts(h_TD, routing, invariant=self.invariant))
            _tap(cache, taps, index + 1, rows, x_TD)
        return x_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """F32 [R, V] of hidden states behind the last layer."""
        h_RD = self.ops.norm(x_RD, self.norm, self.config.rms_norm_eps)
        if self.invariant:  # not rounded to BF16 first: ties would decide
            return self.ops.linear(h_RD.float(), self.head)
        return self.ops.linear(h_RD, self.head).float()

    def _attend(self, index: int, rows: Rows, cache: KvCache) -> M.Attend:
        layer, keys, values = self.layers[index], cache.keys[index], cache.values[index]
        scales = (layer.k_scale, layer.v_scale)

        def attend(q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor) -> Tensor:
            fp8_kv_attention.write_kv(k_TJC, v_TJC, keys, values, rows.slots_T, *scales)
            return fp8_kv_attention.attention(
                q_THC, keys, values, rows.block_table_SB, rows.sequence_T, rows.context_T, rows.tail_TX, *scales,
                softmax_scale=self.config.head_dim**-0.5, invariant=self.invariant,
            )  # fmt: skip

        return attend


def _ops(invariant: bool, ranks: Ranks) -> M.Ops:
    """The kernels of whatever device the tensors are on."""
    product = partial(linear, invariant=invariant)
    if ranks.size == 1:
        return M.Ops(product, rms_norm, rotary.qk_norm_rope)
    return M.Ops(product, rms_norm, ranks.qk_norm_rope, ranks.sum)


def _tap(cache: KvCache, taps: Sequence[int], state: int, rows: Rows, x_TD: Tensor) -> None:
    for place, wanted in enumerate(taps):
        if wanted == state:
            assert cache.taps is not None
            cache.taps[rows.slots_T, place] = x_TD.to(cache.taps.dtype)
