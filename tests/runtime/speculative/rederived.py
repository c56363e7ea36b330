"""The mathematics of drafters written down a second time, from their formulas alone: float64, no cache, head by head.

Nothing of the program is used here.  Everything is computed over the whole history at once, one query at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, position: int, inv_freq: Tensor, factor: float = 1.0) -> Tensor:
    """One head [C] at one position: (x_i, x_{i + C/2}) turned by position * inv_freq_i, scaled by factor."""
    half = len(x) // 2
    angle = position * inv_freq
    a, b = x[:half], x[half:]
    return factor * torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def plain_inv_freq(head_dim: int, theta: float) -> Tensor:
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)


def yarn_inv_freq(
    head_dim: int, theta: float, factor: float, original: int, fast: float, slow: float
) -> tuple[Tensor, float]:
    """Equations 17 to 23 of arXiv:2309.00071 with the corrections of its code: (frequencies, temperature)."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), head_dim - 1)
    frequencies = []
    for i in range(head_dim // 2):
        ramp = min(1.0, max(0.0, (i - low) / (max(high - low, 0.001))))
        f = theta ** (-2 * i / head_dim)
        frequencies.append((1 - ramp) * f + ramp * f / factor)
    return torch.tensor(frequencies, dtype=torch.float64), 0.1 * math.log(factor) + 1


def softmax_sum(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = torch.stack([query @ k for k in keys]) * len(query) ** -0.5
    return torch.softmax(scores, 0) @ torch.stack(values)


def swiglu(x: Tensor, t: Tensors, prefix: str, eps: float) -> Tensor:
    h = rms(x, t[f"{prefix}post_attention_layernorm.weight"], eps)
    gate, up = t[f"{prefix}mlp.gate_proj.weight"] @ h, t[f"{prefix}mlp.up_proj.weight"] @ h
    return x + t[f"{prefix}mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


class Heads:
    """Splitting one projection into heads, norm and rotation included."""

    def __init__(self, config: dict[str, Any], inv_freq: Tensor, factor: float = 1.0) -> None:
        self.dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.groups = config["num_attention_heads"] // config["num_key_value_heads"]
        self.inv_freq, self.factor = inv_freq, factor

    def turned(self, projected: Tensor, position: int, weight: Tensor | None) -> list[Tensor]:
        heads = projected.split(self.dim)
        if weight is not None:
            heads = tuple(rms(h, weight, self.eps) for h in heads)
        return [turn(h, position, self.inv_freq, self.factor) for h in heads]

    def attend(self, queries: list[Tensor], keys: list[list[Tensor]], values: list[list[Tensor]]) -> Tensor:
        """keys and values: of each visible position its heads."""
        out = []
        for h, q in enumerate(queries):
            j = h // self.groups
            out.append(softmax_sum(q, [k[j] for k in keys], [v[j] for v in values]))
        return torch.cat(out)


def dflash_block(
    config: dict[str, Any], tensors: Tensors, embed: Tensor, taps: Tensor, anchor: int, rows: int, mask_token: int,
    heads: Heads, visible: Any = None,
) -> Tensor:  # fmt: skip
    """Final normed hidden states [rows, D] of the block behind len(taps) positions.

    visible(layer, row, position) says which absolute positions a row sees; all of them where None.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    eps, n = config["rms_norm_eps"], len(taps)
    context = [rms(t["fc.weight"] @ x, t["hidden_norm.weight"], eps) for x in taps.double()]
    ids = [anchor] + [mask_token] * (rows - 1)
    x = [embed[i].double() for i in ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"layers.{layer}."
        q, k, v = (t[f"{p}self_attn.{name}_proj.weight"] for name in "qkv")
        q_norm, k_norm = (t[f"{p}self_attn.{name}_norm.weight"] for name in "qk")
        inputs = [rms(row, t[f"{p}input_layernorm.weight"], eps) for row in x]
        sources = context + inputs
        keys = [heads.turned(k @ s, position, k_norm) for position, s in enumerate(sources)]
        values = [list((v @ s).split(heads.dim)) for s in sources]
        new = []
        for row, h in enumerate(inputs):
            seen = [i for i in range(n + rows) if visible is None or visible(layer, row, i)]
            queries = heads.turned(q @ h, n + row, q_norm)
            out = heads.attend(queries, [keys[i] for i in seen], [values[i] for i in seen])
            new.append(swiglu(x[row] + t[f"{p}self_attn.o_proj.weight"] @ out, t, p, eps))
        x = new
    return torch.stack([rms(row, t["norm.weight"], eps) for row in x])


class Eagle3:
    """An EAGLE3 head over one sequence; a node is computed from its whole path, with no cache at all."""

    def __init__(
        self, config: dict[str, Any], tensors: Tensors, embed: Tensor, head: Tensor, tokens: list[int], taps: Tensor,
        heads: Heads, prefix: str = "midlayer.", *, norm_before_residual: bool = False, norm_output: bool = False,
    ) -> None:  # fmt: skip
        self.t = {n.replace(prefix, ""): x.double() for n, x in tensors.items() if x.is_floating_point()}
        self.embed, self.head, self.heads, self.eps = (
            embed.double(),
            head.double(),
            heads,
            config["rms_norm_eps"],
        )
        self.norm_before_residual, self.norm_output = norm_before_residual, norm_output
        features = [self.feature(x) for x in taps.double()]
        self.slots = [(tokens[i + 1], g) for i, g in enumerate(features)]

    def feature(self, x: Tensor) -> Tensor:
        norms = [n for n in sorted(self.t) if n.startswith("fc_norm.")]
        if norms:
            x = torch.cat(
                [rms(part, self.t[n], self.eps) for part, n in zip(x.chunk(len(norms)), norms, strict=True)]
            )
        if "input_norm.weight" in self.t:
            x = rms(x, self.t["input_norm.weight"], self.eps)
        return self.t["fc.weight"] @ x

    def forward(self, slots: list[tuple[int, Tensor]]) -> Tensor:
        """Output of the last of some slots, which all see those before them."""
        keys, values = [], []
        for position, (token, hidden) in enumerate(slots):
            e = rms(self.embed[token], self.t["input_layernorm.weight"], self.eps)
            g = rms(hidden, self.t["hidden_norm.weight"], self.eps)
            u = torch.cat((e, g))
            keys.append(self.heads.turned(self.t["self_attn.k_proj.weight"] @ u, position, None))
            values.append(list((self.t["self_attn.v_proj.weight"] @ u).split(self.heads.dim)))
        queries = self.heads.turned(self.t["self_attn.q_proj.weight"] @ u, len(slots) - 1, None)
        out = self.t["self_attn.o_proj.weight"] @ self.heads.attend(queries, keys, values)
        residual = g if self.norm_before_residual else slots[-1][1]
        return swiglu(residual + out, self.t, "", self.eps)

    def after(self, path: list[int]) -> tuple[Tensor, Tensor]:
        """(hidden state, log probabilities over the head) behind the drafted tokens of a path."""
        slots = list(self.slots)
        hidden = self.forward(slots)
        for token in path:
            fed = rms(hidden, self.t["norm.weight"], self.eps) if self.norm_output else hidden
            slots.append((token, fed))
            hidden = self.forward(slots)
        logits = self.head @ rms(hidden, self.t["norm.weight"], self.eps)
        return hidden, torch.log_softmax(logits, 0)


def draft_tree(
    log_probs: Any, num_steps: int, topk: int, num_draft_tokens: int, token_of: Any
) -> tuple[list[int], list[int]]:
    """SGLang's tree, told as a list of nodes: (tokens, parents) of the num_draft_tokens - 1 kept.

    log_probs(path of target tokens) -> [V].  Every node knows its whole path; nothing is indexed by arithmetic.
    """
    nodes: list[dict[str, Any]] = []

    def children(path: list[int], score: float, parent: int) -> list[int]:
        row = log_probs(path).tolist()
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:topk]
        made = []
        for i in best:
            made.append(len(nodes))
            nodes.append(
                {
                    "token": token_of(i),
                    "path": [*path, token_of(i)],
                    "score": score + row[i],
                    "parent": parent,
                }
            )
        return made

    frontier = children([], 0.0, -1)
    for _ in range(num_steps - 1):
        level = [c for n in frontier for c in children(nodes[n]["path"], nodes[n]["score"], n)]
        frontier = sorted(level, key=lambda n: (-nodes[n]["score"], n))[:topk]
    kept = sorted(sorted(range(len(nodes)), key=lambda n: (-nodes[n]["score"], n))[: num_draft_tokens - 1])
    place = {n: i for i, n in enumerate(kept)} | {-1: -1}
    return [nodes[n]["token"] for n in kept], [place[nodes[n]["parent"]] for n in kept]
