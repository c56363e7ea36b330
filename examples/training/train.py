"""Train tiny-m27.  Seeded, resumable, on a CPU or a GPU.

    python train.py --data build/tiny-m27

The learning rate is constant and then falls linearly to zero over the last part (`--decay`), so that a run
can be shortened by resuming with fewer --steps.  The last part reads longer windows too.  From
`--unlikelihood` on, the model also writes greedy text from training prompts, and tokens that complete an
8-gram for the second time are made less likely (sequence-level unlikelihood, Welleck et al. 2020,
arXiv:1908.04319): a small model trained on likelihood alone falls into loops when it decodes greedily.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from generation import generate_greedy, repeats
from model import ModelConfig, Parameters, compute_copies, forward, init_parameters
from optimizer import Optimizer
from torch import Tensor

PROMPT_LEN, TEXT_LEN = 64, 128
REFRESH_STEPS, TEXTS_PER_STEP = 32, 8


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens at which step; fractions are of `steps`."""

    steps: int
    decay: float
    unlikelihood: float
    tokens_per_step: int = 6144

    def lr_scale(self, step: int) -> float:
        warm = min(1.0, (step + 1) / 20)
        return warm * min(1.0, (self.steps - step) / (self.decay * self.steps))

    def window(self, step: int) -> int:
        return 256 if step < (1 - self.decay) * self.steps else 512

    @property
    def unlikelihood_start(self) -> int:
        """A multiple of REFRESH_STEPS, where texts are written anew."""
        return math.ceil(self.unlikelihood * self.steps / REFRESH_STEPS) * REFRESH_STEPS


def load_tokens(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))


def windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Non-overlapping (inputs, targets), each [windows, length]."""
    count = (len(tokens) - 1) // length
    return tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, length)


def batch(tokens: Tensor, step: int, size: int, length: int, seed: int) -> Tensor:
    """The step's [size, length + 1] windows; offset and order change every epoch, decided by the seed."""
    steps_per_epoch = (len(tokens) - 1) // length // size - 1
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // steps_per_epoch)
    offset = int(torch.randint(length, (), generator=generator))
    order = torch.randperm((len(tokens) - 1 - offset) // length, generator=generator)
    first = (step % steps_per_epoch) * size
    return tokens[order[first : first + size, None] * length + offset + torch.arange(length + 1)]


def prompts(tokens: Tensor, count: int, seed: int) -> Tensor:
    starts = torch.randint(
        len(tokens) - PROMPT_LEN, (count, 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[starts + torch.arange(PROMPT_LEN)]


def unigram_perplexity(train: Tensor, heldout: Tensor, vocab_size: int) -> float:
    """Of training counts plus one, on the held-out tokens that a model predicts (all but the first)."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[heldout[1:]].mean().item())


@torch.no_grad()
def perplexity(
    params: Parameters, bias: Tensor, tokens: Tensor, config: ModelConfig, length: int = 256
) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows of `length` tokens."""
    inputs, targets = windows(tokens, length)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = F.linear(forward(params, bias, x, config), params["head"]).float()
        total += F.cross_entropy(logits, y.reshape(-1), reduction="sum").item()
    return math.exp(total / inputs.numel())


@dataclass(frozen=True, slots=True)
class Texts:
    """Greedy text of the model itself, with the tokens that repeat an 8-gram marked: both [texts, L]."""

    ids: Tensor
    repeated: Tensor

    @classmethod
    def write(cls, params: Parameters, bias: Tensor, starts: Tensor, config: ModelConfig) -> Texts:
        ids = generate_greedy(params, bias, starts, TEXT_LEN, config)
        return cls(ids, repeats(ids.cpu(), PROMPT_LEN).to(ids.device))

    def rows(self, first: int, count: int) -> Texts:
        return Texts(self.ids[first : first + count], self.repeated[first : first + count])

    def share(self) -> float:
        return self.repeated[:, PROMPT_LEN:].float().mean().item()

    def unlikelihood(self, params: Parameters, bias: Tensor, config: ModelConfig) -> Tensor:
        """-log(1 - p) of the repeated tokens, summed, per token of text."""
        wanted = self.repeated[:, 1:].reshape(-1)
        hidden = forward(params, bias, self.ids[:, :-1], config)[wanted]
        log_p = F.log_softmax(F.linear(hidden, params["head"]).float(), -1)
        p = log_p.gather(1, self.ids[:, 1:].reshape(-1, 1)[wanted]).exp()
        return -torch.log1p(-p.clamp(max=1 - 1e-4)).sum() / (len(self.ids) * TEXT_LEN)


@dataclass(frozen=True, slots=True)
class Model:
    """What a forward pass needs."""

    params: Parameters
    bias: Tensor
    config: ModelConfig

    def gradients(
        self, rows: Tensor, texts: Texts | None, weight: float
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(loss [], loads [layers, E], a gradient per parameter) of windows [B, length + 1] and texts."""
        loads = torch.zeros_like(self.bias)
        hidden = forward(self.params, self.bias, rows[:, :-1], self.config, loads=loads)
        loss = F.cross_entropy(F.linear(hidden, self.params["head"]).float(), rows[:, 1:].reshape(-1))
        total = loss
        if texts is not None:
            total = loss + weight * texts.unlikelihood(self.params, self.bias, self.config)
        return loss.detach(), loads, list(torch.autograd.grad(total, list(self.params.values())))


class Workers:
    """Threads that each take an equal share of a batch.

    A share runs on one thread from end to end, so that the threads meet once a step.  Where every product is
    split among threads instead, each of them waits for the slowest, which costs most on a shared machine.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count if device.type == "cpu" else 1
        torch.set_num_threads(1 if self.count > 1 else count)
        self.pool = ThreadPoolExecutor(self.count)

    def gradients(
        self, model: Model, rows: Tensor, texts: Texts | None, weight: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mean loss, summed loads, F32 mean gradients."""
        per_worker = TEXTS_PER_STEP // self.count
        shares = [texts.rows(i * per_worker, per_worker) if texts else None for i in range(self.count)]
        results = list(self.pool.map(model.gradients, rows.chunk(self.count), shares, [weight] * self.count))
        losses, loads, grads = zip(*results, strict=True)
        means = [torch.stack([g.float() for g in parts]).mean(0) for parts in zip(*grads, strict=True)]
        return (
            torch.stack(losses).mean(),
            torch.stack(loads).sum(0),
            dict(zip(model.params, means, strict=True)),
        )

    def write(self, model: Model, starts: Tensor) -> Texts:
        parts = self.pool.map(
            lambda part: Texts.write(model.params, model.bias, part, model.config), starts.chunk(self.count)
        )
        ids, repeated = zip(*((part.ids, part.repeated) for part in parts), strict=True)
        return Texts(torch.cat(ids), torch.cat(repeated))


def save(path: Path, optimizer: Optimizer, bias: Tensor, step: int, seconds: float) -> None:
    """Replace the state whole: a reader sees the old one or the new one."""
    state = {"masters": optimizer.masters, "bias": bias, "step": step, "seconds": seconds}
    torch.save(state | {"optimizer": optimizer.state()}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Run to the last step; yields one record per report."""
    torch.manual_seed(args.seed)
    device, config = torch.device(args.device), ModelConfig()
    schedule = Schedule(args.steps, args.decay, args.unlikelihood)
    train_tokens, heldout = (
        load_tokens(args.data / f"{split}.bin").to(device) for split in ("train", "heldout")
    )
    sample = windows(heldout, 256)[0][::6].reshape(-1)
    masters = {name: w.to(device) for name, w in init_parameters(config, args.seed).items()}
    bias = torch.zeros(config.num_hidden_layers, config.num_local_experts, device=device)
    state_path, step, before = args.data / "state.pt", 0, 0.0
    state = torch.load(state_path, map_location=device) if args.resume else None
    if state:
        masters, bias, step, before = state["masters"], state["bias"], state["step"], state["seconds"]
    params = {name: w.requires_grad_() for name, w in compute_copies(masters, torch.bfloat16).items()}
    optimizer = Optimizer(masters, params, args.muon_lr, args.adam_lr)
    if state:
        optimizer.load_state(state["optimizer"])
    del state
    model, workers = Model(params, bias, config), Workers(args.threads, device)
    texts, losses, started, tokens_seen = None, [], time.monotonic(), 0
    while step < args.steps:
        if step >= schedule.unlikelihood_start and step % REFRESH_STEPS == 0:
            starts = prompts(train_tokens, REFRESH_STEPS * TEXTS_PER_STEP, args.seed + 1 + step)
            texts = workers.write(model, starts)
        length, scale = schedule.window(step), schedule.lr_scale(step)
        rows = batch(train_tokens, step, schedule.tokens_per_step // length, length, args.seed)
        some = texts.rows(step % REFRESH_STEPS * TEXTS_PER_STEP, TEXTS_PER_STEP) if texts else None
        loss, loads, grads = workers.gradients(model, rows, some, args.unlikelihood_weight)
        norm = optimizer.step(grads, scale)
        # Auxiliary-loss-free balancing: an expert that is chosen too rarely becomes easier to choose.
        bias += args.bias_rate * scale * torch.sign(loads.mean(1, keepdim=True) - loads)
        step, tokens_seen = step + 1, tokens_seen + rows[:, 1:].numel()
        losses.append(loss)
        if step % REFRESH_STEPS and step < args.steps:
            continue
        seconds = time.monotonic() - started
        record = {"step": step, "seconds": before + seconds, "tokens_per_s": tokens_seen / seconds,
                  "loss": torch.stack(losses).mean().item(), "grad_norm": norm, "lr_scale": scale,
                  "max_load": (loads.max(1).values / loads.mean(1)).mean().item()}  # fmt: skip
        losses = []
        if texts:
            record["text_repeats"] = texts.share()
        if step % (4 * REFRESH_STEPS) == 0 or step == args.steps:
            save(state_path, optimizer, bias, step, before + seconds)
            record["heldout_perplexity"] = perplexity(params, bias, sample, config)
            record["loop_share"] = workers.write(model, prompts(heldout, 32, 0)).share()
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tiny-m27.")
    parser.add_argument(
        "--data", type=Path, default=Path("build/tiny-m27"), help="folder that corpus.py filled"
    )
    parser.add_argument("--steps", type=int, default=832, help="steps in all, of 6144 tokens")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's state.pt")
    parser.add_argument(
        "--decay", type=float, default=0.5, help="last part of the steps, in which the rate falls"
    )
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--bias-rate", type=float, default=0.002, help="nudge of the selection bias per step")
    parser.add_argument("--unlikelihood", type=float, default=0.62, help="part of the steps before it begins")
    parser.add_argument("--unlikelihood-weight", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=2, help="shares of a batch computed side by side on a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mode = "a" if args.resume else "w"
    with (args.data / "train_log.jsonl").open(mode, encoding="utf-8") as log:
        for record in train(args):
            line = json.dumps({key: round(value, 4) for key, value in record.items()})
            print(line, flush=True)
            print(line, file=log, flush=True)


if __name__ == "__main__":
    main()
