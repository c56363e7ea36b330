"""Calibration rows of tests: how they are written, read, and had from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m27quant.calib.data import Sequences, load_sequences
from m27quant.recipes.schema import Calibration, Dataset

VOCAB = 2048
CHAT = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]


def load(
    folder: Path, data: Path | list[Dataset], *, samples: int = 100, seq_len: int = 32, **options: Any
) -> tuple[Sequences, list[str]]:
    """`load_sequences` with the tokenizer of `folder`."""
    chosen = data if isinstance(data, list) else [Dataset(path=str(data))]
    plan = Calibration(datasets=tuple(chosen), num_samples=samples, seq_len=seq_len)
    return load_sequences(plan, folder, **({"vocab_size": VOCAB, "max_length": 2048} | options))


def split(sequences: Sequences) -> list[list[int]]:
    """The rows again."""
    return [part.tolist() for part in sequences.ids.split(list(sequences.lengths))]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Hub:
    """Stands in for `datasets.load_dataset`: every split of every data set counts up from a base."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.taken: dict[str, int] = {}

    def __call__(
        self, path: str, config: str | None, *, split: str, revision: str | None, streaming: bool, token: str | None
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        assert streaming, "Nemotron alone is 136 GB"
        self.asked.append((path, config, split))
        field = "messages" if "Nemotron" in path else "article"
        for number in range(10_000):
            self.taken[f"{path}/{split}"] = number + 1
            yield {"article": f"text {number}"} if field == "article" else {field: CHAT, "uuid": str(number)}
