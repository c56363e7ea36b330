"""The options of `m27quant bench`, by panel; those of `run` that it shares are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from m27quant.bench.settings import parse_blocks, parse_chains, parse_counts, parse_trees
from m27quant.cli import options as shared
from m27quant.cli.options import as_parser
from m27quant.cli.run_options import DRAFTING, SAMPLING

TASKS, SERVER = "Tasks", "Server"
FORMATS = ("human", "json", "markdown")


def _format(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(f"{text!r} is none of {', '.join(FORMATS)}")
    return text


Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="A local folder, or a Hub id: NVFP4, or an FP8 or BF16 MiniMax-M2.x; none with --base-url.",
        show_default=False,
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="math500, gsm8k, humaneval or mt-bench from the Hub, NAME=FILE with the same columns, or a JSONL or "
        "Parquet file; repeatable.  [default: math500]",
        show_default=False,
        rich_help_panel=TASKS,
    ),
]
Concurrency = Annotated[
    Any,
    typer.Option(
        "--concurrency",
        metavar="N,...",
        parser=as_parser(parse_counts),
        help="Requests in flight at once, one run each.",
        rich_help_panel=TASKS,
    ),
]
NumPrompts = Annotated[
    Any,
    typer.Option(
        "--num-prompts",
        metavar="N,...",
        parser=as_parser(parse_counts),
        help="Requests that are measured: one number, or one for each concurrency; rows are taken round and round.  "
        "[default: 32, or 4 for each request in flight]",
        show_default=False,
        rich_help_panel=TASKS,
    ),
]
Repeat = Annotated[
    int,
    typer.Option(
        "--repeat",
        min=1,
        help="Rounds, each second one in reverse order: on a busy machine.",
        rich_help_panel=TASKS,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="The most tokens of an answer.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "--temp", min=0.0, help="0 is greedy.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of all draws.", rich_help_panel=SAMPLING)
]
BlockSize = Annotated[
    Any,
    typer.Option(
        "--block-size",
        metavar="N,...",
        parser=as_parser(parse_blocks),
        help="DFlash blocks to compare, the anchor included.",
        show_default=False,
        rich_help_panel=DRAFTING,
    ),
]
NumDraftTokens = Annotated[
    Any,
    typer.Option(
        "--num-draft-tokens",
        metavar="N,...",
        parser=as_parser(parse_chains),
        help="Chains of so many drafts to compare, with any drafter.",
        show_default=False,
        rich_help_panel=DRAFTING,
    ),
]
Tree = Annotated[
    Any,
    typer.Option(
        "--tree",
        metavar="STEPS/TOPK/ROWS,...",
        parser=as_parser(parse_trees),
        help="EAGLE3 trees to compare, as SGLang's three flags: 3/4/8.",
        show_default=False,
        rich_help_panel=DRAFTING,
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        help="Measure this OpenAI-compatible server: http://127.0.0.1:8000/v1.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
BaselineUrl = Annotated[
    str | None,
    typer.Option(
        "--baseline-url",
        metavar="URL",
        help="The same model served without drafts, for the speed-up.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
ApiKey = Annotated[
    shared.Token | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        parser=shared.Token,
        envvar="M27QUANT_API_KEY",
        help="Sent to the server; the variable is safer, as others can see command lines.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The model's name there, where it has several.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=0.1,
        help="Seconds of silence after which a request has failed.",
        rich_help_panel=SERVER,
    ),
]
OutputFormat = Annotated[
    str,
    typer.Option(
        "--output-format",
        "--format",
        metavar="FORMAT",
        parser=as_parser(_format),
        help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.",
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output-file",
        "-o",
        metavar="FILE",
        help="Write the result here instead of to stdout.",
        show_default=False,
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.svg",
        help="Draw tokens/s by setting and acceptance by position.",
        show_default=False,
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]
