"""A trainable MiniMax-M2 in plain torch.

The arithmetic is M2's (QK RMS-norm over the full projection, half-rotated heads, sigmoid routing whose bias
only selects).  Parameters are a flat dict of tensors whose dtype decides the compute dtype: BF16 copies to
train, F32 to measure.  The residual stream, the norms' statistics and the router stay F32.  The mixture of
experts and attention have hand-written backwards, which keeps training usable on two CPU cores.

Shapes: B batch, T positions, N = B*T tokens, D hidden, E experts, I intermediate, K experts per token,
H query heads, J key/value heads, d head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes of tiny-m27, named as in its config.json."""

    vocab_size: int = 2048
    hidden_size: int = 272
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 16
    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    intermediate_size: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def init_parameters(config: ModelConfig, seed: int) -> Parameters:
    """F32 masters; w13 stacks gate rows above up rows of each expert, [E, 2I, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    D, E, I = config.hidden_size, config.num_local_experts, config.intermediate_size
    Q, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    params = {"embed": normal(config.vocab_size, D, std=0.1), "head": normal(config.vocab_size, D, std=0.02)}
    params["norm"] = torch.ones(D)
    for n in range(config.num_hidden_layers):
        layer = {
            "input_norm": torch.ones(D), "post_norm": torch.ones(D),
            "q_norm": torch.ones(Q), "k_norm": torch.ones(KV),
            "q": normal(Q, D, std=D**-0.5), "k": normal(KV, D, std=D**-0.5), "v": normal(KV, D, std=D**-0.5),
            "o": normal(D, Q, std=0.3 * Q**-0.5), "router": normal(E, D, std=D**-0.5),
            "w13": normal(E, 2 * I, D, std=D**-0.5), "w2": normal(E, D, I, std=0.3 * I**-0.5),
        }  # fmt: skip
        params |= {f"{n}.{name}": tensor for name, tensor in layer.items()}
    return params


def compute_copies(masters: Parameters, dtype: torch.dtype) -> Parameters:
    """Copies to compute with: everything in `dtype`, the router in F32."""
    return {
        name: (w if name.endswith("router") else w.to(dtype)).detach().clone() for name, w in masters.items()
    }


class RMSNorm(torch.autograd.Function):
    """w * x / rms(x), statistics in F32, result in w's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        xf = x.float()
        r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
        normed = xf * r
        ctx.save_for_backward(normed, r, w)
        ctx.x_dtype = x.dtype
        return (normed * w.float()).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, r, w = ctx.saved_tensors
        grad = grad.float()
        grad_w = (grad * normed).reshape(-1, normed.shape[-1]).sum(0)
        grad = grad * w.float()
        grad_x = r * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad_x.to(ctx.x_dtype), grad_w.to(w.dtype), None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    result: Tensor = RMSNorm.apply(x, w, eps)
    return result


@lru_cache(maxsize=8)
def rope_tables(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, F32 [max positions, rotary_dim]."""
    half = torch.arange(0, config.rotary_dim, 2, device=device).float() / config.rotary_dim
    positions = torch.arange(config.max_position_embeddings, device=device).float()
    angles = positions[:, None] / config.rope_theta**half
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `cos.shape[-1]` dims of each head, pairing i with i + half; the rest passes."""
    rotary_dim = cos.shape[-1]
    a, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    half = rotary_dim // 2
    turned = torch.cat([-a[..., half:], a[..., :half]], -1)
    return torch.cat([a * cos.to(x.dtype) + turned * sin.to(x.dtype), rest], -1)


class CausalAttention(torch.autograd.Function):
    """Grouped-query causal attention by plain batched products: q [B,H,T,d], k and v [B,J,T,d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, d), J = q.shape, k.shape[1]
        q = q.reshape(B * J, (H // J) * T, d) * d**-0.5
        k, v = k.reshape(B * J, T, d), v.reshape(B * J, T, d)
        mask = causal_mask(T, H // J, q.dtype, q.device)
        p = torch.softmax(torch.baddbmm(mask.expand(B * J, -1, T), q, k.transpose(1, 2)), -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shapes = (B, H, J, T, d)
        return torch.bmm(p, v).view(B, H, T, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p = ctx.saved_tensors
        B, H, J, T, d = ctx.shapes
        grad = grad.reshape(q.shape)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_s = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        grad_q = torch.bmm(grad_s, k) * d**-0.5
        grad_k = torch.bmm(grad_s.transpose(1, 2), q)
        return grad_q.view(B, H, T, d), grad_k.view(B, J, T, d), grad_v.view(B, J, T, d)


@lru_cache(maxsize=8)
def causal_mask(T: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((T, T), float("-inf"), device=device).triu(1).repeat(groups, 1).to(dtype)


def expert_rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has rows; rows are sorted by expert."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class MixtureOfExperts(torch.autograd.Function):
    """sum_k c_k * w2_e(silu(w1_e x) * w3_e x) over the chosen experts, rows sorted by expert.

    x [N,D], coefficients F32 [N,K], chosen int64 [N,K], w13 [E,2I,D], w2 [E,D,I].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, chosen: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        (N, K), (E, D, I) = chosen.shape, w2.shape
        order = torch.argsort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=E).tolist()
        source = order // K
        xs = x.index_select(0, source)
        h = x.new_empty(N * K, 2 * I)
        for e, rows in expert_rows(counts):
            torch.mm(xs[rows], w13[e].t(), out=h[rows])
        g, u = h[:, :I].float(), h[:, I:].float()
        a = (F.silu(g) * u).to(x.dtype)
        y = x.new_empty(N * K, D)
        for e, rows in expert_rows(counts):
            torch.mm(a[rows], w2[e].t(), out=y[rows])
        place = torch.empty_like(order)
        place[order] = torch.arange(N * K, device=x.device)
        y_NKD = y.index_select(0, place).view(N, K, D)
        ctx.save_for_backward(xs, coefficients, order, source, place, h, a, y_NKD, w13, w2)
        ctx.counts = counts
        return torch.bmm(coefficients.to(x.dtype).unsqueeze(1), y_NKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        xs, coefficients, order, source, place, h, a, y_NKD, w13, w2 = ctx.saved_tensors
        (N, K), I = coefficients.shape, w2.shape[2]
        grad = grad.contiguous()
        grad_c = torch.bmm(y_NKD, grad.unsqueeze(2)).squeeze(2).float()
        sorted_c = coefficients.reshape(-1).index_select(0, order).to(grad.dtype)
        grad_y = grad.index_select(0, source) * sorted_c.unsqueeze(1)
        grad_a, grad_w2 = torch.empty_like(a), torch.zeros_like(w2)
        for e, rows in expert_rows(ctx.counts):
            torch.mm(grad_y[rows], w2[e], out=grad_a[rows])
            torch.mm(grad_y[rows].t(), a[rows], out=grad_w2[e])
        g, u, grad_af = h[:, :I].float(), h[:, I:].float(), grad_a.float()
        s = torch.sigmoid(g)
        silu = g * s
        grad_h = torch.cat([grad_af * u * (s + silu * (1 - s)), grad_af * silu], 1).to(a.dtype)
        grad_xs, grad_w13 = torch.empty_like(xs), torch.zeros_like(w13)
        for e, rows in expert_rows(ctx.counts):
            torch.mm(grad_h[rows], w13[e], out=grad_xs[rows])
            torch.mm(grad_h[rows].t(), xs[rows], out=grad_w13[e])
        grad_x = grad_xs.index_select(0, place).view(N, K, -1).sum(1)
        return grad_x, grad_c, None, grad_w13, grad_w2


def route(h: Tensor, router: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(coefficients F32 [N,K], chosen [N,K]); the bias decides who is chosen, never how much one counts."""
    scores = torch.sigmoid(F.linear(h.float(), router.float()))
    chosen = torch.topk(scores.detach() + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, chosen)
    return weights / weights.sum(-1, keepdim=True), chosen


@dataclass(slots=True)
class KVCache:
    """Keys (after norm and RoPE) and values of all layers, [layers, B, J, capacity, d]."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> KVCache:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Append k and v at the cache's end, attend: a prefill at position 0, or one position."""
    (B, H, T, d), J = q.shape, k.shape[1]
    start, stop = cache.length, cache.length + q.shape[2]
    cache.keys[layer][:, :, start:stop], cache.values[layer][:, :, start:stop] = k, v
    if start == 0:
        return CausalAttention.apply(q, k, v)
    assert T == 1, "after the prefill the cache takes one position at a time"
    keys, values = cache.keys[layer][:, :, :stop], cache.values[layer][:, :, :stop]
    return F.scaled_dot_product_attention(q.reshape(B, J, H // J, d), keys, values).reshape(B, H, 1, d)


def forward(
    params: Parameters,
    bias: Tensor,
    ids: Tensor,
    config: ModelConfig,
    *,
    loads: Tensor | None = None,
    taps: list[Tensor] | None = None,
    cache: KVCache | None = None,
    scores: list[Tensor] | None = None,
) -> Tensor:
    """Final normed hidden states [B*T, D]; logits are `F.linear(result, params["head"])`.

    bias: F32 [layers, E].  ids: int64 [B, T].
    loads: F32 [layers, E], gets each expert's chosen tokens added.
    taps: gets the residual stream before the first and after every layer, F32 [B*T, D].
    scores: gets each layer's router scores before the bias, F32 [B*T, E].
    """
    (B, T), eps = ids.shape, config.rms_norm_eps
    H, J, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    start = cache.length if cache else 0
    cos, sin = (table[start : start + T] for table in rope_tables(config, ids.device))
    x = F.embedding(ids, params["embed"]).float().view(B * T, -1)
    if taps is not None:
        taps.append(x)
    for n in range(config.num_hidden_layers):
        p = {name: params[f"{n}.{name}"] for name in LAYER_NAMES}
        h = rms_norm(x, p["input_norm"], eps)
        q = rms_norm(F.linear(h, p["q"]), p["q_norm"], eps).view(B, T, H, d).transpose(1, 2)
        k = rms_norm(F.linear(h, p["k"]), p["k_norm"], eps).view(B, T, J, d).transpose(1, 2)
        v = F.linear(h, p["v"]).view(B, T, J, d).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = CausalAttention.apply(q, k, v) if cache is None else cached_attention(q, k, v, cache, n)
        x = x + F.linear(attended.transpose(1, 2).reshape(B * T, -1), p["o"])
        h = rms_norm(x, p["post_norm"], eps)
        coefficients, chosen = route(h, p["router"], bias[n], config.num_experts_per_tok)
        if loads is not None:
            loads[n] += torch.bincount(chosen.reshape(-1), minlength=config.num_local_experts)
        if scores is not None:
            scores.append(torch.sigmoid(F.linear(h.float(), p["router"].float())))
        x = x + MixtureOfExperts.apply(h, coefficients, chosen, p["w13"], p["w2"])
        if taps is not None:
            taps.append(x)
    if cache:
        cache.length += T
    return rms_norm(x, params["norm"], eps)


LAYER_NAMES = ("input_norm", "post_norm", "q_norm", "k_norm", "q", "k", "v", "o", "router", "w13", "w2")
