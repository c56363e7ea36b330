"""`m27quant report`: one page about a checkpoint, for people to look at and to pass on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m27quant.cli import options as shared
from m27quant.cli import verify_options as ask
from m27quant.cli.files import forget, refuse_foreign, write_file
from m27quant.cli.output import Output
from m27quant.cli.verifying import Request, given, run, without_accepted
from m27quant.errors import UsageError

if TYPE_CHECKING:
    from m27quant.verify.findings import VerifyResult

STDOUT = Path("-")

OutputFile = Annotated[
    Path,
    typer.Option(
        "--output-file",
        "-o",
        metavar="FILE",
        help="Where the page goes; - is stdout.",
        rich_help_panel=shared.OUTPUT_PANEL,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace FILE whatever it is; without it only a page of m27quant's.",
        rich_help_panel=shared.OUTPUT_PANEL,
    ),
]


def report(
    checkpoint: ask.Checkpoint,
    output_file: OutputFile,
    overwrite: Overwrite = False,
    full: ask.Full = False,
    source: ask.SourceOption = None,
    logits: ask.Logits = False,
    text: ask.TextFile = None,
    num_samples: ask.NumSamples = None,
    seq_len: ask.SeqLen = None,
    activations: ask.ActivationsOption = None,
    kv_cache_dtype: ask.KvCacheOption = None,
    device: ask.DeviceOption = None,
    engine: ask.Engine = None,
    gpu: ask.Gpu = None,
    tp: ask.TensorParallel = None,
    ep: ask.ExpertParallel = None,
    context: ask.Context = None,
    drafter: ask.Drafter = None,
    select: ask.Select = None,
    ignore: ask.Ignore = None,
    baseline: ask.Baseline = None,
    revision: ask.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Write one self-contained HTML page: verdict, sizes, SQNR and scales by layer and expert, findings.

    What is checked is asked for as in `m27quant verify`.  Whatever was found, exit code 0 means that the page was
    written: `m27quant verify` is what a script asks.

    Examples:
      m27quant report ./m27-nvfp4 -o report.html

      m27quant report ./m27-nvfp4 -o report.html --full --source MiniMaxAI/MiniMax-M2.7 --gpu b200 --tp 2

      m27quant report ./m27-nvfp4 -o - > report.html
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    if output_file == STDOUT and json:
        raise UsageError("--json and --output-file - both want stdout", hint="give a file's name")
    if output_file != STDOUT:
        if not overwrite:
            refuse_foreign(output_file)
        forget(output_file)
    asked = Request(
        checkpoint=checkpoint, full=full, source=source, logits=logits,
        logits_options=given(text=text, num_samples=num_samples, seq_len=seq_len),
        computing=given(activations=activations, kv_cache_dtype=kv_cache_dtype, device=device),
        engine=engine, gpu=gpu, tp=tp, ep=ep, context=context, drafter=drafter,
        select=tuple(select or ()), ignore=tuple(ignore or ()),
        revision=revision, offline=offline, token=token, no_progress=no_progress,
    )  # fmt: skip
    location, result = run(output, asked)
    accepted = 0
    if baseline is not None:
        result, accepted = without_accepted(result, baseline)
    page = _page(location.folder, result, accepted)
    if output_file == STDOUT:
        output.stdout.write(page)
        return
    from m27quant.report.text import summary

    write_file(output_file, page.encode("ascii"))
    counts = {s: sum(f.severity == s for f in result.findings) for s in ("error", "warning", "note")}
    document = {"output_file": str(output_file), "bytes": len(page), "ok": result.ok, "summary": counts}
    word = "passed" if result.ok else "failed"
    output.result(document, human=f"{word}: {summary(result)}; written to {output_file}", quiet=output_file)


def _page(folder: Path, result: VerifyResult, accepted: int) -> str:
    from m27quant.checkpoint.card import licence_of
    from m27quant.report.html import Page, render
    from m27quant.report.measured import measure
    from m27quant.report.recorded import read_recorded

    recorded, unrecorded = read_recorded(folder)
    page = Page(
        result=result,
        measured=measure(folder),
        recorded=recorded,
        unrecorded=unrecorded,
        licence=licence_of(folder),
        accepted=accepted,
    )
    return render(page)
