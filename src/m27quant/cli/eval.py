"""`m27quant eval`: how far quantized checkpoints are from their source, side by side."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from m27quant.cli import options as shared
from m27quant.cli.output import Output, clean, grid
from m27quant.cli.progress import show
from m27quant.cli.stopping import graceful
from m27quant.errors import FindingsError, UsageError, escape

if TYPE_CHECKING:
    from m27quant.evaluation.result import Estimate, Evaluation

DATA = "Data"
LIMITS = "Limits, for CI"

Candidates = Annotated[
    list[str],
    typer.Argument(metavar="CANDIDATE...", help="NVFP4 folders or Hub ids.", show_default=False),
]
Reference = Annotated[
    str,
    typer.Option(
        "--reference", metavar="MODEL", help="What they were made from: a folder or a Hub id.", show_default=False
    ),
]  # fmt: skip
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="FILE|HUB_ID",
        help="Text, cut into windows; JSON lines or Parquet with text, messages or input_ids; or a Hub data set.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=1, help="Windows or rows at most.", rich_help_panel=DATA)
]
SeqLen = Annotated[
    int, typer.Option("--seq-len", min=2, help="Tokens of a window at most.", rich_help_panel=DATA)
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="KIND,...",
        help="nvfp4 (W4A4), bf16 (W4A16), auto (nvfp4 where there are input scales); several side by side.",
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE,...",
        help="fp8, bf16, auto (what config.json declares); each with each of --activations.",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", min=0, help="Fail where the mean KL divergence, in nats, is above.",
        show_default=False, rich_help_panel=LIMITS,
    ),
]  # fmt: skip
MinTop1 = Annotated[
    float | None,
    typer.Option(
        "--min-top1", min=0, max=1, help="Fail where top-1 agreement is below.",
        show_default=False, rich_help_panel=LIMITS,
    ),
]  # fmt: skip
MaxPplRatio = Annotated[
    float | None,
    typer.Option(
        "--max-ppl-ratio", min=0, help="Fail where the perplexity, divided by the reference's, is above.",
        show_default=False, rich_help_panel=LIMITS,
    ),
]  # fmt: skip


def eval_(
    candidates: Candidates,
    reference: Reference,
    dataset: Dataset,
    num_samples: NumSamples = 64,
    seq_len: SeqLen = 512,
    activations: Activations = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    max_ppl_ratio: MaxPplRatio = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Measure what quantization costs: perplexity, KL divergence, agreement of tokens and routers, layer by layer.

    All checkpoints go side by side, one layer in memory at a time.  Every figure has a 95 % interval; two checkpoints
    are compared window by window.  Exit code 0: within the limits, or none were given; 1: beyond one, or NaN logits.

    Examples:
      m27quant eval ./m27-max ./m27-mse --reference MiniMaxAI/MiniMax-M2.7 --dataset heldout.txt

      m27quant eval ./m27-nvfp4 --reference ./m27 --dataset rows.jsonl --activations nvfp4,bf16 --json

      m27quant eval ./m27-nvfp4 --reference ./m27 --dataset heldout.txt --max-kl 0.05 --min-top1 0.9
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.evaluation.limits import Limits
    from m27quant.evaluation.run import evaluate

    with show(output, enabled=not no_progress) as progress, graceful(output, "") as interrupted:
        result = evaluate(
            candidates, reference=reference, dataset=dataset, num_samples=num_samples, seq_len=seq_len,
            activations=_modes("--activations", activations, ("auto", "nvfp4", "bf16")),
            kv_cache_dtypes=_modes("--kv-cache-dtype", kv_cache_dtype, ("auto", "fp8", "bf16")),
            seed=seed, limits=Limits(max_kl=max_kl, min_top1=min_top1, max_ppl_ratio=max_ppl_ratio),
            device=device, offline=offline, token=token.reveal() if token else None,
            say=output.status, progress=progress, stop=interrupted,
        )  # fmt: skip
    output.result(
        result.document(),
        human=_table(result),
        quiet="\n".join(f"{row.kl_mean.value:.6g}" for row in result.candidates),
    )
    if not result.ok:
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        raise FindingsError(
            f"{result.failures[0]}{more}", hint="layer_sqnr_db of --json shows where the error comes from"
        )


def _modes(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    found = text.split(",")
    for mode in found:
        if mode not in known:
            raise UsageError(
                f"{option} {escape(text)}: {escape(mode)} is none of {', '.join(known)}",
                hint="write one, or several with commas between",
            )
    return list(dict.fromkeys(found))


def _table(result: Evaluation) -> Group:
    headings = ["candidate", "mode", "perplexity", "ratio", "KL mean", "KL p99", "top-1", "top-8"]
    cells: list[list[Any]] = [
        [
            row.label, row.mode, f"{row.perplexity.value:.4f}", _short(row.perplexity_ratio, 4),
            _short(row.kl_mean, 5), _short(row.kl_p99, 4), _short(row.top1, 4), _short(row.top8, 4),
        ]
        for row in result.candidates
    ]  # fmt: skip
    lines = [
        f"reference: {escape(result.reference)}, perplexity {_short(result.reference_perplexity, 4)}",
        f"{result.num_tokens:,} tokens in {result.num_windows:,} windows of {escape(', '.join(result.dataset))}; "
        "(low to high): 95 % intervals",
    ]
    lines += [
        f"{pair.a} - {pair.b}: KL {pair.difference:+.3g} ({pair.low:+.3g} to {pair.high:+.3g}), p {pair.p:.2g}"
        for pair in result.pairs
        if pair.metric == "kl"
    ]
    return Group(grid(headings, cells), *(Text(clean(line)) for line in ["", *lines, *result.failures]))


def _short(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
