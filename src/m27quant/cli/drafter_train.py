"""`m27quant drafter train`: a DFlash or EAGLE3 drafter for a target, from what the target wrote."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import drafter_train_options as opt
from m27quant.cli import options as shared
from m27quant.cli import run_options
from m27quant.cli.output import Mode, Output, pairs
from m27quant.cli.progress import show
from m27quant.cli.stopping import command_line, graceful, resume_command
from m27quant.cli.units import format_duration, format_size

if TYPE_CHECKING:
    from m27quant.drafters.train import TrainResult

SHOWN = 8
"""Positions in the summary."""


def train(
    kind: opt.Kind,
    target: opt.Target,
    data: opt.Data,
    out: opt.Out,
    preset: opt.Preset = None,
    init_from: opt.InitFrom = None,
    layers: opt.Layers = None,
    taps: opt.Taps = None,
    block_size: opt.BlockSize = None,
    train_block_sizes: opt.TrainBlockSizes = None,
    mask_token: opt.MaskToken = None,
    intermediate_size: opt.IntermediateSize = None,
    num_heads: opt.NumHeads = None,
    num_kv_heads: opt.NumKvHeads = None,
    head_dim: opt.HeadDim = None,
    rope_theta: opt.RopeTheta = None,
    draft_vocab_size: opt.DraftVocabSize = None,
    layout: opt.Layout = "plain",
    anchors_per_seq: opt.AnchorsPerSeq = None,
    loss_decay: opt.LossDecay = None,
    loss_gamma: opt.LossGamma = None,
    num_steps: opt.NumSteps = None,
    loss: opt.Loss = None,
    steps: opt.Steps = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = 8,
    grad_accumulation: opt.GradAccumulation = 1,
    optimizer: opt.Optimizer = "adamw",
    lr: opt.Lr = None,
    adam_lr: opt.AdamLr = 4e-3,
    weight_decay: opt.WeightDecay = None,
    warmup: opt.Warmup = 0.04,
    schedule: opt.Schedule = "cosine",
    clip: opt.Clip = None,
    dtype: opt.Dtype = "bf16",
    max_length: opt.MaxLength = 4096,
    seed: shared.Seed = 0,
    heldout: opt.Heldout = None,
    eval_every: opt.EvalEvery = None,
    eval_samples: opt.EvalSamples = 32,
    save_every: opt.SaveEvery = None,
    cache_size: opt.CacheSize = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    force_unlock: opt.ForceUnlock = False,
    device: shared.Device = "auto",
    activations: run_options.Activations = "auto",
    kv_cache_dtype: run_options.KvCacheDtype = "auto",
    no_verify: run_options.NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Train a DFlash or EAGLE3 drafter for a target, resumable.

    The drafter learns to write what the target wrote, from the target's hidden states; OUT is what vLLM, SGLang and
    `m27quant run --drafter` load.  What is not set comes from --preset, then from the target's sizes.  Under
    torchrun, ranks share each batch.  Killed at any time, the same command with --resume goes on where it was.

    Examples:
      m27quant drafter train dflash --preset l3h5 --target ./m27-nvfp4 --data ./answers --out ./m27-dflash

      m27quant drafter train eagle3 --target examples/tiny-m27 --data ./answers --out ./eagle3 --heldout 0.02

      torchrun --nproc-per-node 8 -m m27quant drafter train dflash --target ./m27-nvfp4 --data ./answers --out ./dflash
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    if int(os.environ.get("RANK", "0")):  # the first rank speaks for all
        output = Output(Mode.QUIET, silent=True, stdout=io.StringIO())
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.drafters.options import TrainOptions
    from m27quant.drafters.train import train_drafter

    chosen = TrainOptions(
        preset=preset, init_from=init_from, num_layers=layers, taps=opt.numbers("--taps", taps), block_size=block_size,
        train_block_sizes=opt.numbers("--train-block-sizes", train_block_sizes), mask_token=mask_token,
        intermediate_size=intermediate_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        rope_theta=rope_theta, draft_vocab_size=draft_vocab_size, anchors_per_seq=anchors_per_seq,
        loss_decay=loss_decay, loss_gamma=loss_gamma, num_steps=num_steps, loss=opt.share(loss), steps=steps,
        epochs=epochs, batch_size=batch_size, grad_accumulation=grad_accumulation, lr=lr, adam_lr=adam_lr,
        optimizer=optimizer, weight_decay=weight_decay, warmup=warmup, schedule=schedule, clip=clip, dtype=dtype,
        max_length=max_length, seed=seed, heldout=heldout, eval_every=eval_every, eval_samples=eval_samples,
        save_every=save_every, resume=resume, overwrite=overwrite, force_unlock=force_unlock, layout=layout,
        activations=activations, kv_cache_dtype=kv_cache_dtype, revision=revision, offline=offline,
        token=token.reveal() if token else None, device=device, cache_size=cache_size,
    )  # fmt: skip

    def say(message: str) -> None:
        kind, _, text = message.partition(": ")
        output.warning(text) if kind == "notice" else output.status(message)

    with graceful(output, resume_command()) as stop, show(output, enabled=not no_progress) as progress:
        result = train_drafter(
            kind, target, data, out, chosen, command=command_line({}), check=not no_verify, progress=progress,
            stop=stop, say=say,
        )  # fmt: skip
    output.result(_document(result), human=_summary(result), quiet=result.out)


def _document(result: TrainResult) -> dict[str, Any]:
    return {
        "out": str(result.out), "kind": result.kind, "steps": result.steps, "loss": result.loss,
        "accuracy": list(result.accuracy), "heldout": result.heldout, "parameters": result.parameters,
        "tensor_bytes": result.tensor_bytes, "elapsed_s": round(result.elapsed_s, 3),
        "was_complete": result.was_complete,
    }  # fmt: skip


def _summary(result: TrainResult) -> RenderableType:
    facts = {
        "drafter": str(result.out),
        "parameters": f"{result.parameters:,} of its own, {format_size(result.tensor_bytes)}",
        "training": f"{result.steps:,} steps, loss {result.loss:.4f} at the end",
        "accuracy": _shares(result.accuracy) + " by position, what came before being given",
    }
    if (found := result.heldout) is not None:
        facts["held out"] = (
            f"loss {found['val_loss']:.4f}, tau {found['tau']:.3f} over {found['blocks']:,} steps, "
            f"C_k {_shares(found['c_k'])}"
        )
    facts["time"] = format_duration(result.elapsed_s)
    title = "already complete" if result.was_complete else "done"
    return Group(Text(title, style="bold green"), pairs(facts))


def _shares(values: Any) -> str:
    return " ".join(f"{value:.1%}" for value in values[:SHOWN]) + (" ..." if len(values) > SHOWN else "")
