"""The options of `m27quant serve` that other commands do not have, by panel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli.options import Token, as_parser
from m27quant.cli.units import parse_size
from m27quant.cli.verify_options import GPUS, one_of

ENGINES = ("vllm", "sglang", "builtin")
SERVER, MACHINES, COMMAND, BUILTIN = "Server", "GPUs", "Command", "Builtin server"

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder of the checkpoint, or a Hub id: org/name or org/name@revision.",
        show_default=False,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="|".join(ENGINES),
        parser=one_of(*ENGINES),
        help="What serves: vLLM, SGLang, or the server that comes with m27quant.",
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        "--draft-model",
        metavar="DRAFTER",
        help="A DFlash or EAGLE3 folder or Hub id; builtin takes ngram, too.",
        show_default=False,
    ),
]
Print = Annotated[
    bool, typer.Option("--print", help="Print the command and do not run it.", rich_help_panel=COMMAND)
]
Compose = Annotated[
    Path | None,
    typer.Option(
        "--compose",
        metavar="DIR",
        help="Write compose.yaml and kubernetes.yaml there and do not run it.",
        rich_help_panel=COMMAND,
        show_default=False,
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image",
        help="Container image of --compose; without it the engine's own of the version that the flags are for.",
        rich_help_panel=COMMAND,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace files that --compose finds there.", rich_help_panel=COMMAND),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Check headers, index and configs only, not the scales.", rich_help_panel=COMMAND
    ),
]
Host = Annotated[
    str,
    typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=SERVER),
]
Port = Annotated[
    int,
    typer.Option(
        "--port", min=0, max=65535, help="Port to listen on; builtin: 0 takes a free one.", rich_help_panel=SERVER,
    ),
]  # fmt: skip
ApiKey = Annotated[
    Token | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        parser=Token,
        envvar="M27QUANT_API_KEY",
        help="What clients have to send; the variable is safer, as others can see command lines.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="The model's name in requests; without it as the engine has it.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=2,
        max=2**31 - 1,
        help="Tokens of prompt and answer; without it the model's limit, or what fits in memory.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        min=1,
        max=65536,
        help="Answers worked on at once; without it the engine's own number, builtin: 64.",
        show_default=False,
        rich_help_panel=SERVER,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        parser=one_of(*GPUS),
        help=f"GPU that serves; without it this machine's: {', '.join(GPUS)}.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tp",
        "--num-gpus",
        min=1,
        max=1024,
        help="GPUs that share every layer; without it the fewest that hold model and context.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
ExpertParallel = Annotated[
    int | None,
    typer.Option(
        "--ep",
        min=1,
        max=1024,
        help="GPUs among which whole experts are divided; without it only where slices would be too narrow.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
MemoryShare = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        min=0.1,
        max=1.0,
        help="Share of a GPU's memory for the engine.  [default: 0.9 for vLLM, 0.88 for SGLang, 0.85 on gb10]",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
NodeRank = Annotated[
    int,
    typer.Option(
        "--node-rank", min=0, help="Number of this machine, where several serve.", rich_help_panel=MACHINES
    ),
]
MasterAddr = Annotated[
    str | None,
    typer.Option(
        "--master-addr",
        metavar="HOST",
        help="Address of machine 0, where several serve.",
        rich_help_panel=MACHINES,
        show_default=False,
    ),
]
MaxQueue = Annotated[
    int | None,
    typer.Option(
        "--max-queue",
        min=0,
        help="Answers that may wait; further requests get 429.  [default: 256]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        help="Of one answer; requests for more get 400.  [default: as many as fit]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
MaxChoices = Annotated[
    int | None,
    typer.Option(
        "--max-choices",
        min=1,
        help="Answers to one request: n times its prompts.  [default: 64]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
MaxBody = Annotated[
    int | None,
    typer.Option(
        "--max-body",
        metavar="SIZE",
        parser=as_parser(parse_size),
        help="Of one request; larger ones get 413.  [default: 16MiB]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
RequestTimeout = Annotated[
    float | None,
    typer.Option(
        "--request-timeout",
        min=0.001,
        metavar="SECONDS",
        help="From a request's arrival to the end of its answer.  [default: 3600]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
DrainTimeout = Annotated[
    float | None,
    typer.Option(
        "--drain-timeout",
        min=0.001,
        metavar="SECONDS",
        help="What answers have to finish in after SIGTERM.  [default: 600]",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        help="Web pages from there may use the server; * for all; repeatable.",
        rich_help_panel=BUILTIN,
        show_default=False,
    ),
]
NoChatPage = Annotated[
    bool, typer.Option("--no-chat-page", help="Serve no page at /.", rich_help_panel=BUILTIN)
]
