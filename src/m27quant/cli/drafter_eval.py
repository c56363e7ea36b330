"""`m27quant drafter eval`: what targets accept of drafters, side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli.output import Output, clean, grid
from m27quant.cli.progress import show
from m27quant.cli.stopping import command_line, graceful
from m27quant.errors import UsageError, escape

if TYPE_CHECKING:
    from m27quant.drafters.evaluation import EvalResult, EvalRow

DATA = "Data"
SHOWN = 4
"""Of C_k in the table."""

Drafters = Annotated[
    list[str],
    typer.Argument(
        metavar="DRAFTER...", help="DFlash or EAGLE3 folders or Hub ids, or ngram.", show_default=False
    ),
]
Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="CHECKPOINT",
        help="A folder or a Hub id; repeatable, the first is what others are compared with.",
        show_default=False,
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="FILE|FOLDER|HUB_ID",
        help="Held-out text, rows with prompts, or data of `drafter generate-data`.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
NumPrompts = Annotated[
    int, typer.Option("--num-prompts", min=1, help="At even distances.", rich_help_panel=DATA)
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", min=1, help="Of prompts cut from text.", rich_help_panel=DATA)
]
Stride = Annotated[
    int,
    typer.Option(
        "--stride", min=1, help="A teacher-forced block begins behind every so many tokens.",
        rich_help_panel=DATA,
    ),
]  # fmt: skip
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="Generated behind each prompt.", rich_help_panel=opt.SAMPLING),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "--temp", min=0, help="0 is greedy.", rich_help_panel=opt.SAMPLING),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos/--stop-at-eos", help="Go on behind the end of a turn.", rich_help_panel=opt.SAMPLING
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="KIND,...",
        help="Modes of NVFP4 targets: nvfp4 (W4A4), bf16 (W4A16), auto; several are measured side by side.",
        rich_help_panel=opt.RUNTIME,
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE,...",
        help="Modes of NVFP4 targets: fp8, bf16, auto; each with each of --activations.",
        rich_help_panel=opt.RUNTIME,
    ),
]
NumDraftTokens = Annotated[
    str | None,
    typer.Option(
        "--num-draft-tokens",
        metavar="N,...",
        help="DFlash: drafts a step; EAGLE3: rows of the tree, its root included. Several are measured side by side.",
        show_default=False,
        rich_help_panel=opt.DRAFTING,
    ),
]
WriteCard = Annotated[
    bool,
    typer.Option(
        "--write-card", help="Put the result into each drafter's README.md.", rich_help_panel="Output"
    ),
]


def eval_(
    drafters: Drafters,
    target: Targets,
    dataset: Dataset,
    num_prompts: NumPrompts = 64,
    prompt_tokens: PromptTokens = 64,
    stride: Stride = 8,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    ignore_eos: IgnoreEos = True,
    seed: opt.Seed = 0,
    num_draft_tokens: NumDraftTokens = None,
    num_steps: opt.NumSteps = None,
    eagle_topk: opt.EagleTopk = None,
    drafter_tap_offset: opt.TapOffset = None,
    drafter_rope_theta: opt.RopeTheta = None,
    device: shared.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    activations: Activations = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    invariant: opt.Invariant = None,
    max_memory: shared.MaxMemory = None,
    max_num_seqs: opt.MaxNumSeqs = 64,
    no_verify: opt.NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    write_card: WriteCard = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Measure what targets accept of drafters.

    Every target answers the same prompts; tau is the number of tokens a step gives.  Along the text that does follow
    the prompts each drafter is scored too, teacher-forced: leading right drafts of a block, and the loss.  A
    difference to the first target is paired by prompt: what quantization costs in acceptance.

    Examples:
      m27quant drafter eval ./m27-dflash --target ./m27-nvfp4 --dataset heldout.jsonl

      m27quant drafter eval ./dflash ./eagle3 --target ./fp8 --target ./nvfp4 --activations nvfp4,bf16 --dataset t.txt
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.cli.run import loading
    from m27quant.drafters.evaluate import evaluate_drafter
    from m27quant.drafters.evaluation import EvalOptions
    from m27quant.runtime.options import RunOptions

    options = EvalOptions(
        num_prompts=num_prompts, prompt_tokens=prompt_tokens, max_tokens=max_tokens, stride=stride,
        temperature=temperature, ignore_eos=ignore_eos, seed=seed,
        num_draft_tokens=_counts(num_draft_tokens), num_steps=num_steps, eagle_topk=eagle_topk,
        tap_offset=opt.tap_offset(drafter_tap_offset),
        rope_theta=drafter_rope_theta,
    )  # fmt: skip
    settings = RunOptions(
        dtype=dtype,  # type: ignore[arg-type]  # RunOptions refuses others by name
        device=device, invariant=invariant, max_memory=max_memory, max_num_seqs=max_num_seqs,
    )  # fmt: skip
    cards = [_card_of(name) for name in drafters] if write_card else []
    with show(output, enabled=not no_progress) as progress, graceful(output, "") as interrupted:
        result = evaluate_drafter(
            drafters, target, dataset, options,
            activations=_modes("--activations", activations),
            kv_cache_dtypes=_modes("--kv-cache-dtype", kv_cache_dtype),
            run_options=settings, command=command_line({}), check=not no_verify, revision=revision, offline=offline,
            token=token.reveal() if token else None, say=output.status, loading=loading(progress),
            progress=progress, stop=interrupted,
        )  # fmt: skip
    for name, card in zip(drafters, cards, strict=False):
        _write_card(card, result.of(name))
    output.result(
        result.to_json(),
        human=_table(result),
        quiet="\n".join(f"{r.generation.tau:.4f}" for r in result.rows),
    )


def _modes(option: str, text: str) -> list[str]:
    allowed = {"--activations": ("auto", "nvfp4", "bf16"), "--kv-cache-dtype": ("auto", "fp8", "bf16")}[
        option
    ]
    found = text.split(",")
    for mode in found:
        if mode not in allowed:
            raise UsageError(
                f"{option} {escape(text)}: {escape(mode)} is none of {', '.join(allowed)}",
                hint="write one, or several with commas between",
            )
    return list(dict.fromkeys(found))


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise UsageError(f"--num-draft-tokens {escape(text)} is no list of numbers", hint="write 7, or 7,15")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _card_of(name: str) -> Path:
    """The card of a drafter's folder, which has to be there before anything is measured."""
    card = Path(name) / "README.md"
    if not card.is_file():
        raise UsageError(
            f"--write-card: {escape(card)} is not there", hint="name local folders that have a card"
        )
    return card


def _write_card(card: Path, result: EvalResult) -> None:
    from m27quant.checkpoint.durable import write_durably
    from m27quant.drafters.card import with_evaluation
    from m27quant.drafters.evaluation_card import section

    text = with_evaluation(card.read_text(encoding="utf-8"), section(result))
    write_durably(card, text.encode("utf-8"))


def _table(result: EvalResult) -> Group:
    several = len({row.target for row in result.rows}) > 1
    headings = ["drafter", "target", "mode", "tau", *(f"C_{k}" for k in range(1, SHOWN + 1)), "lookup"]
    headings += (
        ["difference", "m_accept", "val loss", "blocks"] if several else ["m_accept", "val loss", "blocks"]
    )
    cells = [_cells(row, several) for row in result.rows]
    o, repeated = result.options, {row.target: row.repeated_8grams for row in result.rows}
    shares = ", ".join(f"{share:.1%}" for share in repeated.values())
    lines = [
        f"tau, C_k: {result.num_tokens:,} tokens behind {result.num_prompts} prompts of {escape(result.dataset)}"
        f"{', greedy' if not o.temperature else f', temperature {o.temperature:g}'}; "
        f"tokens that end a repeated 8-gram: {shares}",
        f"lookup: tau of prompt lookup at as many drafts; m_accept, val loss: teacher-forced, a block every {o.stride} "
        "tokens of the text",
    ]
    if several:
        lines.append("difference: of tau to the first target, with its standard error, paired by prompt")
    return Group(grid(headings, cells), *(Text(clean(line)) for line in ["", *lines]))


def _cells(row: EvalRow, several: bool) -> list[Any]:
    stats, proxy, difference = row.generation, row.proxy, row.difference
    c_k = [f"{c:.3f}" for c in stats.c_k[:SHOWN]]
    cells: list[Any] = [
        f"{Path(row.drafter).name} {row.setting}", Path(row.target.name).name, row.target.describe(),
        f"{stats.tau:.3f}", *c_k, *[""] * (SHOWN - len(c_k)), f"{1 + row.ngram.m_accept:.3f}",
    ]  # fmt: skip
    if several:
        cells.append(
            "" if difference is None else f"{difference.value:+.3f} ±{difference.standard_error:.3f}"
        )
    blank = ["", "", ""]
    cells += (
        blank
        if proxy is None
        else [f"{proxy.stats.m_accept:.3f}", f"{proxy.val_loss:.3f}", f"{proxy.blocks:,}"]
    )
    return cells
