"""`m27quant drafter generate-data`: the target answers prompts, for a drafter to learn from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.cli.stopping import command_line, graceful, resume_command
from m27quant.errors import UsageError, escape

DATA = "Data"


def parse_range(text: str) -> tuple[int, int]:
    """`64` or `16:256`."""
    least, _, most = text.partition(":")
    if (
        not least.isascii()
        or not least.isdigit()
        or not (most or least).isascii()
        or not (most or least).isdigit()
    ):
        raise UsageError(
            f"--prompt-tokens {escape(text)} is no range of token counts", hint="write 64 or 16:256"
        )
    return int(least), int(most or least)


Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="The checkpoint that answers: a folder or a Hub id.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)]
Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        metavar="FILE|HUB_ID",
        help="Prompts: JSON lines, Parquet, text (pieces of it), or a Hub id; repeatable.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=1, help="Prompts that are answered.", rich_help_panel=DATA)
]
PromptTokens = Annotated[
    str,
    typer.Option(
        "--prompt-tokens",
        metavar="FEWEST:MOST",
        help="Length of the pieces that prompts of text are; short ones are as likely as long ones.",
        rich_help_panel=DATA,
    ),
]
Beginnings = Annotated[
    float,
    typer.Option(
        "--beginnings", min=0, max=1, help="Share of pieces that begin where a document does.",
        rich_help_panel=DATA,
    ),
]  # fmt: skip
Chat = Annotated[
    bool, typer.Option("--chat", help="Take a row's prompt as a user's message.", rich_help_panel=DATA)
]
ShardSize = Annotated[
    int, typer.Option("--shard-size", min=1, help="Samples of a file.", rich_help_panel=DATA)
]
Concurrency = Annotated[
    int,
    typer.Option(
        "--concurrency", "--max-num-seqs", min=1, help="Answers worked on at once.",
        rich_help_panel=opt.RUNTIME,
    ),
]  # fmt: skip
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="The most tokens of an answer.", rich_help_panel=opt.SAMPLING),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with unfinished data.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace data that are there.")]


def generate_data(
    target: Target,
    out: Out,
    dataset: Datasets,
    num_samples: NumSamples = 1000,
    prompt_tokens: PromptTokens = "16:256",
    beginnings: Beginnings = 0.25,
    chat: Chat = False,
    thinking: opt.Thinking = True,
    system_prompt: opt.SystemPrompt = None,
    shard_size: ShardSize = 256,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_tokens: MaxTokens = 128,
    min_tokens: opt.MinTokens = 0,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    presence_penalty: opt.PresencePenalty = 0.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    stop: opt.Stop = None,
    ignore_eos: opt.IgnoreEos = False,
    seed: opt.Seed = 0,
    concurrency: Concurrency = 64,
    device: shared.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    activations: opt.Activations = "auto",
    kv_cache_dtype: opt.KvCacheDtype = "auto",
    invariant: opt.Invariant = None,
    max_memory: shared.MaxMemory = None,
    max_model_len: opt.MaxModelLen = None,
    no_verify: opt.NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Let TARGET answer prompts, for a drafter to learn from.

    Prompts are rows with prompt, messages, text or prompt_token_ids, or pieces of a text.  OUT gets JSON-lines
    shards and manifest.json; every answer is durable when it is there, and --resume goes on behind it.

    Examples:
      m27quant drafter generate-data ./m27-nvfp4 data --dataset prompts.jsonl --num-samples 10000 --max-tokens 2048

      m27quant drafter generate-data examples/tiny-m27 data --dataset train.txt --temperature 0 --ignore-eos
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.cli.run import loading
    from m27quant.drafters.generate import DataOptions, generate_drafter_data
    from m27quant.drafters.text_data import Cut
    from m27quant.runtime.generation import SamplingParams
    from m27quant.runtime.options import RunOptions

    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, max_tokens=max_tokens,
        min_tokens=min_tokens, stop=tuple(stop or ()), ignore_eos=ignore_eos,
    )  # fmt: skip
    cut = Cut(
        prompt_tokens=parse_range(prompt_tokens), beginnings=beginnings, chat=chat, thinking=thinking,
        system_prompt=system_prompt,
    )  # fmt: skip
    settings = RunOptions(
        activations=activations,  # type: ignore[arg-type]  # RunOptions refuses others by name
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        device=device, invariant=invariant, max_memory=max_memory, max_model_len=max_model_len,
        max_num_seqs=concurrency,
    )  # fmt: skip
    with show(output, enabled=not no_progress) as progress, graceful(output, resume_command()) as interrupted:
        result = generate_drafter_data(
            target, list(dataset), out,
            DataOptions(
                num_samples=num_samples, sampling=sampling, cut=cut, seed=seed, shard_size=shard_size
            ),
            run_options=settings, resume=resume, overwrite=overwrite, command=command_line({str(out): "OUT"}),
            check=not no_verify, revision=revision, offline=offline, token=token.reveal() if token else None,
            say=output.status, loading=loading(progress), progress=progress, stop=interrupted,
        )  # fmt: skip
    document = {
        "output": str(result.folder), "samples": result.num_samples, "failed": result.num_failed,
        "tokens": result.num_tokens, "new_samples": result.num_new, "tokens_per_s": result.tokens_per_s,
    }  # fmt: skip
    speed = f", {result.tokens_per_s:,.0f} tokens/s" if result.tokens_per_s else ""
    failed = f", {result.num_failed} prompts without an answer" if result.num_failed else ""
    human = f"{result.folder}: {result.num_samples:,} samples, {result.num_tokens:,} tokens of answers{speed}{failed}"
    output.result(document, human=human, quiet=result.folder)
