"""The options of `m27quant verify`, most of which `m27quant report` shares: what to check and how thoroughly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from m27quant.cli import options as shared

FINDINGS = "Findings"
LOGITS = "Logits"
OUTPUTS = "Outputs"
SERVING = "Serving"
FORMATS = ("human", "json", "junit", "sarif", "github", "gitlab")
ENGINES = ("vllm", "sglang")
GPUS = ("b200", "b300", "gb200", "rtx-pro-6000", "gb10", "h200", "h100")


def one_of(*names: str) -> Callable[[str], str]:
    """A parser that takes one of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is none of {', '.join(names)}")
        return text

    return shared.as_parser(parse)


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder of the checkpoint, or a Hub id: org/name or org/name@revision.",
        show_default=False,
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Read headers, index and configs only: seconds.")]
Full = Annotated[bool, typer.Option("--full", help="Read all weights too: minutes for 130 GB.")]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        help="The model that was quantized, a folder or a Hub id: --full compares every tensor with it, "
        "--logits what both answer, --outputs what both write.",
        show_default=False,
    ),
]
Logits = Annotated[
    bool,
    typer.Option(
        "--logits",
        help="Compare next-token probabilities with those of --source on --text, layer by layer.",
        rich_help_panel=LOGITS,
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text for --logits, cut into windows.",
        rich_help_panel=LOGITS,
        show_default=False,
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        "--num-samples", min=1, help="Most windows of the text.  [default: 64]", rich_help_panel=LOGITS,
        show_default=False,
    ),
]  # fmt: skip
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        min=2,
        help="Tokens of a window.  [default: 512]",
        rich_help_panel=LOGITS,
        show_default=False,
    ),
]
Outputs = Annotated[
    bool,
    typer.Option(
        "--outputs",
        help="Run the checkpoint here: experts on this device, texts, and --drafter; needs it in memory.",
        rich_help_panel=OUTPUTS,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines for --outputs, as `run --input` takes them, in place of the built-in prompts.",
        rich_help_panel=OUTPUTS,
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", min=1, help="Tokens of each answer.  [default: 128]", rich_help_panel=OUTPUTS,
        show_default=False,
    ),
]  # fmt: skip
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        "--activations",
        metavar="nvfp4|bf16",
        parser=one_of("nvfp4", "bf16"),
        help="What experts multiply: nvfp4 as on Blackwell, bf16 as elsewhere; "
        "without it nvfp4, if there are input scales.",
        rich_help_panel=LOGITS,
        show_default=False,
    ),
]
KvCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="fp8|bf16",
        parser=one_of("fp8", "bf16"),
        help="Keys and values; without it what config.json declares.",
        rich_help_panel=LOGITS,
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        parser=shared.as_parser(shared.parse_device),
        help="Of --logits and --outputs: auto, cpu, cuda or cuda:INDEX.  [default: auto]",
        rich_help_panel=LOGITS,
        show_default=False,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(ENGINES),
        parser=one_of(*ENGINES),
        help="Report only what concerns this engine; without it all count.",
        rich_help_panel=FINDINGS,
        show_default=False,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        parser=one_of(*GPUS),
        help=f"Also check serving on this GPU: {', '.join(GPUS)}.",
        rich_help_panel=SERVING,
        show_default=False,
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        max=1024,
        help="GPUs that share every layer; with --gpu alone, the fewest that hold the model.",
        rich_help_panel=SERVING,
        show_default=False,
    ),
]
ExpertParallel = Annotated[
    int | None,
    typer.Option(
        "--ep",
        min=1,
        max=1024,
        help="GPUs among which whole experts are divided.",
        rich_help_panel=SERVING,
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        max=2**31 - 1,
        help="Tokens whose keys and values must fit in memory.",
        rich_help_panel=SERVING,
        show_default=False,
    ),
]
Drafter = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Also check this DFlash or EAGLE3 drafter against the checkpoint.",
        rich_help_panel=SERVING,
        show_default=False,
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CODE",
        help="Report only these checks: M27-T001, or a beginning as in M27-T; may be repeated.",
        rich_help_panel=FINDINGS,
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CODE", help="Leave these out; may be repeated.", rich_help_panel=FINDINGS, show_default=False
    ),
]
FailOn = Annotated[
    str,
    typer.Option(
        metavar="error|warning",
        parser=one_of("error", "warning"),
        help="Mildest severity that ends in exit code 1.",
        rich_help_panel=FINDINGS,
    ),
]
ExitZero = Annotated[
    bool, typer.Option("--exit-zero", help="End in 0 whatever is found.", rich_help_panel=FINDINGS)
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Leave out the findings that this file accepts.",
        rich_help_panel=FINDINGS,
        show_default=False,
    ),
]
WriteBaseline = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Accept all findings of this run: write them here and end in 0.",
        rich_help_panel=FINDINGS,
        show_default=False,
    ),
]
OutputFormat = Annotated[
    str,
    typer.Option(
        metavar="|".join(FORMATS),
        parser=one_of(*FORMATS),
        help="How to print the result.",
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the result here instead of to stdout.",
        rich_help_panel=shared.OUTPUT_PANEL,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of --source, or, without one, of CHECKPOINT, where it is a Hub id.",
        show_default=False,
        rich_help_panel=shared.HUB_PANEL,
    ),
]
