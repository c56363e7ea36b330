"""`m27quant eval`: how far quantized checkpoints are from their source, side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli.files import forget, refuse_foreign, write_file
from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.cli.stopping import graceful
from m27quant.errors import FindingsError, UsageError, escape

DATA = "Data"
TEXTS = "Texts"
TASKS = "Standard tasks"
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
NumPrompts = Annotated[
    int,
    typer.Option(
        "--num-prompts", min=0, help="Beginnings of windows that models go on from; 0 for no texts.",
        rich_help_panel=TEXTS,
    ),
]  # fmt: skip
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Of each text.", rich_help_panel=TEXTS)]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", metavar="NAME,...", help="Of lm-eval, such as gsm8k; needs pip install 'm27quant[eval]'.",
        show_default=False, rich_help_panel=TASKS,
    ),
]  # fmt: skip
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", min=0, help="Examples before a question; the task's own number where not given.",
        show_default=False, rich_help_panel=TASKS,
    ),
]  # fmt: skip
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Questions of each task; all where not given.",
        show_default=False, rich_help_panel=TASKS,
    ),
]  # fmt: skip
ApplyChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template", help="Ask as in a chat, under the model's template.", rich_help_panel=TASKS
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        "--include-path", metavar="FOLDER", help="With tasks of your own.", show_default=False, rich_help_panel=TASKS
    ),
]  # fmt: skip
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url", metavar="URL",
        help="Ask this server, which has the only candidate, instead of the builtin one; key: OPENAI_API_KEY.",
        show_default=False, rich_help_panel=TASKS,
    ),
]  # fmt: skip
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output-file", "-o", metavar="FILE", help="Write a page about it, HTML without any link.",
        show_default=False, rich_help_panel=shared.OUTPUT_PANEL,
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace FILE whatever it is; without it only a page of m27quant's.",
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]  # fmt: skip
WriteCard = Annotated[
    bool,
    typer.Option(
        "--write-card",
        help="Put the figures into each candidate's README.md and quantization_report.json.",
        rich_help_panel=shared.OUTPUT_PANEL,
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
    num_prompts: NumPrompts = 32,
    max_tokens: MaxTokens = 64,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    apply_chat_template: ApplyChatTemplate = False,
    include_path: IncludePath = None,
    base_url: BaseUrl = None,
    max_memory: shared.MaxMemory = None,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    max_ppl_ratio: MaxPplRatio = None,
    output_file: OutputFile = None,
    overwrite: Overwrite = False,
    write_card: WriteCard = False,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Measure what quantization costs: perplexity, KL divergence, agreement of tokens and routers, texts.

    All checkpoints go side by side, one layer in memory at a time.  Every figure has a 95 % interval; two checkpoints
    are compared window by window.  Models that fit into memory also write: how long greedy text stays the reference's,
    and how healthy it is.  Exit code 0: within the limits, or none were given; 1: beyond one, or NaN logits.

    Examples:
      m27quant eval ./m27-max ./m27-mse --reference MiniMaxAI/MiniMax-M2.7 --dataset heldout.txt -o eval.html

      m27quant eval ./m27-nvfp4 --reference ./m27 --dataset rows.jsonl --activations nvfp4,bf16 --json

      m27quant eval ./m27-nvfp4 --reference ./m27 --dataset heldout.txt --max-kl 0.05 --min-top1 0.9

      m27quant eval ./m27-nvfp4 --reference ./m27 --dataset heldout.txt --tasks gsm8k --limit 200
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.cli.eval_view import human
    from m27quant.evaluation.limits import Limits
    from m27quant.evaluation.run import evaluate

    asked = None
    if tasks is not None:
        from m27quant.evaluation.tasks import TaskOptions

        asked = TaskOptions(
            tasks=tuple(dict.fromkeys(tasks.split(","))), num_fewshot=num_fewshot, limit=limit,
            apply_chat_template=apply_chat_template, include_path=include_path,
        )  # fmt: skip
    else:
        given = {
            "--num-fewshot": num_fewshot is not None, "--limit": limit is not None, "--base-url": base_url is not None,
            "--apply-chat-template": apply_chat_template, "--include-path": include_path is not None,
        }  # fmt: skip
        for option in (name for name, is_given in given.items() if is_given):
            raise UsageError(f"{option} is for tasks alone", hint="add --tasks, such as --tasks gsm8k")
    folders = _with_cards(candidates) if write_card else []
    if output_file is not None:
        if not overwrite:
            refuse_foreign(output_file)
        forget(output_file)
    with show(output, enabled=not no_progress) as progress, graceful(output, "") as interrupted:
        result = evaluate(
            candidates, reference=reference, dataset=dataset, num_samples=num_samples, seq_len=seq_len,
            activations=_modes("--activations", activations, ("auto", "nvfp4", "bf16")),
            kv_cache_dtypes=_modes("--kv-cache-dtype", kv_cache_dtype, ("auto", "fp8", "bf16")),
            seed=seed, limits=Limits(max_kl=max_kl, min_top1=min_top1, max_ppl_ratio=max_ppl_ratio),
            num_prompts=num_prompts, max_tokens=max_tokens, tasks=asked, base_url=base_url,
            device=device, max_memory=max_memory, offline=offline, token=token.reveal() if token else None,
            say=output.status, progress=progress, stop=interrupted,
        )  # fmt: skip
    if output_file is not None:
        from m27quant.report.evaluation_page import render

        write_file(output_file, render(result).encode("ascii"))
        output.status(f"written to {output_file}")
    for name, folder in zip(candidates, folders, strict=False):
        from m27quant.report.evaluation_card import write_to

        write_to(folder, result.of(name))
        output.status(f"figures written into {folder}")
    output.result(
        result.document(),
        human=human(result),
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


def _with_cards(candidates: list[str]) -> list[Path]:
    """Folders that figures can be written into, which has to be known before anything is measured."""
    for name in candidates:
        if not (Path(name) / "README.md").is_file():
            raise UsageError(
                f"--write-card: {escape(Path(name) / 'README.md')} is not there",
                hint="name local folders that have a card",
            )
    return [Path(name) for name in candidates]
