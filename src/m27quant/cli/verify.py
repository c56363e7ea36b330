"""`m27quant verify`: everything that engines would load without a word, and the exit code that CI goes by."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m27quant.cli import options as shared
from m27quant.cli.output import Output
from m27quant.cli.progress import show
from m27quant.errors import FindingsError, UsageError, escape

if TYPE_CHECKING:
    from m27quant.verify.findings import VerifyResult
    from m27quant.verify.full import SourceModel
    from m27quant.verify.logits import LogitsOptions
    from m27quant.verify.run import Level

FINDINGS = "Findings"
LOGITS = "Logits"
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
        help="Folder of the checkpoint.",
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
        "--logits what both answer.",
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
        help="Of --logits: auto, cpu, cuda or cuda:INDEX.  [default: auto]",
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


def verify(
    checkpoint: Checkpoint,
    quick: Quick = False,
    full: Full = False,
    source: SourceOption = None,
    logits: Logits = False,
    text: TextFile = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    activations: ActivationsOption = None,
    kv_cache_dtype: KvCacheOption = None,
    device: DeviceOption = None,
    engine: Engine = None,
    gpu: Gpu = None,
    tp: TensorParallel = None,
    ep: ExpertParallel = None,
    context: Context = None,
    drafter: Drafter = None,
    select: Select = None,
    ignore: Ignore = None,
    fail_on: FailOn = "error",
    exit_zero: ExitZero = False,
    baseline: Baseline = None,
    write_baseline: WriteBaseline = None,
    output_format: OutputFormat = "human",
    output_file: OutputFile = None,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Check that an NVFP4 checkpoint of MiniMax-M2.x is right, whoever made it.

    Exit code 0: nothing of severity --fail-on or worse; 1: there is; 3: no checkpoint, or not readable.

    Examples:
      m27quant verify ./m27-nvfp4

      m27quant verify ./m27-nvfp4 --full --source MiniMaxAI/MiniMax-M2.7

      m27quant verify ./m27-nvfp4 --logits --source MiniMaxAI/MiniMax-M2.7 --text book.txt

      m27quant verify ./m27-nvfp4 --quick --engine vllm --output-format github

      m27quant verify ./m27-nvfp4 --quick --engine vllm --gpu b200 --tp 2 --context 196608

      m27quant verify ./m27-nvfp4 --output-format sarif --output-file verify.sarif
    """
    kind = _format(output_format, json)
    chosen = {
        "text": text, "num_samples": num_samples, "seq_len": seq_len, "activations": activations,
        "kv_cache_dtype": kv_cache_dtype, "device": device,
    }  # fmt: skip
    given = {name: value for name, value in chosen.items() if value is not None}
    _check_logits(logits, source, given)
    level = _level(quick, full, source, logits)
    output = Output.open(json=kind == "json", quiet=quiet, verbose=verbose)
    from m27quant.verify.run import verify_checkpoint
    from m27quant.verify.serving import Serving

    with show(output, enabled=(full or logits) and not no_progress) as progress:
        result = verify_checkpoint(
            checkpoint,
            level=level,
            engine=engine,  # type: ignore[arg-type]  # checked by its parser
            select=tuple(select or ()),
            ignore=tuple(ignore or ()),
            source=_source(source, revision, offline, token),
            progress=progress,
            serving=Serving(gpu=gpu, tp=tp, ep=ep, context=context),
            drafter=drafter,
            logits=_logits(given) if logits else None,
        )
    if not result.checks_run:
        raise UsageError(
            "no check is left that this level and engine apply",
            hint="take fewer of --select, --ignore, --quick",
        )
    result, accepted = _accept(output, result, baseline, write_baseline)
    _show(output, result, kind, fail_on, output_file, accepted)
    _end(result, fail_on, exit_zero)


def _check_logits(logits: bool, source: str | None, given: Mapping[str, object]) -> None:
    if not logits and given:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{option} is of --logits, which is not given")
    if logits and (source is None or "text" not in given):
        raise UsageError("--logits needs a model and a text", hint="add --source MODEL --text FILE")


def _logits(given: Mapping[str, Any]) -> LogitsOptions:
    from m27quant.verify.logits import LogitsOptions

    return LogitsOptions(**given)


def _level(quick: bool, full: bool, source: str | None, logits: bool) -> Level:
    if quick and full:
        raise UsageError("--quick and --full exclude each other")
    if source is not None and not full and not logits:
        raise UsageError("--source is compared with all weights", hint="add --full, or --logits")
    return "quick" if quick else "full" if full else "default"


def _source(
    source: str | None, revision: str | None, offline: bool, token: shared.Token | None
) -> SourceModel | None:
    if source is None:
        if revision is not None:
            raise UsageError("--revision is of --source, which is not given")
        return None
    from m27quant.verify.full import SourceModel

    secret = token.reveal() if token else None
    return SourceModel(model=source, revision=revision, offline=offline, token=secret)


def _format(output_format: str, json: bool) -> str:
    if json and output_format not in ("human", "json"):
        raise UsageError(f"--json and --output-format {output_format} exclude each other")
    return "json" if json else output_format


def _accept(
    output: Output, result: VerifyResult, baseline: Path | None, write_baseline: Path | None
) -> tuple[VerifyResult, int]:
    """The result without the findings that are accepted, and how many those are."""
    from m27quant.verify.baseline import apply_baseline, read_baseline, to_baseline

    accepted = 0
    if baseline is not None:
        fresh, known = apply_baseline(result.findings, read_baseline(baseline))
        if write_baseline is None:
            result, accepted = dataclasses.replace(result, findings=fresh), len(known)
            output.status(f"{accepted} findings are accepted by {baseline}")
    if write_baseline is not None:
        _write(write_baseline, to_baseline(result.findings))
        output.status(f"{len(result.findings)} findings are accepted in {write_baseline}")
        result, accepted = dataclasses.replace(result, findings=()), len(result.findings)
    return result, accepted


def _show(
    output: Output,
    result: VerifyResult,
    kind: str,
    fail_on: str,
    output_file: Path | None,
    accepted: int,
) -> None:
    from m27quant.report import document, github, gitlab, human, junit, sarif

    result = dataclasses.replace(result, checkpoint=_from_here(result.checkpoint))
    texts: dict[str, Callable[[], str]] = {
        "human": lambda: human.render(result),
        "json": lambda: document.render(result, accepted=accepted),
        "junit": lambda: junit.render(result, fail_on=fail_on),
        "sarif": lambda: sarif.render(result),
        "github": lambda: github.render(result),
        "gitlab": lambda: gitlab.render(result),
    }
    if kind == "github" and (summary_file := os.environ.get("GITHUB_STEP_SUMMARY")):
        _append(output, Path(summary_file), github.step_summary(result))
    if output_file is not None:
        _write(output_file, texts[kind]() + "\n")
        output.status(f"{human.verdict(result)}; written to {output_file}")
    elif kind in ("human", "json"):
        content = document.document(result, accepted=accepted)
        output.result(content, human=human.styled(result), quiet=human.concise(result))
    else:
        text = texts[kind]()
        output.result({}, human=text, quiet=text)


def _end(result: VerifyResult, fail_on: str, exit_zero: bool) -> None:
    from m27quant.report.text import summary

    failing = ("error",) if fail_on == "error" else ("error", "warning")
    worst = next((f for f in result.findings if f.severity in failing), None)
    if worst is not None and not exit_zero:
        raise FindingsError(
            f"{escape(result.checkpoint)}: {summary(result)}",
            hint=f"`m27quant explain {worst.check.code}` says more",
        )


def _from_here(checkpoint: str) -> str:
    """A folder below the working directory by its relative name, which is how CI systems find files."""
    path, here = Path(checkpoint), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else checkpoint


def _write(path: Path, text: str) -> None:
    from m27quant.checkpoint.durable import raise_for_os_error, write_durably

    data = text.encode("utf-8")
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing to replace
        try:
            path.write_bytes(data)
        except OSError as fault:
            raise_for_os_error(fault, path)
    else:
        write_durably(path, data)


def _append(output: Output, path: Path, text: str) -> None:
    """Add to the runner's file; without it the annotations still say all."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as fault:
        output.warning(f"GITHUB_STEP_SUMMARY: {path}: {fault.strerror}")
