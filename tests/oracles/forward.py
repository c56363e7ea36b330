"""MiniMax-M2 written down once more, in F32 and without anything of the package: the oracle of the runtime.

One sequence, one expert, one head at a time, from the tensors as they lie on disk; NVFP4 by numpy from the format's
description.  What is rounded on the way is the caller's business, except for NVFP4 activations.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def unpack(weight: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """NVFP4 to F32."""
    codes = weight.numpy()
    values = np.empty((codes.shape[0], 2 * codes.shape[1]), dtype=np.float32)
    signed = np.concatenate((E2M1, -E2M1))
    values[:, 0::2], values[:, 1::2] = signed[codes & 15], signed[codes >> 4]
    blocks = scale.float().numpy() * scale_2.numpy()
    return torch.from_numpy(values * np.repeat(blocks, 16, axis=1))


def nvfp4_activation(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] as a W4A4 product sees it: E2M1 values under E4M3 block scales under one global scale.

    Also which rows [T] are so near to another rounding that the last bits of x decide.
    """
    one = np.float32(1)
    s = input_scale.numpy().astype(np.float32)
    groups = x.numpy().reshape(len(x), -1, 16)
    wanted = np.abs(groups).max(-1) * ((one / s) * (one / np.float32(6)))
    scale = _e4m3(wanted)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factor = np.minimum(one / (scale * (one / (one / s))), np.finfo(np.float32).max)
        scaled = np.abs(groups * factor[..., None])
    codes = _e2m1_codes(scaled)
    values = np.copysign(E2M1[codes], groups) * (scale * s)[..., None]
    near = [(scale != _e4m3(wanted * n))[..., None] | (codes != _e2m1_codes(scaled * n)) for n in NEAR]
    undecided = np.logical_or(*near).reshape(len(x), -1).any(1)
    return torch.from_numpy(values.reshape(x.shape).astype(np.float32)), torch.from_numpy(undecided)


NEAR = (np.float32(1 - 1e-5), np.float32(1 + 1e-5))


def _e4m3(x: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = torch.from_numpy(np.minimum(x, 448)).to(torch.float8_e4m3fn).float().numpy()
    return rounded


def _e2m1_codes(scaled: np.ndarray) -> np.ndarray:
    """The nearest value's code; of two as near the even one."""
    distance = np.abs(scaled[..., None] - E2M1)
    nearest = distance.min(-1, keepdims=True) == distance
    codes: np.ndarray = np.where(nearest, np.arange(8) + 100 * (np.arange(8) % 2), 999).argmin(-1)
    return codes


class Forward:
    """A checkpoint's layers, one after the other or each by itself."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any], *, activations: str) -> None:
        self.t, self.c, self.activations = tensors, config, activations
        self.undecided = torch.empty(0, dtype=torch.bool)
        """[T]: rows whose last experts rounded what lay in the middle."""

    def logits(self, ids: Tensor) -> Tensor:
        """[T, V] with an exact cache."""
        x = self.t["model.embed_tokens.weight"].float()[ids]
        for layer in range(self.c["num_hidden_layers"]):
            x = x + self.attention(x, layer, *self.keys_and_values(x, layer))
            x = x + self.experts(x, layer)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        return self._norm(x, "model.norm") @ self.t["lm_head.weight"].float().T

    def keys_and_values(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """[T, J, C] each, before they are rounded for the cache."""
        a = f"model.layers.{layer}.self_attn."
        h = self._norm(x, f"model.layers.{layer}.input_layernorm")
        k = self._norm(h @ self.t[f"{a}k_proj.weight"].float().T, a + "k_norm")
        v = h @ self.t[f"{a}v_proj.weight"].float().T
        size = self.c["head_dim"]
        keys = [self._rotated(part) for part in k.split(size, dim=1)]
        return torch.stack(keys, 1), torch.stack(v.split(size, dim=1), 1)

    def attention(self, x: Tensor, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """What the layer's attention adds to x, with these keys and values."""
        a = f"model.layers.{layer}.self_attn."
        h = self._norm(x, f"model.layers.{layer}.input_layernorm")
        q = self._norm(h @ self.t[f"{a}q_proj.weight"].float().T, a + "q_norm")
        size, group = self.c["head_dim"], self.c["num_attention_heads"] // self.c["num_key_value_heads"]
        mask = torch.full((len(x), len(x)), -math.inf).triu(1)
        heads = []
        for head, part in enumerate(q.split(size, dim=1)):
            scores = self._rotated(part) @ k[:, head // group].T / math.sqrt(size) + mask
            heads.append(scores.softmax(-1) @ v[:, head // group])
        return torch.cat(heads, 1) @ self.t[a + "o_proj.weight"].float().T

    def experts(self, x: Tensor, layer: int) -> Tensor:
        """What the layer's experts add to x."""
        m = f"model.layers.{layer}.block_sparse_moe."
        h = self._norm(x, f"model.layers.{layer}.post_attention_layernorm")
        scores = 1 / (1 + torch.exp(-(h @ self.t[m + "gate.weight"].float().T)))
        biased = scores + self.t[m + "e_score_correction_bias"].float()
        self.undecided = torch.zeros(len(x), dtype=torch.bool)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            order = biased[token].argsort(descending=True, stable=True)
            chosen = order[: self.c["num_experts_per_tok"]].tolist()
            total = scores[token][chosen].sum()
            for e in chosen:
                part = self._expert(h[token : token + 1], f"{m}experts.{e}.", token)
                out[token] += (scores[token][e] / total * part)[0]
        return out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = (x.double() ** 2).mean(-1, keepdim=True) + self.c["rms_norm_eps"]
        return (x.double() / mean.sqrt()).float() * self.t[f"{name}.weight"].float()

    def _rotated(self, x: Tensor) -> Tensor:
        """x [T, C]: one head, turned as complex numbers."""
        r = self.c["rotary_dim"]
        frequency = self.c["rope_theta"] ** (-2.0 * torch.arange(r // 2) / r)
        angle = torch.arange(len(x))[:, None] * frequency
        turned = torch.complex(x[:, : r // 2], x[:, r // 2 : r]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag, x[:, r:]), dim=1).float()

    def _expert(self, h: Tensor, e: str, token: int) -> Tensor:
        gate, up = (self._input(h, e + n, token) @ self._matrix(e + n).T for n in ("w1", "w3"))
        act = gate / (1 + torch.exp(-gate)) * up
        return self._input(act, e + "w2", token) @ self._matrix(e + "w2").T

    def _input(self, x: Tensor, module: str, token: int) -> Tensor:
        if self.activations == "bf16":
            return x
        x, undecided = nvfp4_activation(x, self.t[f"{module}.input_scale"])
        self.undecided[token] |= undecided[0]
        return x

    @functools.cache  # noqa: B019 - lives as long as a test
    def _matrix(self, module: str) -> Tensor:
        weight = self.t[f"{module}.weight"]
        if weight.dtype != torch.uint8:
            return weight.float()
        return unpack(weight, self.t[f"{module}.weight_scale"], self.t[f"{module}.weight_scale_2"])
