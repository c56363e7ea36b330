"""The MiniMax-M2 decoder layer: the one definition, in plain functions on tensors.

Calibration runs it with BF16 weights and observers, a streamed forward pass with any dtype, the engine with the
kernels of its device (`Ops`).  Order of operations and places of rounding are those of transformers' `minimax_m2`
(>= 5.18), which serves as oracle in the tests; the router is always computed in F32, as the official checkpoint
stores it.

Shapes: T tokens, D hidden, H query heads, J key/value heads, C head_dim, R rotary_dim, E experts, K experts per
token, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from m27quant.checkpoint.config import M2Config
from m27quant.kernels import router
from m27quant.kernels.rotary import rotate

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [T,H,C], k [T,J,C], v [T,J,C]) -> [T,H,C]: the attention core, k after norm and rotation, v as projected.

Whoever calls the layer decides what sequences the T tokens form, where keys and values are kept, who observes them.
"""

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [T, K], w [N, K]) -> x w^T [T, N]."""

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(x [..., D], weight [D], eps) -> [..., D]: root-mean-square norm."""

Expert = Callable[[torch.Tensor], torch.Tensor]
"""h [N, D] -> [N, D]: one expert, not yet weighted, whatever its weights are stored as."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One layer's attention: projections [out, in], norms [D], [H*C], [J*C]."""

    input_layernorm: torch.Tensor
    q_proj: torch.Tensor
    k_proj: torch.Tensor
    v_proj: torch.Tensor
    o_proj: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """One layer's router: post-attention norm [D], gate [E, D] and selection bias [E] in F32."""

    post_attention_layernorm: torch.Tensor
    gate: torch.Tensor
    e_score_correction_bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to and how much each counts: [T, K] int64 and [T, K] F32, rows sum to 1."""

    experts: torch.Tensor
    weights: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension; statistics in F32, the result in x's dtype.

    The normalised value is rounded to x's dtype before it meets the weight.  Calibration needs torch's order of
    summation, to find modelopt's ranges; inference takes kernels.rms_norm, the same in every batch and backend.
    """
    x_f32 = x.float()
    x_f32 = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x_f32.to(x.dtype)


def rotary_table(
    positions_T: torch.Tensor, config: M2Config, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, R] of rotary embedding over the first R dimensions of a head (NeoX pairing i, i + R/2)."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    inv_freq = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    angles = positions_T.float()[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qk_norm_rope(
    q_TQ: torch.Tensor,
    k_TX: torch.Tensor,
    q_norm_Q: torch.Tensor,
    k_norm_X: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections to heads [T, H, C] and [T, J, C]: the norm, which runs over all heads together, then rotation."""
    q_THC = rms_norm(q_TQ, q_norm_Q, eps).view(len(q_TQ), -1, head_dim)
    k_TJC = rms_norm(k_TX, k_norm_X, eps).view(len(k_TX), -1, head_dim)
    return rotate(q_THC, cos, sin), rotate(k_TJC, cos, sin)


@dataclass(frozen=True, slots=True)
class Ops:
    """What a layer is computed with: plain torch, or kernels that take the same arguments."""

    linear: Linear = F.linear
    norm: Norm = rms_norm
    qk_norm_rope: Callable[..., tuple[torch.Tensor, torch.Tensor]] = qk_norm_rope
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda part: part
    """The sum over all ranks of what each one computed of a layer."""


TORCH = Ops()


def attention_block(
    x_TD: torch.Tensor,
    w: AttentionWeights,
    config: M2Config,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attend: Attend,
    ops: Ops = TORCH,
) -> torch.Tensor:
    """x + attention(norm(x)), [T, D]."""
    eps = config.rms_norm_eps
    h = ops.norm(x_TD, w.input_layernorm, eps)
    q, k, v = (ops.linear(h, projection) for projection in (w.q_proj, w.k_proj, w.v_proj))
    q_THC, k_TJC = ops.qk_norm_rope(q, k, w.q_norm, w.k_norm, *rotary, config.head_dim, eps)
    out = attend(q_THC, k_TJC, v.view(len(v), -1, config.head_dim))
    return x_TD + ops.reduce(ops.linear(out.reshape(len(out), -1), w.o_proj))


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention of one sequence, grouped queries; scale C**-0.5."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def moe_input(x_TD: torch.Tensor, w: RouterWeights, config: M2Config, ops: Ops = TORCH) -> torch.Tensor:
    """What router and experts see, [T, D]."""
    return ops.norm(x_TD, w.post_attention_layernorm, config.rms_norm_eps)


def route(
    h_TD: torch.Tensor, w: RouterWeights, num_experts_per_tok: int, *, invariant: bool = False
) -> Routing:
    """Sigmoid scores in F32; the bias helps to choose, it does not weigh; chosen scores are normalised to sum 1."""
    gate, bias = w.gate.float(), w.e_score_correction_bias.float()
    return Routing(*router.route(h_TD, gate, bias, num_experts_per_tok, invariant=invariant))


def gated_activation(
    h_TD: torch.Tensor, w1_ID: torch.Tensor, w3_ID: torch.Tensor, linear: Linear = F.linear
) -> torch.Tensor:
    """silu(h w1^T) * (h w3^T), [T, I]: what an expert's w2 sees."""
    return F.silu(linear(h_TD, w1_ID)) * linear(h_TD, w3_ID)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tokens that are routed to one expert: their rows and weights."""

    rows: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Assignments:
    """What each of E experts gets of some tokens: two tensors for all, sorted by expert, then by token."""

    rows: torch.Tensor
    weights: torch.Tensor
    bounds: list[int]
    """[E + 1]: expert e has the elements from bounds[e] to bounds[e + 1]."""

    def __getitem__(self, expert: int) -> Assignment:
        part = slice(self.bounds[expert], self.bounds[expert + 1])
        return Assignment(self.rows[part], self.weights[part])

    @property
    def num_tokens(self) -> list[int]:
        """Per expert how many tokens it gets."""
        return [end - begin for begin, end in pairwise(self.bounds)]


def assignments(routing: Routing, num_experts: int) -> Assignments:
    """Sort a routing by expert, keeping the order of tokens."""
    flat = routing.experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    rows = order // routing.experts.shape[1]
    return Assignments(rows, routing.weights.reshape(-1)[order], [0, *accumulate(counts)])


def add_expert(
    y_TD: torch.Tensor,
    act_NI: torch.Tensor,
    w2_DI: torch.Tensor,
    to: Assignment,
    linear: Linear = F.linear,
) -> None:
    """Add one expert's weighted output for its N tokens to y, in y's dtype."""
    add_output(y_TD, linear(act_NI, w2_DI), to)


def add_output(y_TD: torch.Tensor, out_ND: torch.Tensor, to: Assignment) -> None:
    """Weigh what an expert gave for its N tokens and add it to y, in y's dtype."""
    y_TD.index_add_(0, to.rows, (out_ND * to.weights[:, None]).to(y_TD.dtype))
