"""AdamW for everything, or Muon for the matrices and AdamW for the rest; F32 masters behind compute copies.

Muon (Keller Jordan, 2024; `torch.optim.Muon`): the momentum of a matrix is orthogonalised, so that every direction
learns at the same pace.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.95), 1e-8
NOT_MUON = ("lm_head.weight",)
"""Matrices whose rows belong to tokens: their directions have paces of their own."""


class DrafterOptimizer:
    """Owns the F32 `masters` and keeps the compute `copies` equal to them.

    Args:
        masters: the parameters, F32.
        dtype: of the copies that the loss is computed with; the masters themselves where it is F32.
        kind: "adamw" or "muon".
        lr: of matrices with Muon, of everything with AdamW.
        adam_lr: with Muon, of all else.
        weight_decay: decoupled, of matrices.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        kind: str,
        lr: float,
        adam_lr: float,
        weight_decay: float,
    ) -> None:
        self.masters = {name: w.requires_grad_(False) for name, w in masters.items()}
        matrices = [n for n, w in masters.items() if w.ndim == 2 and (kind == "adamw" or n not in NOT_MUON)]
        others = [n for n in masters if n not in matrices]
        self._groups: list[tuple[torch.optim.Optimizer, float]] = []
        adam = {"betas": BETAS, "eps": EPS, "fused": True}
        if kind == "muon":
            muon = torch.optim.Muon(
                self._of(matrices), lr, weight_decay, momentum=MOMENTUM, adjust_lr_fn="original"
            )
            rest = torch.optim.AdamW(self._of(others), adam_lr, weight_decay=0.0, **adam)  # type: ignore[arg-type]
            self._groups = [(muon, lr), (rest, adam_lr)]
        else:
            groups = [
                {"params": self._of(matrices), "weight_decay": weight_decay},
                {"params": self._of(others), "weight_decay": 0.0},
            ]
            self._groups = [(torch.optim.AdamW(groups, lr, **adam), lr)]  # type: ignore[arg-type]
        self.copies = {n: w.to(dtype).detach().requires_grad_() for n, w in self.masters.items()}

    def _of(self, names: list[str]) -> list[Tensor]:
        return [self.masters[name] for name in names]

    def step(self, grads: Mapping[str, Tensor], scale: float) -> None:
        """Apply F32 gradients at `scale` times the learning rates."""
        for name, grad in grads.items():
            self.masters[name].grad = grad
        for optimizer, lr in self._groups:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for name, copy in self.copies.items():
            copy.copy_(self.masters[name])  # of F32, onto itself

    def state(self) -> dict[str, Tensor]:
        """All that has to be kept, by flat names: `master/NAME`, `exp_avg/NAME`, ..."""
        found = {f"master/{name}": master for name, master in self.masters.items()}
        for optimizer, _ in self._groups:
            for name, master in self.masters.items():
                if master in optimizer.state:
                    found |= {f"{key}/{name}": value for key, value in optimizer.state[master].items()}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        owner = {
            id(p): optimizer
            for optimizer, _ in self._groups
            for g in optimizer.param_groups
            for p in g["params"]
        }
        for flat, tensor in state.items():
            key, _, name = flat.partition("/")
            master = self.masters[name]
            if key == "master":
                master.copy_(tensor)
            else:
                device = "cpu" if key == "step" and master.device.type == "cpu" else master.device
                owner[id(master)].state[master][key] = tensor.to(device)
        self._copy()


def global_norm(grads: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, F32 []."""
    norms = torch._foreach_norm(list(grads.values()))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
