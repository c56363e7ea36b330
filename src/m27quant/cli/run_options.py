"""The options of `m27quant run`, by panel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m27quant.errors import UsageError, escape

if TYPE_CHECKING:
    from m27quant.runtime.speculative.taps import TapOffset as TapOffsetValue

PROMPT, SAMPLING, DRAFTING, RUNTIME = "Prompt", "Sampling", "Drafting", "Runtime"


def _choice(*allowed: str) -> str:
    return f"{', '.join(allowed[:-1])} or {allowed[-1]}."


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A local folder, or a Hub id: NVFP4, or an FP8 or BF16 MiniMax-M2.x.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="Text to go on with; - reads stdin.", rich_help_panel=PROMPT),
]
Messages = Annotated[
    Path | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help="A conversation to answer: a JSON list of messages, or an object with messages and tools.",
        rich_help_panel=PROMPT,
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Take the prompt as a user's message, not as text.", rich_help_panel=PROMPT),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option("--system-prompt", help="First message of a chat.", rich_help_panel=PROMPT),
]
Tools = Annotated[
    Path | None,
    typer.Option("--tools", metavar="FILE", help="A JSON list of functions to call.", rich_help_panel=PROMPT),
]
Thinking = Annotated[
    bool,
    typer.Option("--thinking/--no-thinking", help="Think before answering.", rich_help_panel=PROMPT),
]
Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help='Many prompts: JSON lines of {"prompt": ...} or {"messages": ...}.',
        rich_help_panel=PROMPT,
    ),
]
OutputFile = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Where the answers to --input go.", rich_help_panel=PROMPT),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an unfinished --output.", rich_help_panel=PROMPT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that is there.", rich_help_panel=PROMPT)
]

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="The most tokens of an answer.", rich_help_panel=SAMPLING),
]
MinTokens = Annotated[
    int,
    typer.Option("--min-tokens", min=0, help="Nothing ends an answer before.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "--temp", help="0 is greedy; default: generation_config's.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Likeliest tokens only; 0 for all.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="The fewest tokens that reach this probability.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Least probability, relative to the likeliest.", rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1 makes what was said unlikelier.", rich_help_panel=SAMPLING
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option("--presence-penalty", help="Once for a token of the answer.", rich_help_panel=SAMPLING),
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", help="For each time it was used.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends an answer; repeatable.", rich_help_panel=SAMPLING),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Go on behind the end of a turn.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of all draws.", rich_help_panel=SAMPLING)
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        min=0,
        help="Likeliest tokens to report at each position (--json).",
        rich_help_panel=SAMPLING,
    ),
]

DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        "--draft-model",
        metavar="DRAFTER",
        help="A DFlash or EAGLE3 folder or Hub id, or ngram for prompt lookup.",
        show_default=False,
        rich_help_panel=DRAFTING,
    ),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(
        "--num-draft-tokens",
        min=1,
        help="Drafts a step; of an EAGLE3 tree the rows that are verified, its root included.",
        rich_help_panel=DRAFTING,
    ),
]
NumSteps = Annotated[
    int | None, typer.Option("--num-steps", min=1, help="Depth of EAGLE3's drafts.", rich_help_panel=DRAFTING)
]
EagleTopk = Annotated[
    int | None,
    typer.Option(
        "--eagle-topk", min=1, help="Branches of EAGLE3's tree; 1 is a chain.", rich_help_panel=DRAFTING
    ),
]
TapOffset = Annotated[
    str | None,
    typer.Option(
        "--drafter-tap-offset",
        metavar="auto|0|1",
        help="What is added to the config's layer ids; auto measures both. Default: by the config's layout.",
        show_default=False,
        rich_help_panel=DRAFTING,
    ),
]


def tap_offset(text: str | None) -> TapOffsetValue | None:
    """Of --drafter-tap-offset.

    Raises:
        UsageError: anything but auto, 0 and 1.
    """
    values: dict[str | None, Any] = {None: None, "auto": "auto", "0": 0, "1": 1}
    if text not in values:
        raise UsageError(f"--drafter-tap-offset is auto, 0 or 1, not {escape(text)}")
    found: TapOffsetValue | None = values[text]
    return found


RopeTheta = Annotated[
    float | None,
    typer.Option("--drafter-rope-theta", help="In place of the drafter's own.", rich_help_panel=DRAFTING),
]
CheckLossless = Annotated[
    bool,
    typer.Option(
        "--check-lossless",
        help="Answer without the drafter too and compare; exit code 1 if they differ.",
        rich_help_panel=DRAFTING,
    ),
]
ShowDrafts = Annotated[
    bool, typer.Option("--show-drafts", help="Colour accepted drafts.", rich_help_panel=DRAFTING)
]

Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="KIND",
        help=f"Of the experts' inputs: {_choice('auto', 'nvfp4', 'bf16')}",
        rich_help_panel=RUNTIME,
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help=f"{_choice('auto', 'fp8', 'bf16')} auto: as the checkpoint says.",
        rich_help_panel=RUNTIME,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="DTYPE", help=f"Of hidden states: {_choice('bfloat16', 'float32')}",
        rich_help_panel=RUNTIME,
    ),
]  # fmt: skip
Invariant = Annotated[
    bool | None,
    typer.Option(
        "--invariant/--fast",
        help="Bitwise the same output whatever runs beside it; default: on a CPU.",
        show_default=False,
        rich_help_panel=RUNTIME,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option("--max-model-len", min=2, help="Tokens of prompt and answer.", rich_help_panel=RUNTIME),
]
MaxNumSeqs = Annotated[
    int, typer.Option("--max-num-seqs", min=1, help="Answers worked on at once.", rich_help_panel=RUNTIME)
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Load without verify's checks of scales.", rich_help_panel=RUNTIME),
]
Stats = Annotated[
    bool,
    typer.Option(
        "--stats",
        help="Acceptance, times, memory; with a drafter also the speed without it.",
        rich_help_panel="Output",
    ),
]
