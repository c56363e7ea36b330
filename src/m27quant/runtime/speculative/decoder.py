"""The decoder layer of drafters (Qwen3's and Llama's), in the pieces that DFlash and EAGLE3 put together differently.

Shapes: T rows, D hidden (2D for EAGLE3's projections), H query heads, J key/value heads, C head_dim, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels.linear import linear
from m27quant.kernels.rms_norm import rms_norm
from m27quant.kernels.rotary import rotate

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Projections [out, in] and norms, named as in the checkpoint; q_norm and k_norm [C] are Qwen3's."""

    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What a drafter borrows from its target, or brings itself."""

    embed: Tensor
    """[V, D]: every token of the target."""
    head: Tensor
    """[W, D]: W is the size of the draft vocabulary."""
    draft_to_target: Tensor | None
    """int64 [W]: the token that each row of the head stands for; None where row and token are one."""

    def embedded(self, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, D]."""
        return F.embedding(tokens_T, self.embed).to(dtype)

    def tokens(self, rows: Tensor) -> Tensor:
        """Rows of the head as tokens of the target, any shape."""
        return rows if self.draft_to_target is None else self.draft_to_target[rows]


def query(h_TD: Tensor, w: LayerWeights, head_dim: int, eps: float, rotary: Rotary) -> Tensor:
    """Normed per head where the layer has such norms, then rotated: [T, H, C]."""
    return _turned(linear(h_TD, w.q_proj), w.q_norm, head_dim, eps, rotary)


def key_value(
    h_TD: Tensor, w: LayerWeights, head_dim: int, eps: float, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Keys as queries, values as projected: both [T, J, C]."""
    k = _turned(linear(h_TD, w.k_proj), w.k_norm, head_dim, eps, rotary)
    return k, linear(h_TD, w.v_proj).view(len(h_TD), -1, head_dim)


def _turned(x: Tensor, norm: Tensor | None, head_dim: int, eps: float, rotary: Rotary) -> Tensor:
    heads = x.view(len(x), -1, head_dim)
    if norm is not None:
        heads = rms_norm(heads, norm, eps)
    return rotate(heads, *rotary)


def mlp(x_TD: Tensor, w: LayerWeights, eps: float) -> Tensor:
    """x + SwiGLU(norm(x)), [T, D]."""
    h = rms_norm(x_TD, w.post_attention_layernorm, eps)
    return x_TD + linear(F.silu(linear(h, w.gate_proj)) * linear(h, w.up_proj), w.down_proj)
