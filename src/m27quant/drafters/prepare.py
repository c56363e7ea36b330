"""Everything about a training run that is known before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

import m27quant
from m27quant.checkpoint.config import M2Config
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.quantized import open_checkpoint
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.options import TrainOptions
from m27quant.drafters.order import Order, mixed
from m27quant.drafters.presets import Recipe, resolve
from m27quant.drafters.samples import MANIFEST, Sample, read_manifest, read_samples
from m27quant.drafters.start import Start, read_start
from m27quant.drafters.states import fingerprint_of
from m27quant.errors import UsageError, escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run, planned."""

    recipe: Recipe
    target: str
    target_folder: Path
    repo_id: str | None
    """Of a target from the Hub."""
    config: M2Config
    samples: list[Sample]
    heldout: list[Sample]
    start: Start | None
    """The drafter that the run begins with."""
    order: Order
    steps: int
    fingerprint: dict[str, Any]
    """What must be the same for a run to be continued."""
    manifests: tuple[dict[str, Any], ...]
    """Of the data folders, as `drafter generate-data` wrote them."""

    @property
    def num_learned(self) -> int:
        """Tokens of the data that the target wrote."""
        return sum(end - begin for sample in self.samples for begin, end in sample.learned)

    def describe(self) -> list[str]:
        """What is to be done, line by line."""
        s, r = self.recipe.shape, self.recipe
        taps = ", ".join(map(str, s.hidden_states))
        return [
            f"taps: hidden states {taps} of the target (0 is its embedding; the outputs of layers "
            f"{', '.join(str(state - 1) for state in s.hidden_states)} counted from 0)",
            f"data: {len(self.samples):,} samples, {self.num_learned:,} tokens that the target wrote"
            + (f"; {len(self.heldout):,} samples held out" if self.heldout else ""),
            *([f"begins with the weights of {escape(self.start.name)}"] if self.start else []),
            f"training: {self.steps:,} steps of {self.order.size} samples ({self.order.steps_per_epoch:,} an epoch), "
            f"{r.optimizer}, lr {r.lr:g}, {r.schedule}",
        ]


def prepare(
    kind: str,
    target: str,
    data: Sequence[str],
    options: TrainOptions,
    num_ranks: int,
    say: Callable[[str], None],
) -> Prepared:
    """Read and check config, options and data.

    Raises:
        UsageError: options that do not fit the target or each other; data without anything to learn.
        CheckpointError: target or data unreadable.
    """
    hub = {"revision": options.revision, "offline": options.offline, "token": options.token}
    location = locate(target, **hub)  # type: ignore[arg-type]  # as they are named there
    if location.repo_id is not None:
        say(location.describe())
    with open_checkpoint(location) as source:
        config = source.config
    start = _start(kind, options, config, say)
    recipe = resolve(kind, options, config, None if start is None else start.values)
    read = _Reader(location.folder, config.vocab_size, recipe.max_length)
    samples = [sample for path in data for sample in read(path)]
    usable = [sample for sample in samples if _can_be_learned(sample)]
    if len(usable) < len(samples):
        say(f"{len(samples) - len(usable):,} of {len(samples):,} samples hold nothing to learn")
    if not usable:
        raise UsageError(
            "the data holds nothing to learn: no token that the target wrote",
            hint="make data with `m27quant drafter generate-data`",
        )
    usable, heldout = _held_out(usable, options.heldout, read, recipe.seed)
    size = recipe.batch_size * recipe.grad_accumulation * num_ranks
    order = Order([len(sample) for sample in usable], size, recipe.seed)
    steps = recipe.steps or max(1, ceil((recipe.epochs or 0) * order.steps_per_epoch))
    fingerprint = (
        recipe.document()
        | {
            "target": fingerprint_of(target, **hub),  # type: ignore[arg-type]
            "activations": options.activations,
            "kv_cache_dtype": options.kv_cache_dtype,
            "data": digest(usable),
            "samples": len(usable),
            "ranks": num_ranks,
            "steps": steps,
            "layout": options.layout,
            "m27quant": m27quant.__version__,
        }
        | ({} if start is None else {"init_from": start.digest})
    )
    return Prepared(
        recipe=recipe, target=target, target_folder=location.folder, repo_id=location.repo_id, config=config,
        samples=usable, heldout=heldout, start=start, order=order, steps=steps, fingerprint=fingerprint,
        manifests=_manifests(data),
    )  # fmt: skip


def _start(kind: str, options: TrainOptions, config: M2Config, say: Callable[[str], None]) -> Start | None:
    if options.init_from is None:
        return None
    location = locate(options.init_from, offline=options.offline, token=options.token)
    if location.repo_id is not None:
        say(location.describe())
    return read_start(location.folder, kind, config)


def _held_out(
    samples: list[Sample], wanted: str | None, read: Callable[[str], list[Sample]], seed: int
) -> tuple[list[Sample], list[Sample]]:
    """(what is learned, what is held out): a share of the samples, or other data."""
    if wanted is None:
        return samples, []
    if (share := _share(wanted)) is not None:
        if len(samples) < 2:
            raise UsageError("one sample cannot be both learned and held out", hint="leave heldout out")
        return split(samples, share, seed)
    heldout = [sample for sample in read(wanted) if _can_be_learned(sample)]
    if not heldout:
        raise UsageError("nothing is held out: no sample with a token that the target wrote")
    return samples, heldout


class _Reader:
    """Samples of one data folder or file after another."""

    def __init__(self, folder: Path, vocab_size: int, max_length: int) -> None:
        has_tokenizer = (folder / "tokenizer.json").is_file()
        self._tokenizer = Tokenizer(folder) if has_tokenizer else None
        self._limits = {"vocab_size": vocab_size, "max_length": max_length}

    def __call__(self, text: str) -> list[Sample]:
        path = existing(text)
        if path is None:
            raise UsageError(
                f"{escape(text)}: no such file or folder", hint="name a data folder or a JSONL file"
            )
        return read_samples(path, self._tokenizer, **self._limits)


def _share(text: str) -> float | None:
    """A share of the data, 0.05 or 5%; None where `text` is a path."""
    if existing(text) is not None:
        return None
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UsageError(
            f"heldout {escape(text)}: a share lies between 0 and 1", hint="0.05 is a twentieth of the data"
        )
    return share


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the rest, `share` of the samples drawn at random), at least one each."""
    generator = torch.Generator().manual_seed(mixed(seed, "heldout"))
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    chosen = set(torch.randperm(len(samples), generator=generator)[:count].tolist())
    rest = [sample for index, sample in enumerate(samples) if index not in chosen]
    return rest, [samples[index] for index in sorted(chosen)]


def _can_be_learned(sample: Sample) -> bool:
    """Some token was written by the target, and one stands before it and one behind."""
    return len(sample) >= 3 and any(end > max(begin, 1) + 1 for begin, end in sample.learned)


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all tokens and of what is learned of them."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(repr((len(sample), sample.learned)).encode())
        hashed.update(sample.tokens.tobytes())
    return hashed.hexdigest()


def _manifests(data: Sequence[str]) -> tuple[dict[str, Any], ...]:
    folders = [path for text in data if (path := existing(text)) is not None and path.is_dir()]
    return tuple(read_manifest(folder) for folder in folders if (folder / MANIFEST).is_file())
