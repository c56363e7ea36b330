"""The options of `m27quant drafter train`, by panel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from m27quant.cli.options import as_parser
from m27quant.cli.units import parse_size
from m27quant.errors import UsageError, escape

DRAFTER, LOSS, TRAINING, KEEPING = "Drafter", "Loss", "Training", "Measuring and keeping"
SHARES = {"hard": 0.0, "distill": 1.0}


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """`2,16,30` of an option."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {escape(text)} is no list of numbers", hint="write 2,16,30") from None


def share(text: str | None) -> float | None:
    """`hard`, `distill`, or the share of distillation, of --loss."""
    try:
        return None if text is None else SHARES[text] if text in SHARES else float(text)
    except ValueError:
        raise UsageError(
            f"--loss {escape(text)} is none", hint="write hard, distill, or a share like 0.5"
        ) from None


def parse_cache(text: str) -> int:
    """A size, or `none`."""
    return 0 if text in ("none", "0") else parse_size(text)


Kind = Annotated[
    str, typer.Argument(metavar="KIND", help="dflash or eagle3.", show_default=False)
]  # checked where the presets are
Target = Annotated[
    str,
    typer.Option(
        "--target", metavar="CHECKPOINT", show_default=False,
        help="What is drafted for: a folder or a Hub id; NVFP4, FP8 or BF16.",
    ),
]  # fmt: skip
Data = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="DATA", show_default=False,
        help="A folder of `drafter generate-data`, or a JSONL file; may be repeated.",
    ),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to make.", show_default=False)]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="l3h5 or dflash-b8, eagle3-32k: sizes for MiniMax-M2.7.", show_default=False,
        rich_help_panel=DRAFTER,
    ),
]  # fmt: skip

InitFrom = Annotated[
    str | None,
    typer.Option(
        "--init-from", metavar="DRAFTER", show_default=False, rich_help_panel=DRAFTER,
        help="A drafter, folder or Hub id, whose sizes and weights the run begins with.",
    ),
]  # fmt: skip


def _number(name: str, panel: str, text: str, least: float | None = None) -> Any:
    return typer.Option(name, min=least, help=text, show_default=False, rich_help_panel=panel)


Layers = Annotated[int | None, _number("--layers", DRAFTER, "DFlash: decoder layers; 3.", 1)]
Taps = Annotated[
    str | None,
    typer.Option(
        "--taps", metavar="N,N,...", show_default=False, rich_help_panel=DRAFTER,
        help="Hidden states of the target to read: 0 is the embedding, n the output of layer n - 1 counted from 0.",
    ),
]  # fmt: skip
BlockSize = Annotated[
    int | None, _number("--block-size", DRAFTER, "DFlash: slots of a block, the anchor's included; 16.", 2)
]
TrainBlockSizes = Annotated[
    str | None,
    typer.Option(
        "--train-block-sizes", metavar="N,N,...", show_default=False,
        help="DFlash: block sizes that steps alternate between, for a drafter that serves them all.",
        rich_help_panel=DRAFTER,
    ),
]  # fmt: skip
MaskToken = Annotated[
    int | None, _number("--mask-token", DRAFTER, "DFlash: the token that stands for what is drafted.", 0)
]
IntermediateSize = Annotated[int | None, _number("--intermediate-size", DRAFTER, "Width of the MLP.", 1)]
NumHeads = Annotated[int | None, _number("--num-heads", DRAFTER, "Query heads.", 1)]
NumKvHeads = Annotated[int | None, _number("--num-kv-heads", DRAFTER, "Key/value heads.", 1)]
HeadDim = Annotated[int | None, _number("--head-dim", DRAFTER, "Width of a head.", 2)]
RopeTheta = Annotated[float | None, _number("--rope-theta", DRAFTER, "Rotary base; the target's.")]
DraftVocabSize = Annotated[
    int | None,
    typer.Option(
        "--draft-vocab-size", "--draft-vocab", min=1, show_default=False, rich_help_panel=DRAFTER,
        help="EAGLE3: tokens that it knows; 32000.",
    ),
]  # fmt: skip
Layout = Annotated[
    str,
    typer.Option(
        "--layout", metavar="plain|speculators", rich_help_panel=DRAFTER,
        help="plain: z-lab's for DFlash, SpecForge's for EAGLE3.",
    ),
]  # fmt: skip
AnchorsPerSeq = Annotated[
    int | None, _number("--anchors-per-seq", LOSS, "DFlash: blocks of a sequence in one step; 512.", 1)
]
LossDecay = Annotated[
    float | None,
    _number("--loss-decay", LOSS, "Weight of a slot or step relative to the one before; 0.85, EAGLE3 0.8."),
]
LossGamma = Annotated[
    float | None, _number("--loss-gamma", LOSS, "DFlash, instead: slot k weighs exp(-(k-1)/gamma).")
]
NumSteps = Annotated[
    int | None, _number("--num-steps", LOSS, "EAGLE3: steps of the training-time test; 7.", 1)
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss", metavar="hard|distill|SHARE", show_default=False, rich_help_panel=LOSS,
        help="Cross-entropy with the token, with the target's distribution, or that share of the second.",
    ),
]  # fmt: skip
Steps = Annotated[int | None, _number("--steps", TRAINING, "Optimizer steps, instead of --epochs.", 1)]
Epochs = Annotated[float | None, _number("--epochs", TRAINING, "Times through the data; 6, EAGLE3 10.")]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Sequences of a rank at once.", rich_help_panel=TRAINING),
]
GradAccumulation = Annotated[
    int,
    typer.Option("--grad-accumulation", min=1, help="Batches to a step.", rich_help_panel=TRAINING),
]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer", metavar="adamw|muon", help="muon: for matrices, AdamW for the rest.", rich_help_panel=TRAINING
    ),
]  # fmt: skip
Lr = Annotated[
    float | None,
    _number("--lr", TRAINING, "Learning rate; AdamW 6e-4, EAGLE3 1e-4; Muon 0.02."),
]
AdamLr = Annotated[
    float,
    typer.Option("--adam-lr", help="With Muon: of what is no matrix, and heads.", rich_help_panel=TRAINING),
]
WeightDecay = Annotated[
    float | None, _number("--weight-decay", TRAINING, "Of matrices; AdamW 0.01, Muon 0.1.", 0)
]
Warmup = Annotated[
    float,
    typer.Option("--warmup", min=0, help="Share of the steps; from 1 on, steps.", rich_help_panel=TRAINING),
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule", metavar="cosine|linear|wsd|constant", help="wsd: linear over the last 60 %.",
        rich_help_panel=TRAINING,
    ),
]  # fmt: skip
Clip = Annotated[float | None, _number("--clip", TRAINING, "Largest norm of the gradient; 1, EAGLE3 0.5.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="bf16|f32", help="To compute with; masters are F32.", rich_help_panel=TRAINING
    ),
]
MaxLength = Annotated[
    int,
    typer.Option("--max-length", min=4, help="Tokens to which samples are cut.", rich_help_panel=TRAINING),
]
Heldout = Annotated[
    str | None,
    typer.Option(
        "--heldout", metavar="SHARE|DATA", show_default=False, rich_help_panel=KEEPING,
        help="What is measured and not learned: a share of the data (0.02), or other data.",
    ),
]  # fmt: skip
EvalEvery = Annotated[
    int | None, _number("--eval-every", KEEPING, "Steps between measurements; a tenth of all.", 1)
]
EvalSamples = Annotated[
    int,
    typer.Option("--eval-samples", min=1, help="Held-out samples to measure.", rich_help_panel=KEEPING),
]
SaveEvery = Annotated[
    int | None,
    _number("--save-every", KEEPING, "Steps between states; as often as costs a fiftieth of the time.", 1),
]
CacheSize = Annotated[
    int | None,
    typer.Option(
        "--cache-size", metavar="SIZE", parser=as_parser(parse_cache), show_default=False, rich_help_panel=KEEPING,
        help="The target's states to keep on disk while training: 8GiB, none.",
    ),
]  # fmt: skip
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an unfinished run.", rich_help_panel=KEEPING)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what was trained to OUT before.", rich_help_panel=KEEPING)
]
ForceUnlock = Annotated[
    bool,
    typer.Option(
        "--force-unlock", help="Take over from a run on another machine that is dead.", rich_help_panel=KEEPING
    ),
]  # fmt: skip
