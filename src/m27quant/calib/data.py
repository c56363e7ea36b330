"""Calibration rows: from a Hub data set or a local file to sequences of token ids, without padding.

Rows are taken as nvidia-modelopt takes them: in order, each data set its share, cut to `seq_len` tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch

from m27quant.calib.encode import Encoder
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.strict_json import require_regular_file
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError, escape
from m27quant.recipes.schema import DEFAULT_DATASETS, Calibration, Dataset

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py", ".rst")
MAX_LINE_BYTES = 64 * 2**20
HUB_DATASET = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
SHUFFLE_BUFFER = 10_000

SHORT_NAMES = {"cnn_dailymail": DEFAULT_DATASETS[0], "nemotron-post-training-dataset-v2": DEFAULT_DATASETS[1]}
"""modelopt's names for the data sets of its recipes."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences one after another."""

    ids: torch.Tensor
    """int64 [T] of all sequences."""
    lengths: tuple[int, ...]
    digest: str
    """SHA-256 of ids and lengths: two runs with the same digest saw the same tokens."""
    sources: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def parse_dataset(argument: str) -> Dataset:
    """What `--dataset` names: an existing file, else a Hub data set.

    Raises:
        UsageError: neither.
    """
    if (path := existing(argument)) is not None:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--dataset {escape(argument)}: the name is not UTF-8", hint="rename the file"
            ) from None
        return Dataset(path=str(path))
    if argument in SHORT_NAMES:
        return SHORT_NAMES[argument]
    hint = "name a JSONL, Parquet or text file, or a Hub data set (org/name)"
    suffix = PurePath(argument).suffix
    if argument.startswith((".", "/", "~")) or suffix in (".jsonl", ".json", ".parquet", *TEXT_SUFFIXES):
        raise UsageError(f"--dataset {escape(argument)}: no such file", hint=hint)
    if not HUB_DATASET.fullmatch(argument):
        raise UsageError(
            f"--dataset {escape(argument)}: neither a file nor the id of a Hub data set", hint=hint
        )
    return Dataset(path=argument)


def load_sequences(
    plan: Calibration,
    tokenizer_folder: Path,
    *,
    vocab_size: int,
    max_length: int,
    seed: int = 0,
    offline: bool = False,
    token: str | None = None,
) -> tuple[Sequences, list[str]]:
    """Read the rows that `plan` asks for; returns them and notices (fewer rows than asked, for instance).

    Args:
        plan: data sets, number of samples and their length in tokens.
        tokenizer_folder: where tokenizer.json and the chat template are; only read when a row needs them.
        vocab_size: ids must be below it.
        max_length: the longest sequence the model takes; rows of `input_ids` are not cut to `seq_len`.
        seed: 0 takes rows in order; another number shuffles them.
        offline: do not ask the Hub.
        token: the Hub's access token.

    Raises:
        UsageError: no rows at all.
        CheckpointError: a damaged data file or a row that cannot be used.
        EnvironmentFault: a data set that is gated, unknown, or not to be had offline.
    """
    encode = Encoder(tokenizer_folder, plan.seq_len, vocab_size, max_length)
    sequences: list[list[int]] = []
    notices: list[str] = []
    for dataset, count in _shares(plan):
        for split, part in _split_shares(dataset, count):
            rows = _rows(dataset, split, seed, offline, token, encode)
            taken = _take(rows, part)
            if len(taken) < part:
                notices.append(f"{escape(dataset.path)} ({split}) gave {len(taken)} of {part} rows")
            sequences += taken
    if not sequences:
        raise UsageError(
            "the data hold no usable row",
            hint="pass --dataset FILE with `text`, `messages` or `input_ids`",
        )
    return _join(sequences, tuple(d.path for d in plan.datasets)), notices


def is_local(plan: Calibration) -> bool:
    """True where all data are files on this machine."""
    return all(existing(d.path) for d in plan.datasets)


def assumed_sequences(plan: Calibration) -> Sequences:
    """As many and as long sequences as `plan` asks for, without reading them: for a dry run."""
    lengths = (plan.seq_len,) * plan.num_samples
    ids = torch.zeros(0, dtype=torch.int64)
    return Sequences(ids, lengths, digest="not read", sources=tuple(d.path for d in plan.datasets))


def _join(sequences: Sequence[list[int]], sources: tuple[str, ...]) -> Sequences:
    ids = torch.tensor(list(itertools.chain.from_iterable(sequences)), dtype=torch.int64)
    lengths = tuple(len(s) for s in sequences)
    digest = hashlib.sha256(json.dumps(lengths).encode() + ids.to(torch.int32).numpy().tobytes()).hexdigest()
    return Sequences(ids, lengths, digest, sources)


def _shares(plan: Calibration) -> Iterator[tuple[Dataset, int]]:
    """Divide num_samples by weight; what does not divide goes to the first ones."""
    total = sum(d.weight for d in plan.datasets)
    given = 0
    running = 0
    for dataset in plan.datasets:
        running += dataset.weight
        upto = -(-plan.num_samples * running // total)
        yield dataset, upto - given
        given = upto


def _split_shares(dataset: Dataset, count: int) -> Iterator[tuple[str, int]]:
    if existing(dataset.path):
        yield "file", count
        return
    given = 0
    for i, split in enumerate(dataset.splits):
        upto = -(-count * (i + 1) // len(dataset.splits))
        yield split, upto - given
        given = upto


def _rows(
    dataset: Dataset, split: str, seed: int, offline: bool, token: str | None, encode: Encoder
) -> Iterator[list[int]]:
    """Token ids of the rows that are not empty, in the order in which they count."""
    path = existing(dataset.path)
    if path is not None:
        require_regular_file(path)
    if path is not None and path.suffix in TEXT_SUFFIXES:
        yield from _shuffled(_windows(path, encode), seed)
        return
    rows: Iterable[tuple[str, dict[str, Any]]]
    if path is not None:
        reader: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]] = (
            parquet_rows if path.suffix == ".parquet" else _jsonl
        )
        rows = _shuffled(reader(path), seed)
    else:
        rows = streamed_rows(dataset, split, seed, offline, token)
    for where, row in rows:
        ids = encode.row(row, dataset, where)
        if ids:
            yield ids


def _shuffled(rows: Iterator[T], seed: int) -> Iterator[T]:
    if seed == 0:
        return rows
    everything = list(rows)
    random.Random(seed).shuffle(everything)
    return iter(everything)


def _windows(path: Path, encode: Encoder) -> Iterator[list[int]]:
    """A text file as consecutive windows of `seq_len` tokens."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise CheckpointError(f"{escape(path)}: not UTF-8 at byte {fault.start}") from None
    except OSError as fault:
        raise EnvironmentFault(f"{escape(path)}: cannot be read ({fault.strerror})") from None
    ids = encode.tokenize.text(text)
    for begin in range(0, len(ids), encode.seq_len):
        yield encode.check(ids[begin : begin + encode.seq_len], escape(path))


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                where = f"{escape(path)}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise CheckpointError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as fault:
                    raise CheckpointError(f"{where}: not valid JSON ({escape(fault)})") from None
                if not isinstance(row, dict):
                    raise CheckpointError(f"{where}: a row must be an object, found {type(row).__name__}")
                yield where, row
    except OSError as fault:
        raise EnvironmentFault(f"{escape(path)}: cannot be read ({fault.strerror})") from None


def _take(rows: Iterator[list[int]], count: int) -> list[list[int]]:
    """The first `count` rows; whatever is wrong with one of them has a next step."""
    try:
        return list(itertools.islice(rows, count))
    except (CheckpointError, EnvironmentFault) as fault:
        fault.hint = fault.hint or "correct the data or their permissions, or pass others with --dataset FILE"
        raise


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a Parquet file is, and the row.

    Raises:
        CheckpointError: no Parquet, or a damaged one.
        EnvironmentFault: no permission to read it.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{escape(path)}, row {number}", row
    except PermissionError:
        raise EnvironmentFault(f"{escape(path)}: cannot be read (Permission denied)") from None
    except (pyarrow.ArrowException, OSError) as fault:
        raise CheckpointError(f"{escape(path)}: not a readable Parquet file ({escape(fault)})") from None


def streamed_rows(
    dataset: Dataset, split: str, seed: int, offline: bool, token: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Hub data set without downloading all of it."""
    import datasets
    import huggingface_hub.constants

    where = f"{escape(dataset.path)} ({split})"
    hint = (
        "pass --dataset FILE with local JSONL, Parquet or text; "
        "for gated data accept the terms on its page and `hf auth login`"
    )
    if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise EnvironmentFault(f"data set {where} is on the Hub, and offline mode is on", hint=hint)
    try:
        rows = datasets.load_dataset(
            dataset.path, dataset.config, split=split, revision=dataset.revision, streaming=True, token=token
        )
        if seed:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(rows, start=1):
            yield f"{where}, row {number}", row
    except (CheckpointError, UsageError):
        raise
    except Exception as fault:  # noqa: BLE001 - network, gating and parsing faults of many libraries
        first = escape(str(fault).partition("\n")[0])
        raise EnvironmentFault(f"data set {where} cannot be read: {first}", hint=hint) from None
