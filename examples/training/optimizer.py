"""Muon for the matrices, Adam for the rest; F32 masters behind compute copies.

Muon (Keller Jordan, 2024): the momentum of a matrix is orthogonalised by five Newton-Schulz steps, so that
every direction learns at the same pace.  Equal shapes go through as one batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MATRICES = ("q", "k", "v", "o", "w13", "w2")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor) -> Tensor:
    """[..., R, C] -> nearly the closest semi-orthogonal matrices, F32; computed in BF16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Owns the F32 `masters` and keeps the compute `copies` equal to them."""

    def __init__(
        self, masters: dict[str, Tensor], copies: dict[str, Tensor], muon_lr: float, adam_lr: float
    ) -> None:
        self.masters, self.copies, self.muon_lr, self.adam_lr = masters, copies, muon_lr, adam_lr
        self.first = {name: torch.zeros_like(w) for name, w in masters.items()}
        self.second = {name: torch.zeros_like(w) for name, w in masters.items() if not self.is_matrix(name)}
        self.num_steps = 0

    @staticmethod
    def is_matrix(name: str) -> bool:
        return name.split(".")[-1] in MATRICES

    def step(self, grads: dict[str, Tensor], lr_scale: float) -> float:
        """Apply F32 gradients to masters and copies; returns their global norm."""
        self.num_steps += 1
        norm = torch.sqrt(torch.stack([g.square().sum() for g in grads.values()]).sum()).item()
        self._muon({name: g for name, g in grads.items() if self.is_matrix(name)}, lr_scale * self.muon_lr)
        clip = min(1.0, 1.0 / (norm + 1e-6))
        self._adam(
            {name: g * clip for name, g in grads.items() if not self.is_matrix(name)}, lr_scale * self.adam_lr
        )
        for name, copy in self.copies.items():
            copy.data.copy_(self.masters[name])
        return norm

    def _muon(self, grads: dict[str, Tensor], lr: float, weight_decay: float = 0.1) -> None:
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name, grad in grads.items():
            momentum = self.first[name].lerp_(grad, 0.05)
            update = grad.lerp(momentum, 0.95)
            if name.endswith("w13"):  # gate and up are matrices of their own
                update = update.view(2 * update.shape[0], -1, update.shape[2])
            groups.setdefault(tuple(update.shape[-2:]), []).append(
                (name, update.reshape(-1, *update.shape[-2:]))
            )
        for (rows, columns), members in groups.items():
            directions = orthogonalise(torch.cat([update for _, update in members]))
            scaled = lr * max(1.0, rows / columns) ** 0.5
            split = directions.split([len(update) for _, update in members])
            for (name, _), direction in zip(members, split, strict=True):
                master = self.masters[name]
                master.mul_(1 - lr * weight_decay).add_(direction.reshape(master.shape), alpha=-scaled)

    def _adam(self, grads: dict[str, Tensor], lr: float, beta1: float = 0.9, beta2: float = 0.95) -> None:
        for name, grad in grads.items():
            m = self.first[name].lerp_(grad, 1 - beta1) / (1 - beta1**self.num_steps)
            v = self.second[name].lerp_(grad.square(), 1 - beta2) / (1 - beta2**self.num_steps)
            self.masters[name].addcdiv_(m, v.sqrt().add_(1e-8), value=-lr)

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "num_steps": self.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, tensor in state["first"].items():
            self.first[name].copy_(tensor)
        for name, tensor in state["second"].items():
            self.second[name].copy_(tensor)
        self.num_steps = state["num_steps"]
