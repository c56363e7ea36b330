"""The decoder layer of drafters (Qwen3's and Llama's) in training, in pieces that DFlash and EAGLE3 put together.

The compute dtype is that of the parameters.  The residual stream, statistics and gradients of norms are F32 at least.
Backwards are written by hand where autograd would walk over memory more often than needed.

Shapes: R rows, D hidden, X inputs of a projection, H heads, J key/value heads, G query heads for each, C head dim,
I intermediate, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.drafters.batch import Parameters
from m27quant.runtime.speculative.rope import Rope, read_rope

ATTENTION_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Sizes of the decoder layers, named as in config.json; the hidden size is the target's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    hidden_states: tuple[int, ...]
    """The target's hidden states that are tapped, in the order of fc's columns; 0 is the embedding."""

    @cached_property
    def rope(self) -> Rope:
        """How heads turn."""
        return read_rope({"rope_theta": self.rope_theta}, self.head_dim)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: F32, or F64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


# -- first weights ---------------------------------------------------------------------------------


def matrix(generator: torch.Generator, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    """Normal, so that outputs have the variance of inputs times `scale` squared."""
    weights: Tensor = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)
    return weights


def init_layer(prefix: str, s: LayerSpec, width: int, generator: torch.Generator) -> Parameters:
    """One layer whose attention reads `width` inputs; what adds to the residual stream starts small."""
    q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    D, I = s.hidden_size, s.intermediate_size
    layer = {
        "input_layernorm": torch.ones(D),
        "post_attention_layernorm": torch.ones(D),
        "self_attn.q_proj": matrix(generator, q, width),
        "self_attn.k_proj": matrix(generator, kv, width),
        "self_attn.v_proj": matrix(generator, kv, width),
        "self_attn.o_proj": matrix(generator, D, q, 0.3),
        "mlp.gate_proj": matrix(generator, I, D),
        "mlp.up_proj": matrix(generator, I, D),
        "mlp.down_proj": matrix(generator, D, I, 0.3),
    }
    return {f"{prefix}{name}.weight": tensor for name, tensor in layer.items()}


# -- norms -----------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last side, in weight's dtype."""
    normed: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        xf = x.to(wide(x))
        r = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(xf, r, weight)
        ctx.dtype = x.dtype
        normed: Tensor = (xf * r).mul_(weight).to(weight.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, r, weight = ctx.saved_tensors
        wf, grad = weight.to(x.dtype), grad.to(x.dtype)
        gx_RD = (grad * x).flatten(0, -2)
        grad_w = torch.mv(gx_RD.T, r.flatten())
        # of x r w: r w grad - x r^3 mean(w grad x)
        share = torch.mv(gx_RD, wf).view(r.shape).mul_(r.pow(3)).div_(x.shape[-1])
        grad_x = (grad * r).mul_(wf).addcmul_(x, share, value=-1)
        return grad_x.to(ctx.dtype), grad_w.to(weight.dtype), None


# -- rotation --------------------------------------------------------------------------------------


def rotary(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, C] of positions [...], of any shape."""
    cos, sin = rope.table(positions.flatten(), dtype)
    shape = (*positions.shape, 1, cos.shape[-1])
    return cos.view(shape), sin.view(shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head turned by its position, dimension i with i + C / 2, in x's dtype."""
    turned: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos).addcmul_(swapped, sin)


# -- MLP -------------------------------------------------------------------------------------------


def mlp(p: Parameters, prefix: str, h_RD: Tensor) -> Tensor:
    """SwiGLU."""
    gate, up, down = (p[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(h_RD, gate)) * F.linear(h_RD, up), down)
