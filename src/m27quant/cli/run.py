"""`m27quant run`: generate text from a checkpoint, alone or with a drafter."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli.output import Mode, Output
from m27quant.cli.progress import show
from m27quant.cli.run_input import read_conversation
from m27quant.errors import UsageError
from m27quant.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from m27quant.runtime.api import LLM
    from m27quant.runtime.speculative.load import DrafterOptions

QUIET_S = 3.0


def run(
    checkpoint: opt.Checkpoint,
    drafter: opt.DrafterOption = None,
    prompt: opt.Prompt = None,
    messages: opt.Messages = None,
    chat: opt.Chat = False,
    system_prompt: opt.SystemPrompt = None,
    tools: opt.Tools = None,
    thinking: opt.Thinking = True,
    input_file: opt.Input = None,
    output_file: opt.OutputFile = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    max_tokens: opt.MaxTokens = None,
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
    logprobs: opt.Logprobs = None,
    num_draft_tokens: opt.NumDraftTokens = None,
    num_steps: opt.NumSteps = None,
    eagle_topk: opt.EagleTopk = None,
    drafter_tap_offset: opt.TapOffset = None,
    drafter_rope_theta: opt.RopeTheta = None,
    check_lossless: opt.CheckLossless = False,
    show_drafts: opt.ShowDrafts = False,
    device: shared.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    activations: opt.Activations = "auto",
    kv_cache_dtype: opt.KvCacheDtype = "auto",
    invariant: opt.Invariant = None,
    max_memory: shared.MaxMemory = None,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = 64,
    no_verify: opt.NoVerify = False,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    stats: opt.Stats = False,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
    no_progress: shared.NoProgress = False,
) -> None:
    """Generate text from a checkpoint, with a speculative drafter if one is named.

    A drafter changes how fast tokens come, never which.  --prompt is text to go on with; --chat makes a
    question of it; without any prompt a chat begins, or stdin is read.

    Examples:
      m27quant run ./m27-nvfp4

      m27quant run ./m27-nvfp4 --drafter ./m27-dflash --prompt "def fib(n):" --max-tokens 128 --stats

      m27quant run ./m27-nvfp4 --drafter ngram --messages chat.json --check-lossless

      m27quant run ./m27-nvfp4 --input prompts.jsonl --output answers.jsonl --temperature 0
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    _refuse_mixed(prompt, messages, input_file, output_file, resume or overwrite)
    if check_lossless and drafter is None:
        raise UsageError(
            "--check-lossless compares with and without a drafter", hint="name one with --drafter"
        )
    rank, ranks = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if ranks > 1 and prompt is None and messages is None:
        raise UsageError(
            "several ranks answer --prompt or --messages", hint="run one process for --input or a chat"
        )
    if rank:  # all ranks compute the same answer; the first one gives it
        output = Output(Mode.QUIET, silent=True, stdout=io.StringIO())
    interactive = prompt is None and messages is None and input_file is None and sys.stdin.isatty()
    if interactive and (json or not sys.stdout.isatty()):
        raise UsageError(
            "nothing to answer", hint="pass --prompt, --messages or --input, or pipe a prompt in"
        )
    # Read when torch's thread pool is loaded: threads that spin at barriers make a shared machine crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.llm import load
    from m27quant.runtime.generation import SamplingParams
    from m27quant.runtime.options import RunOptions

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, max_tokens=max_tokens,
        min_tokens=min_tokens, stop=tuple(stop or ()), ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip
    settings = RunOptions(
        activations=activations,  # type: ignore[arg-type]  # RunOptions refuses others by name
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        device=device, invariant=invariant, max_memory=max_memory, max_model_len=max_model_len,
        max_num_seqs=max_num_seqs, seed=seed,
    )  # fmt: skip
    drafting = _drafting(
        drafter, num_draft_tokens, num_steps, eagle_topk, drafter_tap_offset, drafter_rope_theta
    )
    conversation = read_conversation(messages, tools, chat, system_prompt, thinking, prompt)
    notes: list[str] = []

    def say(line: str) -> None:
        notes.append(line)
        output.status(line)

    with show(output, enabled=not no_progress) as progress:
        llm = load(
            checkpoint, settings, drafter=drafter, drafter_options=drafting, check=not no_verify,
            revision=revision, offline=offline, token=token.reveal() if token else None,
            say=say, progress=loading(progress),
        )  # fmt: skip
    if input_file is not None:
        assert output_file is not None
        from m27quant.cli.run_many import answer_file

        answer_file(
            output, llm, params, input_file, output_file, conversation, resume=resume, overwrite=overwrite,
            identity=_identity(checkpoint, llm, drafter), no_progress=no_progress,
        )  # fmt: skip
    elif interactive:
        from m27quant.cli.run_chat import talk

        talk(output, llm, params, conversation, show_drafts=show_drafts)
    else:
        from m27quant.cli.run_one import answer_one

        text = sys.stdin.read() if prompt == "-" or (prompt is None and messages is None) else prompt
        answer_one(
            output, llm, params, text, conversation, notes, stats=stats, check_lossless=check_lossless,
            show_drafts=show_drafts,
        )  # fmt: skip


def _refuse_mixed(prompt: str | None, messages: object, rows: object, answers: object, flagged: bool) -> None:
    given = [
        name
        for name, value in (("--prompt", prompt), ("--messages", messages), ("--input", rows))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other")
    if (rows is None) != (answers is None):
        raise UsageError("--input and --output go together")
    if flagged and answers is None:
        raise UsageError("--resume and --overwrite are for --output")


def _drafting(
    drafter: str | None,
    num_draft_tokens: int | None,
    num_steps: int | None,
    eagle_topk: int | None,
    tap_offset: str | None,
    rope_theta: float | None,
) -> DrafterOptions | None:
    from m27quant.runtime.speculative.load import DrafterOptions

    given = DrafterOptions(num_draft_tokens, num_steps, eagle_topk, opt.tap_offset(tap_offset), rope_theta)
    if drafter is not None:
        return given
    if given != DrafterOptions():
        raise UsageError("options for a drafter, but no drafter", hint="name one with --drafter")
    return None


def loading(progress: ProgressCallback) -> Any:
    """Reports layers once loading has taken a moment; what is there at once needs no progress."""
    begun = time.monotonic()

    def listen(done: int, total: int) -> None:
        if time.monotonic() - begun < QUIET_S:
            return
        layer = done - 1 if done else None  # as people count, from 1: so many are loaded
        progress(Progress(stage="loading", fraction=done / total, layer=layer, num_layers=total))

    return listen


def _identity(checkpoint: str, llm: LLM, drafter: str | None) -> dict[str, Any]:
    """What besides the sampling an answer may depend on; a drafter is not among it in invariant mode."""
    found = {
        "checkpoint": checkpoint,
        "dtype": str(llm.model.dtype),
        "kv_cache": str(llm.engine.cache.shape.dtype),
    }
    return found if llm.model.invariant else {**found, "drafter": drafter}
