"""A training step of our drafters beside a plain transformers loop of the same drafters.

    python -m benchmarks.training [--save]                   the drafters of tiny-m27, on a CPU
    python -m benchmarks.training --device cuda --size m27   the drafters of M2.7 at full width, on one GPU

Both take the same random batch, weights, loss, F32 masters and AdamW, and compute in BF16.  Losses and gradients are
compared first, in F32: a step that learns something else is not timed.  What is timed takes turns; memory is that of a
process of its own, above what it held before its first step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import machine, training_peers
from benchmarks.watch import watch
from m27quant.drafters.batch import Batch, Parameters, Shared
from m27quant.drafters.dflash import DFlashSpec, dflash_loss, init_dflash, sample_anchors
from m27quant.drafters.eagle3 import Eagle3Spec, Vocabulary, eagle3_loss, init_eagle3

RESULTS = Path(__file__).parent / "results"
MAX_DIFFERENCE = 1e-3
"""Of losses, and of gradients as a share of their norm, both in F32: sums run in other orders."""
OURS, THEIRS = "m27quant", "transformers"
SOFT, SLOT_DECAY, STEPS, STEP_DECAY = 0.5, 0.85, 7, 0.8
MEMORY_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """Sizes of target, drafter and batch."""

    layer: dict[str, Any]
    vocab_size: int
    draft_vocab_size: int
    taps: int
    num_layers: int
    block_size: int
    anchors: int
    batch: int
    length: int
    prompt: int


TINY = Setting(
    {"hidden_size": 272, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
     "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    vocab_size=2048, draft_vocab_size=1280, taps=5, num_layers=3, block_size=8, anchors=24, batch=16, length=192,
    prompt=64,
)  # fmt: skip
M27 = Setting(
    {"hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24, "num_key_value_heads": 8,
     "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e6},
    vocab_size=200064, draft_vocab_size=32000, taps=5, num_layers=3, block_size=16, anchors=128, batch=2, length=2048,
    prompt=256,
)  # fmt: skip
SIZES = {"tiny": TINY, "m27": M27}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kinds", default="dflash,eagle3")
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "ENGINE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:
        print(json.dumps(_memory(SIZES[args.size], *args.memory_of, device)))
        return
    facts = machine.facts()
    rows = [row for kind in args.kinds.split(",") for row in _compare(kind, args, device)]
    results = {
        "machine": facts, "date": datetime.date.today().isoformat(), "size": args.size, "device": args.device,
        "rows": rows,
    }  # fmt: skip
    page = markdown(results)
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"training-{args.size}-{results['date']}"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        stem.with_suffix(".md").write_text(page)


# -- one step of each ------------------------------------------------------------------------------


@dataclass
class Job:
    """A drafter's first weights and how both compute its loss."""

    masters: Parameters
    ours: Callable[[Parameters], Tensor]
    module: Callable[[], torch.nn.Module]
    theirs: Callable[[Any], Tensor]


def _job(kind: str, s: Setting, device: torch.device, dtype: torch.dtype) -> Job:
    g, D = torch.Generator().manual_seed(0), s.layer["hidden_size"]
    head = (torch.randn(s.vocab_size, D, generator=g) * D**-0.5).to(device, dtype)
    shared = Shared(torch.randn(s.vocab_size, D, generator=g).to(device, dtype), head)
    taps = s.taps if kind == "dflash" else 3
    batch = Batch(
        ids_BT=torch.randint(s.vocab_size - 1, (s.batch, s.length), generator=g).to(device),
        lengths_B=torch.full((s.batch,), s.length, device=device),
        loss_mask_BT=(torch.arange(s.length) >= s.prompt).expand(s.batch, -1).to(device),
        taps_BTF=torch.randn(s.batch, s.length, taps * D, generator=g).to(device, dtype),
        final_BTD=torch.randn(s.batch, s.length, D, generator=g).to(device, dtype),
    )
    states = tuple(range(1, taps + 1))
    if kind == "dflash":
        spec = DFlashSpec(
            **s.layer, num_hidden_layers=s.num_layers, hidden_states=states, block_size=s.block_size,
            mask_token_id=s.vocab_size - 1,
        )  # fmt: skip
        anchors = sample_anchors(batch, s.anchors, [torch.Generator().manual_seed(b) for b in range(s.batch)])
        weights = (SLOT_DECAY ** torch.arange(s.block_size - 1)).to(device)
        return Job(
            init_dflash(spec, g),
            lambda p: dflash_loss(p, spec, batch, anchors, shared, slot_weights_K1=weights, soft=SOFT).loss,
            lambda: training_peers.PlainDFlash(spec),
            lambda module: module.loss(batch, anchors[0], shared, weights, SOFT),
        )
    vocabulary = Vocabulary(torch.arange(s.draft_vocab_size, device=device), s.vocab_size)
    head_spec = Eagle3Spec(
        **s.layer, num_hidden_layers=1, hidden_states=states, draft_vocab_size=s.draft_vocab_size
    )
    settings = {"num_steps": STEPS, "decay": STEP_DECAY, "soft": SOFT}
    return Job(
        init_eagle3(head_spec, g, head[vocabulary.tokens_W].cpu()),
        lambda p: eagle3_loss(p, head_spec, batch, shared, vocabulary, **settings).loss,
        lambda: training_peers.PlainEagle3(head_spec),
        lambda module: module.loss(batch, shared, vocabulary, **settings),
    )


class Trained:
    """F32 masters under AdamW, copies of them to compute with."""

    def __init__(self, copies: Parameters, loss: Callable[[], Tensor]) -> None:
        self.copies, self.loss = copies, loss
        self.masters = {name: copy.detach().float().clone() for name, copy in copies.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=1e-4)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.loss()
        grads = torch.autograd.grad(loss, list(self.copies.values()))
        return loss.detach(), dict(zip(self.copies, grads, strict=True))

    def step(self) -> None:
        _, grads = self.gradients()
        for name, grad in grads.items():
            self.masters[name].grad = grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(self.masters[name])


def _trained(engine: str, job: Job, device: torch.device, dtype: torch.dtype) -> Trained:
    if engine == OURS:
        copies = {name: w.to(device, dtype).requires_grad_() for name, w in job.masters.items()}
        return Trained(copies, lambda: job.ours(copies))
    module = job.module()
    module.load_state_dict(job.masters)
    inv_freq = module.rope.inv_freq
    module = module.to(device, dtype)
    module.rope.inv_freq = inv_freq.to(device)  # F32, as transformers keeps it
    return Trained(dict(module.named_parameters()), lambda: job.theirs(module))


# -- comparing -------------------------------------------------------------------------------------


def _compare(kind: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    s = SIZES[args.size]
    job = _job(kind, s, device, torch.float32)
    (loss, grads), (their_loss, their_grads) = (
        _trained(engine, job, device, torch.float32).gradients() for engine in (OURS, THEIRS)
    )
    difference = float(abs(loss - their_loss) / their_loss)
    worst = max(float((grads[n] - g).norm() / g.norm()) for n, g in their_grads.items())
    if not max(difference, worst) < MAX_DIFFERENCE:
        sys.exit(f"{kind}: losses differ by {difference:.1e}, gradients by {worst:.1e}: nothing is timed")
    del job, grads, their_grads
    job = _job(kind, s, device, torch.bfloat16)
    trained = {engine: _trained(engine, job, device, torch.bfloat16) for engine in (OURS, THEIRS)}
    for each in trained.values():
        each.step()  # the first one fills caches
    seconds = machine.interleaved({engine: each.step for engine, each in trained.items()}, args.rounds)
    del job, trained
    rows = []
    for engine, best in seconds.items():
        rows.append({
            "kind": kind, "engine": engine, "ms_per_step": best * 1e3, "tokens_per_s": s.batch * s.length / best,
            "times_transformers": seconds[THEIRS] / best, "loss_difference": difference, "gradient_difference": worst,
            "step_bytes": _measure_memory(kind, engine, args, device),
        })  # fmt: skip
    return rows


def _measure_memory(kind: str, engine: str, args: argparse.Namespace, device: torch.device) -> int:
    """Most bytes that some steps take beyond weights, batch and what was imported, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--size", args.size, "--device", args.device]
    done = watch([*command, "--threads", str(args.threads), "--memory-of", kind, engine])
    if done.returncode:
        sys.exit(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    return int(told["bytes"]) if device.type == "cuda" else done.peak_rss_bytes - int(told["before"])


def _memory(s: Setting, kind: str, engine: str, device: torch.device) -> dict[str, int]:
    trained = _trained(engine, _job(kind, s, device, torch.bfloat16), device, torch.bfloat16)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    for _ in range(MEMORY_STEPS):
        trained.step()
    return {"before": before, "bytes": torch.cuda.max_memory_allocated() - before if cuda else 0}


def markdown(results: dict[str, Any]) -> str:
    m, s = results["machine"], SIZES[results["size"]]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    devices = ", ".join(d["name"] for d in m["devices"]) if results["device"] != "cpu" else "CPU"
    rows = results["rows"]
    return "\n".join([
        f"# Training steps of drafters, {results['size']}, {results['date']}, on {devices}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {m['threads']} threads, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB; {m['system']}, {m['python']}; {versions}. "
        f"Load before: {m['load_before']}.",
        "",
        f"{s.batch} sequences of {s.length} tokens a step. DFlash: {s.num_layers} layers, {s.anchors} anchors a "
        f"sequence, blocks of {s.block_size}; EAGLE3: {STEPS} steps, {s.draft_vocab_size} tokens. Hidden size "
        f"{s.layer['hidden_size']}, vocabulary {s.vocab_size}; half cross-entropy, half distillation; BF16, "
        f"F32 masters, AdamW. In F32 losses agree to {max(r['loss_difference'] for r in rows):.1e}, gradients to "
        f"{max(r['gradient_difference'] for r in rows):.0e}. "
        "transformers: Qwen3's and Llama's modules, SDPA with a dense mask.",
        "",
        "| drafter | loop | ms per step | tokens/s | transformers' time / this | memory of a step, MiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['kind']} | {r['engine']} | {r['ms_per_step']:.0f} | {r['tokens_per_s']:.0f} | "
            f"{r['times_transformers']:.2f} | {r['step_bytes'] / 2**20:.0f} |"
            for r in rows
        ),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
