"""`m27quant quantize`: FP8 or BF16 in, NVFP4 experts and an FP8 KV cache out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import options as shared
from m27quant.cli import scale_out
from m27quant.cli.output import Output, grid, pairs
from m27quant.cli.progress import show
from m27quant.cli.scale_out import hush, one_voice
from m27quant.cli.stopping import graceful, resume_command
from m27quant.cli.units import format_duration, format_size

if TYPE_CHECKING:
    from m27quant.estimate import DryRun
    from m27quant.quantize import QuantizeResult

CALIBRATION = "Calibration"
RUN = "Run"

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.", show_default=False)]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="RECIPE", help="A name from `m27quant recipe list`, or a YAML file."),
]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="DATA",
        rich_help_panel=CALIBRATION,
        show_default=False,
        help="A JSONL, Parquet or text file, or a Hub data set, instead of the recipe's; may be repeated.",
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Calibration rows in all; the recipes say 1024.",
        rich_help_panel=CALIBRATION,
        show_default=False,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens per row; the recipes say 512.", rich_help_panel=CALIBRATION, show_default=False
    ),
]
MoeCalib = Annotated[
    str | None,
    typer.Option(
        metavar="full|natural",
        rich_help_panel=CALIBRATION,
        show_default=False,
        help="full: every expert sees every token, as with top-k forced to all; natural: routed ones only.",
    ),
]
InputScaleHeadroom = Annotated[
    float,
    typer.Option(
        metavar="FACTOR",
        help="Multiply the experts' input ranges: above 1 for values beyond those seen, below 1 clips.",
        rich_help_panel=CALIBRATION,
    ),
]
InputScalePercentile = Annotated[
    float,
    typer.Option(
        metavar="P",
        help="Input ranges that all but 100 - P percent of blocks of 16 stay within; 100: the largest value.",
        rich_help_panel=CALIBRATION,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what m27quant made in OUT before.", rich_help_panel=RUN)
]
ForceUnlock = Annotated[
    bool,
    typer.Option(
        "--force-unlock", help="Take over from a run on another machine that is dead.", rich_help_panel=RUN
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write nothing.", rich_help_panel=RUN)
]


def quantize(
    model: shared.Model,
    out: Out,
    recipe: RecipeOption = "nvfp4_experts_only-fp8_kv",
    dataset: DatasetOption = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    moe_calib: MoeCalib = None,
    input_scale_headroom: InputScaleHeadroom = 1.0,
    input_scale_percentile: InputScalePercentile = 100.0,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    max_memory: shared.MaxMemory = None,
    max_shard_size: shared.MaxShardSize = None,
    num_processes: scale_out.NumProcesses = None,
    calibrate_only: scale_out.CalibrateOnly = False,
    ranges: scale_out.RangesOption = None,
    layers: scale_out.LayersOption = None,
    dry_run: DryRunOption = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force_unlock: ForceUnlock = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Quantize a MiniMax-M2.x checkpoint to NVFP4, layer by layer, resumable.

    The source is read as it is stored (block-scaled FP8, or BF16); OUT is what vLLM and SGLang load.  Killed at
    any time, the same command with --resume goes on where it was.

    Examples:
      m27quant quantize MiniMaxAI/MiniMax-M2.7 m27-nvfp4

      m27quant quantize ./m27 ./m27-nvfp4 --dataset rows.jsonl --max-memory 16GiB --dry-run

      torchrun --nproc-per-node 8 -m m27quant quantize MiniMaxAI/MiniMax-M2.7 m27-nvfp4
    """
    if moe_calib not in (None, "full", "natural"):
        raise typer.BadParameter(f"{moe_calib!r} is neither full nor natural", param_hint="--moe-calib")
    output = Output.open(json=json, quiet=quiet or not scale_out.is_first(), verbose=verbose)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.prepare import DEFAULT_SHARD_BYTES, Options
    from m27quant.quantize import quantize_checkpoint
    from m27quant.workers import count_of_ranks, working_together

    chosen = Options(
        recipe=recipe,
        dataset=tuple(dataset or ()),
        num_samples=num_samples,
        seq_len=seq_len,
        moe_calib=moe_calib,  # type: ignore[arg-type]  # checked above
        input_scale_headroom=input_scale_headroom,
        input_scale_percentile=input_scale_percentile,
        device=device,
        max_memory=max_memory,
        max_shard_size=max_shard_size or DEFAULT_SHARD_BYTES,
        resume=resume,
        overwrite=overwrite,
        force_unlock=force_unlock,
        revision=revision,
        offline=offline,
        token=token.reveal() if token else None,
        seed=seed,
        calibrate_only=calibrate_only,
        ranges=None if ranges is None else str(ranges),
        layers=layers,
    )

    def say(message: str) -> None:
        kind, _, text = message.partition(": ")
        output.warning(text) if kind == "notice" else output.status(message)

    if dry_run:
        from m27quant.estimate import dry_run as plan_only

        plan = plan_only(model, out, chosen, ranks=count_of_ranks(chosen, num_processes), say=say)
        if not scale_out.is_first():
            return
        output.result({"dry_run": plan.to_json()}, human=_planned(plan), quiet=plan.output_shard_bytes)
        return
    with (
        graceful(output, resume_command()) as stop,
        working_together(model, out, chosen, num_processes, stop) as (ranks, mine),
        one_voice(ranks),
        show(output, enabled=ranks.is_first and not no_progress) as progress,
    ):
        result = quantize_checkpoint(
            model,
            out,
            mine,
            progress=progress,
            stop=stop,
            say=say if ranks.is_first else hush,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    if calibrate_only or layers is not None:
        output.result(
            {"out": str(out), **result.report},
            human=pairs(scale_out.next_step(result.report, layers)),
            quiet=out,
        )
    else:
        output.result(document(result), human=summary(result), quiet=result.out)


def document(result: QuantizeResult) -> dict[str, Any]:
    """The result of a run as JSON."""
    report = result.report
    return {
        "out": str(result.out),
        "elapsed_s": round(result.elapsed_s, 3),
        "peak_rss_bytes": result.peak_rss_bytes,
        "was_complete": result.was_complete,
        **{key: report[key] for key in ("source", "recipe", "calibration", "summary", "notices", "shards")},
    }


def summary(result: QuantizeResult) -> RenderableType:
    """What a person wants to know at the end."""
    report, s = result.report, result.report["summary"]
    cal, cover, scales = report["calibration"], s["coverage"], s["scales"]
    seen = "all tokens" if cal["moe_calib"] == "full" else "routed tokens only, ranges shared"
    facts = {
        "checkpoint": str(result.out),
        "size": f"{format_size(s['source_bytes'])} -> {format_size(s['output_bytes'])} "
        f"({s['compression']:.2f} times smaller)",
        "tensors": f"{s['num_tensors']:,} in {len(report['shards'])} shards",
        "calibration": f"{cal['num_samples']:,} rows, {cal['num_tokens']:,} tokens, every expert on {seen}",
        "natural routing": f"{cover['routed_tokens_min']:,} to {cover['routed_tokens_max']:,} tokens an expert, "
        f"{cover['cold_experts']} of {cover['experts']:,} experts without any",
        "weight_scale_2": _span(scales["weight_scale_2"]),
        "input_scale": _span(scales["input_scale"]),
    }
    if scales["k_scale"]:
        facts["kv scales"] = "k {min:.3g} to {max:.3g}".format(
            **scales["k_scale"]
        ) + ", v {min:.3g} to {max:.3g}".format(**scales["v_scale"])
    if s["sqnr_db"]:
        worst = s["sqnr_db"]["worst"]
        facts["weight SQNR"] = (
            f"mean {s['sqnr_db']['mean']:.2f} dB, worst {worst['db']:.2f} dB "
            f"(layer {worst['layer']}, expert {worst['expert']}, {worst['projection']})"
        )
    facts["time and memory"] = (
        f"{format_duration(result.elapsed_s)}, {format_size(result.peak_rss_bytes)} at the peak"
    )
    rows = [(w["layer"], f"{w['mean_db']:.2f}", f"{w['min_db']:.2f}") for w in s["worst_layers"]]
    title = "already complete" if result.was_complete else "done"
    return Group(
        Text(title, style="bold green"),
        pairs(facts),
        "",
        Text("worst layers by SQNR", style="bold"),
        grid(("layer", "mean dB", "min dB"), rows),
    )


def _span(by_projection: dict[str, dict[str, float]]) -> str:
    low = min(r["min"] for r in by_projection.values())
    high = max(r["max"] for r in by_projection.values())
    return f"{low:.3g} to {high:.3g}"


def _shared(plan: DryRun) -> dict[str, str]:
    """How several ranks divide the work."""
    if plan.ranks == 1:
        return {}

    def span(counts: list[int]) -> str:
        low, high = min(counts), max(counts)
        return f"{high:,}" if low == high else f"{low:,} to {high:,}"

    return {
        "processes": f"{plan.ranks}; each takes {span(plan.tokens_per_rank)} tokens through all experts and packs "
        f"{span(plan.experts_per_rank)} experts a layer; memory is one process's"
    }


def _planned(plan: DryRun) -> RenderableType:
    kinds = {"w1": "gate", "w2": "down", "w3": "up"}
    to_nvfp4 = ", ".join(f"{n:,} {k} ({kinds.get(k, k)})" for k, n in plan.quantized.items())
    kept = ", ".join(f"{n:,} {k}" for k, n in plan.left_alone.items())
    facts = {
        "source": plan.source,
        "recipe": plan.recipe,
        "to NVFP4": to_nvfp4,
        "left alone": f"{kept} ({len(plan.exclude_modules)} entries in the exclude list)",
        "KV cache": {"fp8": "FP8 with calibrated scales", "fp8_cast": "FP8 without scale tensors"}.get(
            plan.kv_cache or "", "BF16"
        ),
        "source size": f"{plan.source_bytes:,} bytes",
        "output": f"{plan.output_shard_bytes:,} bytes in {plan.num_shards} shards, {plan.num_tensors:,} tensors",
        "calibration": f"{plan.num_samples:,} rows, {plan.num_tokens:,} tokens, on {plan.device}",
        **_shared(plan),
        "peak memory": format_size(plan.peak_memory_bytes)
        + ("" if plan.rows_in_memory else ", hidden states on disk")
        + (f", GPU {format_size(plan.peak_device_bytes)}" if plan.peak_device_bytes else ""),
        "peak disk": format_size(plan.peak_disk_bytes),
        "time": f"about {format_duration(plan.estimated_seconds)}, from a short measurement here",
    }
    return Group(Text("dry run: nothing was written", style="bold"), pairs(facts))
