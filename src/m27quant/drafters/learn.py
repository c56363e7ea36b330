"""One step of training: the batch's part of this rank, loss and gradient, their sum over ranks, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m27quant.drafters.batch import Batch, Drafting, LossReport
from m27quant.drafters.collate import batch_of
from m27quant.drafters.distributed import add_up
from m27quant.drafters.optimizer import DrafterOptimizer, global_norm
from m27quant.drafters.order import Drawn, generator_of
from m27quant.drafters.prepare import Prepared
from m27quant.drafters.samples import Sample
from m27quant.drafters.schedule import lr_scale
from m27quant.drafters.states import TargetStates
from m27quant.runtime.parallel import Ranks


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step found, over all ranks."""

    loss: float
    position_loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    """Of each position: how often the first choice is the token that follows."""
    c_k: tuple[float, ...]
    """How often it is so there and at all positions before."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    is_empty: bool
    """No token of the batch can be drafted: nothing was learned."""
    stop: int
    """The signal by which some rank was asked to stop; 0: none was."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def what_is_wrong(self) -> str:
        return "gradient" if math.isfinite(self.loss) else "loss"

    def to_json(self) -> dict[str, Any]:
        """For the log; every figure in full, so that two runs can be compared."""
        return {
            "loss": self.loss, "position_loss": list(self.position_loss), "accuracy": list(self.accuracy),
            "c_k": list(self.c_k), "lr": self.lr, "grad_norm": self.grad_norm, "tokens": self.tokens,
        }  # fmt: skip


class Learner:
    """The drafter while it learns."""

    def __init__(
        self,
        plan: Prepared,
        drafting: Drafting,
        states: TargetStates,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.plan, self.drafting, self.states, self.ranks = plan, drafting, states, ranks
        self.device, self.dtype = device, dtype
        recipe = plan.recipe
        masters = (
            drafting.init(torch.Generator().manual_seed(recipe.seed))
            if plan.start is None
            else plan.start.weights
        )
        self.optimizer = DrafterOptimizer(
            {name: w.to(device, copy=True) for name, w in masters.items()}, dtype, kind=recipe.optimizer, lr=recipe.lr,
            adam_lr=recipe.adam_lr, weight_decay=recipe.weight_decay,
        )  # fmt: skip

    @property
    def params(self) -> dict[str, Tensor]:
        """What the loss is computed with."""
        return self.optimizer.copies

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Samples with the target's states of them."""
        states = self.states.of(samples, self.plan.recipe.shape.hidden_states)
        return batch_of(samples, states, dtype=self.dtype, device=self.device)

    def step(self, step: int, *, stop: int = 0) -> StepReport:
        """Learn from batch `step`; where loss or gradient is not finite, or nothing counts, nothing is changed."""
        recipe, plan = self.plan.recipe, self.plan
        drawn = plan.order.batch(step)
        grads, sums = self._gradients(drawn, step)
        tokens = sum(len(plan.samples[d.index]) for d in drawn)
        sums = torch.cat([sums, torch.tensor([stop, stop != 0], dtype=torch.float64)])
        if self.ranks.size > 1:
            add_up(grads.values(), self.ranks)
            on_device = sums.to(self.device)
            add_up([on_device], self.ranks)
            sums = on_device.cpu()
        weight, total, *places, signals, stopped = sums.tolist()
        grad_norm = (global_norm(grads) / (weight or 1.0)).item()
        scale = lr_scale(step, plan.steps, recipe.warmup, recipe.schedule)
        stopping = round(signals / stopped) if stopped else 0
        report = _report(weight, total, places, grad_norm, recipe.lr * scale, tokens, stopping)
        if report.is_finite and weight:
            torch._foreach_mul_(list(grads.values()), min(1.0, recipe.clip / (grad_norm + 1e-6)) / weight)
            self.optimizer.step(grads, scale)
        return report

    def _gradients(self, drawn: Sequence[Drawn], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """F32 gradients of the summed loss, and the sums that a report is made of (F64, CPU)."""
        size, total = self.plan.recipe.batch_size, None
        grads: dict[str, Tensor] = {}
        for part in range(self.ranks.rank, len(drawn) // size, self.ranks.size):
            chosen = drawn[part * size : (part + 1) * size]
            report = self._loss(chosen, step)
            found = torch.autograd.grad(report.loss * report.weight, list(self.params.values()))
            for name, grad in zip(self.params, found, strict=True):
                grads[name] = grads[name].add_(grad) if name in grads else grad.float()
            sums = _sums(report)
            total = sums if total is None else total + sums
        assert total is not None
        return grads, total.cpu()

    def _loss(self, drawn: Sequence[Drawn], step: int) -> LossReport:
        batch = self.batch([self.plan.samples[d.index] for d in drawn])
        generators = [generator_of(self.plan.recipe.seed, d) for d in drawn]
        return self.drafting.loss(self.params, batch, generators, step)


def _sums(report: LossReport) -> Tensor:
    """[2 + 4 P]: weight, loss, then losses, hits, chains and counts of the positions; F64."""
    parts = [report.weight.reshape(1), (report.loss.detach() * report.weight).reshape(1)]
    parts += [report.losses_P, report.hits_P, report.chains_P, report.counts_P]
    return torch.cat([part.detach().double() for part in parts])


def _report(
    weight: float, total: float, places: list[float], grad_norm: float, lr: float, tokens: int, stop: int
) -> StepReport:
    P = len(places) // 4
    losses, hits, chains, counts = (places[k * P : (k + 1) * P] for k in range(4))

    def mean(sums: list[float]) -> tuple[float, ...]:
        return tuple(s / n if n else 0.0 for s, n in zip(sums, counts, strict=True))

    loss = total / (weight or 1.0)
    return StepReport(
        loss, mean(losses), mean(hits), mean(chains), grad_norm, lr, tokens, is_empty=not weight, stop=stop
    )
