"""`--logits`: a checkpoint's answers against its source's on a text, both computed layer by layer, side by side.

In memory at a time: one layer's attention or one expert of each model, and the hidden states of all tokens (24 bytes
a token and hidden dimension); so that it works where neither model fits.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.quantized import QuantizedSource, same_model
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.strict_json import read_bytes
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.device import pick_device
from m27quant.runtime.divergence import joined, sqnr_db, squares, token_scores
from m27quant.runtime.streamed import (
    Activations,
    KvCache,
    Precision,
    StreamedModel,
    make_batches,
)
from m27quant.verify.collect import Findings
from m27quant.verify.comparison import Comparison, figures, report

MAX_TEXT_BYTES = 256 * 2**20
BATCH_TOKENS = 2048
MIN_EXPERT_TOKENS = 32
"""An expert that fewer of the text's tokens go to is not judged: one outlier would decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOptions:
    """On what to compare and in which precision; the command's options have the same names."""

    text: Path
    """A UTF-8 text file, cut into windows."""
    num_samples: int = 64
    """At most so many windows, from the beginning."""
    seq_len: int = 512
    """Tokens of a window."""
    activations: Activations | None = None
    """None: nvfp4 where the checkpoint has input scales, else bf16."""
    kv_cache_dtype: KvCache | None = None
    """None: what config.json declares."""
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Windows:
    """Pieces of one text and what follows each of their tokens."""

    ids: list[torch.Tensor]
    """int64 [length] each."""
    targets: torch.Tensor
    """int64 [T]: the token behind each one, -1 behind the last."""


def compare_with_source(
    checkpoint: Path,
    source: Source,
    options: LogitsOptions,
    found: Findings,
    *,
    progress: ProgressCallback = ignore,
) -> dict[str, Any]:
    """Run the checkpoint and the source that it was made from over the text; reports findings, returns the figures.

    Raises:
        UsageError: an empty text, a window too long.
        CheckpointError: a checkpoint or source that cannot be computed, or not of one model.
        EnvironmentFault: a source, file or device that is not there.
    """
    device = pick_device(options.device)
    check_layout(source)
    with QuantizedSource(Location(checkpoint)) as ours:
        same_model(ours.config, source.config)
        precision = Precision(
            options.activations or ("nvfp4" if ours.has_input_scales else "bf16"),
            options.kv_cache_dtype or ("fp8" if ours.declares_fp8_kv else "bf16"),
        )
        ours.check_layout(input_scales=precision.activations == "nvfp4")
        windows = read_windows(options, source)
        result = compare(source, ours, windows, precision, device=device, progress=progress)
    report(result, found)
    return {
        "text": escape(options.text.name),
        "num_tokens": len(result.kl),
        "num_windows": len(windows.ids),
        "seq_len": options.seq_len,
        **asdict(precision),
        **figures(result),
    }


def read_windows(options: LogitsOptions, source: Source) -> Windows:
    """The text in tokens of the source's tokenizer, in windows that do not overlap."""
    config = source.config
    if not 2 <= options.seq_len <= config.max_position_embeddings or options.num_samples < 1:
        raise UsageError(
            f"--seq-len {options.seq_len}, --num-samples {options.num_samples}: a window needs 2 to "
            f"{config.max_position_embeddings} tokens, and there must be one"
        )
    try:
        text = read_bytes(options.text, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise CheckpointError(f"{escape(options.text)}: not UTF-8 at byte {fault.start}") from None
    ids = torch.tensor(Tokenizer(source.folder).text(text), dtype=torch.int64)
    count = min(options.num_samples * options.seq_len, len(ids))
    if count < 2:
        raise UsageError(f"{escape(options.text)}: fewer than two tokens", hint="name a longer text")
    if int(ids.max()) >= config.vocab_size:
        raise CheckpointError(
            f"{escape(options.text)}: token {int(ids.max())} is outside of the vocabulary of {config.vocab_size}",
            hint="take tokenizer and config.json of one model",
        )
    targets = torch.cat((ids[1 : count + 1], torch.tensor([-1])))[:count]
    return Windows(list(torch.split(ids[:count], options.seq_len)), targets)


@torch.inference_mode()
def compare(
    source: Source,
    ours: Source,
    windows: Windows,
    precision: Precision,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = BATCH_TOKENS,
    progress: ProgressCallback = ignore,
) -> Comparison:
    """Both models over the windows; `precision` is the checkpoint's, the source runs with no rounding but `dtype`'s.

    Computed in F32, so that the figures tell of the formats and not of two ways to round in BF16.
    """
    pair = [
        StreamedModel(m, make_batches(windows.ids, batch_tokens), precision=p, device=device, dtype=dtype)
        for m, p in ((source, Precision()), (ours, precision))
    ]
    layers, experts = source.config.num_hidden_layers, source.config.num_local_experts
    layer_sqnr: list[float] = []
    expert_sqnr: dict[tuple[int, int], float] = {}

    def tell(layer: int, expert: int) -> None:
        done = (layer + expert / experts) / layers
        progress(Progress(stage="logits", fraction=done, layer=layer, num_layers=layers))

    for layer in range(layers):
        tell(layer, 0)
        for model in pair:
            model.attention(layer)
        for expert in range(experts):
            value = _expert(pair[0], pair[1], layer, expert)
            if value is not None:
                expert_sqnr[layer, expert] = value
            tell(layer, expert + 1)
        for model in pair:
            model.finish_layer()
        behind = ((a.x, b.x) for a, b in zip(pair[0].batches, pair[1].batches, strict=True))
        layer_sqnr.append(sqnr_db(*squares(behind)))
    result = _compare_logits(pair[0], pair[1], windows.targets)
    result.layer_sqnr_db, result.expert_sqnr_db = layer_sqnr, expert_sqnr
    return result


def _expert(source: StreamedModel, ours: StreamedModel, layer: int, expert: int) -> float | None:
    """Run one expert of both models; returns its own SQNR on the source's tokens, None where these are too few."""
    num_tokens = [sum(len(b.to(expert).rows) for b in m.batches) for m in (source, ours)]
    if not any(num_tokens):
        return None
    theirs, mine = source.load_expert(layer, expert), ours.load_expert(layer, expert)

    def outputs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in source.batches:
            h = batch.h[batch.to(expert).rows]
            if len(h):
                yield theirs(h), mine(h)

    source.expert(expert, theirs)
    ours.expert(expert, mine)
    return sqnr_db(*squares(outputs())) if num_tokens[0] >= MIN_EXPERT_TOKENS else None


def _compare_logits(source: StreamedModel, ours: StreamedModel, targets: torch.Tensor) -> Comparison:
    heads, pieces = (source.head(), ours.head()), torch.split(targets, [len(b.ids) for b in source.batches])
    scored = [
        token_scores(heads, (theirs.x, mine.x), piece)
        for theirs, mine, piece in zip(source.batches, ours.batches, pieces, strict=True)
    ]
    theirs, mine = (joined([batch[i] for batch in scored]) for i in (0, 1))
    followed = targets >= 0
    return Comparison(mine.kl, mine.top1 == 1, (theirs.nll[followed], mine.nll[followed]))
