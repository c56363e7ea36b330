"""What DFlash and EAGLE3 share in training: sizes, first weights, masked attention, the MLP, the loss.

Parameters are a flat dict under the names of the drafter's checkpoint.  As in model.py their dtype decides the compute
dtype, while the residual stream and the statistics of norms stay F32.

Shapes: B sequences, R query rows, S keys, D hidden, H query heads, J key/value heads, d head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from model import Parameters, rms_norm, rotate
from torch import Tensor

MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class DrafterSizes:
    """Named as in config.json; the hidden size is the target's."""

    num_hidden_layers: int
    hidden_size: int = 272
    intermediate_size: int = 640
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def matrix(generator: torch.Generator, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5


def init_layer(prefix: str, s: DrafterSizes, width: int, generator: torch.Generator) -> Parameters:
    """One decoder layer whose projections read `width` inputs."""
    q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    layer = {
        "input_layernorm": torch.ones(s.hidden_size),
        "post_attention_layernorm": torch.ones(s.hidden_size),
        "self_attn.q_proj": matrix(generator, q, width),
        "self_attn.k_proj": matrix(generator, kv, width),
        "self_attn.v_proj": matrix(generator, kv, width),
        "self_attn.o_proj": matrix(generator, s.hidden_size, q, 0.3),
        "mlp.gate_proj": matrix(generator, s.intermediate_size, s.hidden_size),
        "mlp.up_proj": matrix(generator, s.intermediate_size, s.hidden_size),
        "mlp.down_proj": matrix(generator, s.hidden_size, s.intermediate_size, 0.3),
    }
    return {f"{prefix}{name}.weight": tensor for name, tensor in layer.items()}


def mlp(p: Parameters, prefix: str, x: Tensor, eps: float) -> Tensor:
    """x + SwiGLU(norm(x))."""
    h = rms_norm(x, p[f"{prefix}post_attention_layernorm.weight"], eps)
    gate, up = (F.linear(h, p[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    return x + F.linear(F.silu(gate) * up, p[f"{prefix}mlp.down_proj.weight"])


@lru_cache(maxsize=8)
def rotary(head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin over the whole head, F32 [positions, head_dim]."""
    angles = torch.arange(MAX_POSITIONS)[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate_at(x_BHRd: Tensor, positions_BR: Tensor, s: DrafterSizes) -> Tensor:
    cos, sin = rotary(s.head_dim, s.rope_theta)
    return rotate(x_BHRd, cos[positions_BR][:, None], sin[positions_BR][:, None])


def heads(x: Tensor, batch: int, head_dim: int) -> Tensor:
    """[B*R, heads*d] -> [B, heads, R, d]."""
    return x.view(batch, -1, x.shape[-1] // head_dim, head_dim).transpose(1, 2)


class MaskedAttention(torch.autograd.Function):
    """Grouped-query attention by plain batched products: q [B,H,R,d], k and v [B,J,S,d], mask_BRS added to scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask_BRS: Tensor) -> Tensor:
        (B, H, R, d), (_, J, S, _) = q.shape, k.shape
        q, k, v = q.reshape(B * J, (H // J) * R, d) * d**-0.5, k.reshape(B * J, S, d), v.reshape(B * J, S, d)
        scores = torch.bmm(q, k.transpose(1, 2))
        scores.view(B, H, R, S).add_(mask_BRS[:, None])
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shapes = (B, H, J, R, S, d)
        return torch.bmm(p, v).view(B, H, R, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        B, H, J, R, S, d = ctx.shapes
        grad = grad.reshape(q.shape)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_s = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        grad_q = torch.bmm(grad_s, k) * d**-0.5
        grad_k = torch.bmm(grad_s.transpose(1, 2), q)
        return grad_q.view(B, H, R, d), grad_k.view(B, J, S, d), grad_v.view(B, J, S, d), None


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """True -> 0, False -> -inf."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def distillation(logits: Tensor, teacher: Tensor, tokens: Tensor, soft: float) -> Tensor:
    """Cross-entropy with the target's distribution (share `soft`) and with the token it chose: [rows].

    logits F32 [rows, V]; teacher F32 [rows, V] of probabilities; tokens [rows], -1 where V has not the token.
    """
    log_q = F.log_softmax(logits, -1)
    hard = F.nll_loss(log_q, tokens, ignore_index=-1, reduction="none")
    return soft * -(teacher * log_q).sum(-1) + (1 - soft) * hard
