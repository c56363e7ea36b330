"""`m27quant verify`: everything that engines would load without a word, and the exit code that CI goes by."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from m27quant.cli import options as shared
from m27quant.cli import verify_options as ask
from m27quant.cli.files import forget, write_file
from m27quant.cli.output import Output
from m27quant.cli.verifying import Request, from_here, given, run, without_accepted
from m27quant.errors import FindingsError, M27Error, UsageError, escape

if TYPE_CHECKING:
    from m27quant.verify.findings import VerifyResult


def verify(
    checkpoint: ask.Checkpoint,
    quick: ask.Quick = False,
    full: ask.Full = False,
    source: ask.SourceOption = None,
    logits: ask.Logits = False,
    text: ask.TextFile = None,
    num_samples: ask.NumSamples = None,
    seq_len: ask.SeqLen = None,
    outputs: ask.Outputs = False,
    prompts: ask.Prompts = None,
    max_tokens: ask.MaxTokens = None,
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
    fail_on: ask.FailOn = "error",
    exit_zero: ask.ExitZero = False,
    baseline: ask.Baseline = None,
    write_baseline: ask.WriteBaseline = None,
    output_format: ask.OutputFormat = "human",
    output_file: ask.OutputFile = None,
    revision: ask.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    no_progress: shared.NoProgress = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Check that an NVFP4 checkpoint of MiniMax-M2.x is right, whoever made it.

    Exit code 0: nothing of severity --fail-on or worse; 1: there is; 3: no checkpoint, or not readable.  A file that
    --output-file names says so in every case, and is never that of a former run.

    Examples:
      m27quant verify ./m27-nvfp4

      m27quant verify ./m27-nvfp4 --full --source MiniMaxAI/MiniMax-M2.7

      m27quant verify ./m27-nvfp4 --logits --source MiniMaxAI/MiniMax-M2.7 --text book.txt

      m27quant verify ./m27-nvfp4 --outputs --source MiniMaxAI/MiniMax-M2.7 --drafter ./m27-dflash

      m27quant verify ./m27-nvfp4 --quick --engine vllm --output-format github

      m27quant verify ./m27-nvfp4 --quick --engine vllm --gpu b200 --tp 2 --context 196608

      m27quant verify ./m27-nvfp4 --output-format sarif --output-file verify.sarif
    """
    kind = _format(output_format, json)
    output = Output.open(json=kind == "json", quiet=quiet, verbose=verbose)
    asked = Request(
        checkpoint=checkpoint, quick=quick, full=full, source=source, logits=logits,
        logits_options=given(text=text, num_samples=num_samples, seq_len=seq_len),
        outputs=outputs, outputs_options=given(prompts=prompts, max_tokens=max_tokens),
        computing=given(activations=activations, kv_cache_dtype=kv_cache_dtype, device=device),
        engine=engine, gpu=gpu, tp=tp, ep=ep, context=context, drafter=drafter,
        select=tuple(select or ()), ignore=tuple(ignore or ()),
        revision=revision, offline=offline, token=token, no_progress=no_progress,
    )  # fmt: skip
    with _failing_in_words(output, asked, kind, fail_on, output_file):
        _, result = run(output, asked)
        result, accepted = _accept(output, result, baseline, write_baseline)
        _show(output, result, kind, fail_on, output_file, accepted)
    _end(result, fail_on, exit_zero)


def _format(output_format: str, json: bool) -> str:
    if json and output_format not in ("human", "json"):
        raise UsageError(f"--json and --output-format {output_format} exclude each other")
    return "json" if json else output_format


@contextmanager
def _failing_in_words(
    output: Output, asked: Request, kind: str, fail_on: str, output_file: Path | None
) -> Iterator[None]:
    """Where no result comes about, the file of this run says why; that of a former run is gone from the start."""
    if output_file is not None:
        forget(output_file)
    try:
        yield
    except M27Error as fault:
        from m27quant.verify.unverified import unverified

        result = unverified(from_here(asked.checkpoint), asked.level, fault)
        _summarize(output, result, kind)
        if output_file is not None:
            _write(output, output_file, _texts(result, fail_on, 0)[kind]() + "\n", fault)
        raise


def _write(output: Output, path: Path, text: str, fault: M27Error) -> None:
    """What cannot be written either does not hide why the run failed."""
    try:
        write_file(path, text.encode())
    except M27Error as second:
        if second.message != fault.message:
            output.warning(second.message, hint=second.hint)


def _accept(
    output: Output, result: VerifyResult, baseline: Path | None, write_baseline: Path | None
) -> tuple[VerifyResult, int]:
    """The result without the findings that are accepted, and how many those are."""
    from m27quant.report.text import plural
    from m27quant.verify.baseline import to_baseline

    if write_baseline is not None:
        if baseline is not None:
            without_accepted(result, baseline)  # for its faults: the new file holds all that is found
        write_file(write_baseline, to_baseline(result.findings).encode())
        output.status(f"{plural(len(result.findings), 'finding')} accepted in {write_baseline}")
        return dataclasses.replace(result, findings=()), len(result.findings)
    if baseline is None:
        return result, 0
    result, accepted = without_accepted(result, baseline)
    output.status(f"{plural(accepted, 'finding')} accepted by {baseline}")
    return result, accepted


def _texts(result: VerifyResult, fail_on: str, accepted: int) -> dict[str, Callable[[], str]]:
    from m27quant.report import document, github, gitlab, human, junit, sarif

    return {
        "human": lambda: human.render(result),
        "json": lambda: document.render(result, accepted=accepted),
        "junit": lambda: junit.render(result, fail_on=fail_on),
        "sarif": lambda: sarif.render(result),
        "github": lambda: github.render(result),
        "gitlab": lambda: gitlab.render(result),
    }


def _show(
    output: Output,
    result: VerifyResult,
    kind: str,
    fail_on: str,
    output_file: Path | None,
    accepted: int,
) -> None:
    from m27quant.report import document, human

    _summarize(output, result, kind)
    if output_file is not None:
        write_file(output_file, (_texts(result, fail_on, accepted)[kind]() + "\n").encode())
        output.status(f"{human.verdict(result)}; written to {output_file}")
    elif kind in ("human", "json"):
        content = document.document(result, accepted=accepted)
        output.result(content, human=human.styled(result, output.width), quiet=human.concise(result))
    else:
        text = _texts(result, fail_on, accepted)[kind]()
        output.result({}, human=text, quiet=text)


def _summarize(output: Output, result: VerifyResult, kind: str) -> None:
    """Add to the runner's file; without it the annotations still say all."""
    named = os.environ.get("GITHUB_STEP_SUMMARY")
    if kind != "github" or not named:
        return
    from m27quant.report.github import step_summary

    try:
        with Path(named).open("a", encoding="utf-8") as file:
            file.write(step_summary(result))
    except OSError as fault:
        output.warning(f"GITHUB_STEP_SUMMARY: {named}: {fault.strerror}")


def _end(result: VerifyResult, fail_on: str, exit_zero: bool) -> None:
    from m27quant.report.text import summary

    failing = ("error",) if fail_on == "error" else ("error", "warning")
    worst = next((f for f in result.findings if f.severity in failing), None)
    if worst is not None and not exit_zero:
        raise FindingsError(
            f"{escape(result.checkpoint)}: {summary(result)}",
            hint=f"`m27quant explain {worst.check.code}` says more",
        )
