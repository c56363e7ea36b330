"""Train a drafter for tiny-m27 on what drafter_data.py wrote.  Seeded, resumable, on a CPU.

python train_drafter.py dflash --data build/drafters
python train_drafter.py eagle3 --data build/drafters
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dflash
import eagle3
import torch
from dflash import Target
from drafter_acceptance import walk
from drafter_data import TAPS, Group
from fp8_checkpoint import read_weights
from model import ModelConfig, Parameters
from optimizer import Optimizer
from torch import Tensor

ANCHORS = {8: 12, 16: 6}
"""Block size -> anchors per sequence; steps alternate, so that one drafter serves both sizes."""
GAMMA = 5.0
NUM_STEPS, DECAY = 3, 0.8
SOFT = 0.5
DRAFT_VOCAB = 1280
EVALUATED = 8


class DrafterOptimizer(Optimizer):
    """Muon for the projections, Adam for norms and head."""

    @staticmethod
    def is_matrix(name: str) -> bool:
        return not name.endswith("norm.weight") and name != "lm_head.weight"


def features(group: Group, rows: Tensor, hidden_states: tuple[int, ...]) -> Tensor:
    """The tapped hidden states of some rows, [B, T, F]."""
    D = group.taps.shape[-1] // len(TAPS)
    parts = [group.taps[rows, :, (i := TAPS.index(h)) * D : (i + 1) * D] for h in hidden_states]
    return torch.cat(parts, -1)


@dataclass(frozen=True, slots=True)
class DFlash:
    """What the loop asks of a kind of drafter."""

    target: Target

    def init(self, seed: int) -> Parameters:
        return dflash.init_dflash(seed)

    def loss(
        self, p: Parameters, group: Group, rows: Tensor, generator: torch.Generator, step: int
    ) -> Tensor:
        block = (8, 16)[step % 2]
        free = group.ids.shape[1] - 1 - group.prompt_len
        order = [torch.randperm(free, generator=generator)[: ANCHORS[block]] for _ in rows]
        anchors = torch.stack(order) + group.prompt_len
        taps = features(group, rows, dflash.HIDDEN_STATES)
        ids, final = group.ids[rows], group.final[rows]
        return dflash.loss(p, taps, ids, final, anchors, block, self.target, GAMMA, SOFT)

    def measure(self, p: Parameters, heldout: Group, rows: Tensor) -> dict[str, float]:
        ids, taps = heldout.ids[rows], features(heldout, rows, dflash.HIDDEN_STATES)
        found = {}
        for block in ANCHORS:
            hits = dflash.accepted(p, taps, ids, heldout.prompt_len, block, self.target)
            found[f"tau_block_{block}"] = walk(hits, heldout.prompt_len, block - 1).tau
        return found

    def tables(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, slots=True)
class Eagle3:
    """What the loop asks of a kind of drafter."""

    target: Target
    vocabulary: Tensor

    def init(self, seed: int) -> Parameters:
        return eagle3.init_eagle3(seed, self.target.head[self.vocabulary])

    def loss(
        self, p: Parameters, group: Group, rows: Tensor, generator: torch.Generator, step: int
    ) -> Tensor:
        taps, ids, final = features(group, rows, eagle3.HIDDEN_STATES), group.ids[rows], group.final[rows]
        settings = (self.vocabulary, self.target, NUM_STEPS, DECAY, SOFT)
        return eagle3.loss(p, taps, ids, final, group.prompt_len, *settings)

    def measure(self, p: Parameters, heldout: Group, rows: Tensor) -> dict[str, float]:
        ids, taps = heldout.ids[rows], features(heldout, rows, eagle3.HIDDEN_STATES)
        hits = eagle3.accepted(p, taps, ids, heldout.prompt_len, 3, self.vocabulary, self.target)
        return {"tau_chain_3": walk(hits, heldout.prompt_len, 3).tau}

    def tables(self) -> dict[str, Tensor]:
        """d2t holds offsets; t2d marks the tokens it leads to."""
        marks = torch.zeros(len(self.target.head), dtype=torch.bool)
        marks[self.vocabulary] = True
        return {"d2t": self.vocabulary - torch.arange(len(self.vocabulary)), "t2d": marks}


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the state whole: a reader sees the old one or the new one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def lr_scale(step: int, steps: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last part."""
    return min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (decay * steps))


def train(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Run to the last step; yields one record per report."""
    masters, _ = read_weights(args.checkpoint, ModelConfig())
    target = Target(masters["embed"].bfloat16(), masters["head"].bfloat16())
    groups = [Group.load(path) for path in sorted(args.data.glob("train-*.pt"))]
    heldout = Group.load(args.data / "heldout.pt")
    kind: DFlash | Eagle3 = DFlash(target)
    if args.kind == "eagle3":
        text = torch.cat([group.ids[:, group.prompt_len :].flatten() for group in groups])
        kind = Eagle3(target, eagle3.draft_vocabulary(text, len(target.head), DRAFT_VOCAB))
    masters, step, before = kind.init(args.seed), 0, 0.0
    state_path = args.data / f"{args.kind}.pt"
    state = torch.load(state_path) if args.resume else None
    if state:
        masters, step, before = state["masters"], state["step"], state["seconds"]
    params = {name: w.bfloat16().requires_grad_() for name, w in masters.items()}
    optimizer = DrafterOptimizer(masters, params, args.muon_lr, args.adam_lr)
    if state:
        optimizer.load_state(state["optimizer"])
    order: Callable[[int], torch.Generator] = torch.Generator().manual_seed
    losses, started = [], time.monotonic()
    while step < args.steps:
        generator = order(args.seed * 1_000_003 + step)
        group = groups[int(torch.randint(len(groups), (), generator=generator))]
        rows = torch.randperm(len(group.ids), generator=generator)[: args.batch_size]
        loss = kind.loss(params, group, rows, generator, step)
        grads = torch.autograd.grad(loss, list(params.values()))
        scale = lr_scale(step, args.steps, args.decay)
        optimizer.step(dict(zip(params, (g.float() for g in grads), strict=True)), scale)
        step += 1
        losses.append(loss.detach())
        if step % args.report_every and step < args.steps:
            continue
        seconds = before + time.monotonic() - started
        record = {"step": step, "seconds": seconds, "loss": torch.stack(losses).mean().item()}
        losses = []
        some = torch.arange(0, len(heldout.ids), len(heldout.ids) // EVALUATED)
        record |= kind.measure(params, heldout, some)
        save(state_path, {"masters": masters, "step": step, "seconds": seconds, "optimizer": optimizer.state(),
                          "tables": kind.tables()})  # fmt: skip
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a drafter for tiny-m27.")
    parser.add_argument("kind", choices=("dflash", "eagle3"))
    parser.add_argument(
        "--data", type=Path, default=Path("build/drafters"), help="what drafter_data.py wrote"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/tiny-m27"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument(
        "--decay", type=float, default=0.6, help="last part of the steps, in which the rate falls"
    )
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the folder's state")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with (args.data / f"{args.kind}.jsonl").open("a" if args.resume else "w", encoding="utf-8") as log:
        for record in train(args):
            line = json.dumps({key: round(value, 4) for key, value in record.items()})
            print(line, flush=True)
            print(line, file=log, flush=True)


if __name__ == "__main__":
    main()
