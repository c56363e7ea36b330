"""`--logits`: a checkpoint's answers against its source's on a text, both computed layer by layer, side by side.

In memory at a time: one layer's attention or one expert of each model, and the hidden states of all tokens (24 bytes
a token and hidden dimension); so that it works where neither model fits.

Shapes: T tokens, N of them routed to one expert, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from m27quant.checkpoint import names
from m27quant.checkpoint.hub import Location
from m27quant.checkpoint.layout import check_layout
from m27quant.checkpoint.quantized import QuantizedSource, same_model
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.strict_json import read_bytes
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.runtime.device import pick_device
from m27quant.runtime.streamed import (
    Activations,
    Batch,
    Head,
    KvCache,
    Precision,
    StreamedModel,
    make_batches,
)
from m27quant.verify.collect import Findings

MAX_TEXT_BYTES = 256 * 2**20
BATCH_TOKENS = 2048
LOGIT_ELEMENTS = 2**24
"""Logits of each model that are in memory at a time."""

# Limits, from tiny-m27 (its model card has the measured figures); a larger model loses less.
MAX_PERPLEXITY_RATIO = 1.05
MAX_KL_MEAN = 0.05
MIN_TOP1 = 0.85
MIN_EXPERT_SQNR_DB = 10.0
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


@dataclass(slots=True)
class Comparison:
    """What was measured; the source comes first."""

    kl: torch.Tensor
    """F64 [T]: KL divergence in nats of the checkpoint's distribution from the source's."""
    same_top1: torch.Tensor
    """Bool [T]: both hold the same token for the likeliest."""
    nll: tuple[torch.Tensor, torch.Tensor]
    """F64, for each token that is followed by one: its negative log-likelihood by each model."""
    layer_sqnr_db: list[float] = field(default_factory=list)
    """Of the hidden states behind each layer, all that comes before included."""
    expert_sqnr_db: dict[tuple[int, int], float] = field(default_factory=dict)
    """(layer, expert): of the expert alone, on the source's own tokens for it, if there are enough; inf if equal."""

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of source and checkpoint."""
        source, ours = (_exp(float(nll.mean())) for nll in self.nll)
        return source, ours


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
        layer_sqnr.append(_sqnr_db((a.x, b.x) for a, b in zip(pair[0].batches, pair[1].batches, strict=True)))
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
    return _sqnr_db(outputs()) if num_tokens[0] >= MIN_EXPERT_TOKENS else None


def _compare_logits(source: StreamedModel, ours: StreamedModel, targets: torch.Tensor) -> Comparison:
    kl: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    nlls: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    heads, at = (source.head(), ours.head()), 0
    for theirs, mine in zip(source.batches, ours.batches, strict=True):
        for log_p, log_q in _log_probabilities(heads, theirs, mine):
            p = log_p.exp()
            # 0 * (-inf - x) would be NaN where a token is impossible to the source
            kl.append(torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).cpu())
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
            target = targets[at : at + len(log_p)].to(log_p.device)
            at += len(log_p)
            rows = (target >= 0).nonzero().squeeze(1)
            for nll, log in zip(nlls, (log_p, log_q), strict=True):
                nll.append(-log[rows, target[rows]].cpu())
    return Comparison(torch.cat(kl), torch.cat(same), (torch.cat(nlls[0]), torch.cat(nlls[1])))


def _log_probabilities(
    heads: tuple[Head, Head], theirs: Batch, mine: Batch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """F64 [rows, V] by both, as many rows at a time as memory is given."""
    step = max(1, LOGIT_ELEMENTS // len(heads[0].weight))
    for begin in range(0, len(theirs.ids), step):
        rows = slice(begin, begin + step)
        yield (
            F.log_softmax(heads[0](theirs.x[rows]).double(), dim=-1),
            F.log_softmax(heads[1](mine.x[rows]).double(), dim=-1),
        )


def _sqnr_db(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Signal to noise in dB over all pairs (right, found); inf where they are equal, NaN where one is NaN."""
    signal = noise = 0.0
    for right, found in pairs:
        signal += float(right.double().square().sum())
        noise += float((right.double() - found.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# -- what is told ----------------------------------------------------------------------------------


def figures(result: Comparison) -> dict[str, Any]:
    """The figures by name, rounded to what they are worth."""
    source, ours = result.perplexity
    layers = result.layer_sqnr_db
    worst = sorted(result.expert_sqnr_db.items(), key=lambda item: item[1])[:5]
    return {
        "kl_mean": _rounded(float(result.kl.mean())),
        "kl_p99": _rounded(_quantile(result.kl, 0.99)),
        "kl_max": _rounded(float(result.kl.max())),
        "top1_agreement": _rounded(float(result.same_top1.double().mean())),
        "perplexity_source": _rounded(source),
        "perplexity": _rounded(ours),
        "perplexity_ratio": _rounded(ours / source),
        "layer_sqnr_db": [round(v, 2) for v in layers],
        "worst_experts": [
            {"layer": layer, "expert": expert, "sqnr_db": round(v, 2)} for (layer, expert), v in worst
        ],
    }


def _quantile(values: torch.Tensor, q: float) -> float:
    """The smallest value that at least a share q is not above; torch's own has a limit of 2**24 values."""
    return float(values.sort().values[max(0, math.ceil(q * len(values)) - 1)])


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def report(result: Comparison, found: Findings) -> None:
    """Compare the figures with the limits."""
    source, ours = result.perplexity
    mean, agreement = float(result.kl.mean()), float(result.same_top1.double().mean())
    if not math.isfinite(mean) or not math.isfinite(ours / source):
        bad = int((~result.kl.isfinite()).sum())
        found.add("M27-L001", f"{bad:,} of {len(result.kl):,} tokens get NaN or infinite logits")
        return
    _limit(found, "M27-L002", "perplexity ratio", ours / source, MAX_PERPLEXITY_RATIO, above=True)
    _limit(found, "M27-L003", "mean KL divergence", mean, MAX_KL_MEAN, above=True)
    _limit(found, "M27-L004", "top-1 agreement", agreement, MIN_TOP1, above=False)
    for (layer, expert), value in result.expert_sqnr_db.items():
        if value < MIN_EXPERT_SQNR_DB:
            median = statistics.median(v for (at, _), v in result.expert_sqnr_db.items() if at == layer)
            name = names.expert(layer, expert, "w1").removesuffix(".w1")
            found.add(
                "M27-L005", f"'{name}' gives its tokens an SQNR of {value:.1f} dB; the layer's median is {median:.1f}",
                tensor=name, expected=f"at least {MIN_EXPERT_SQNR_DB:g} dB", found=f"{value:.2f} dB",
                badness=-value,
            )  # fmt: skip


def _limit(
    found: Findings,
    code: Literal["M27-L002", "M27-L003", "M27-L004"],
    what: str,
    value: float,
    limit: float,
    *,
    above: bool,
) -> None:
    if (value > limit) if above else (value < limit):
        side = "at most" if above else "at least"
        found.add(
            code,
            f"{what} is {value:.4g}, the limit {limit:g}",
            expected=f"{side} {limit:g}",
            found=f"{value:.6g}",
        )
