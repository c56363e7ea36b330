"""Prompts from what a user names: text, JSON lines, Parquet, or a data set of the Hub.

Of text, prompts are pieces: of random length, most from anywhere, some from where documents begin, so that a drafter
learns both.  Which piece a prompt is follows from (seed, its number) alone.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from m27quant.calib.data import TEXT_SUFFIXES, parquet_rows, parse_dataset, streamed_rows
from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.strict_json import read_bytes
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.drafters.samples import (
    NO_TOKENIZER,
    Sample,
    SampleReader,
    json_lines,
    located,
    messages_of,
    sample_of,
    token_ids,
)
from m27quant.errors import CheckpointError, UsageError, escape
from m27quant.runtime.chat import ChatPrompt, chat_prompt

MAX_TEXT_BYTES = 2**31
BOS = "]~!b["
"""What a document of MiniMax-M2 begins with, where a text has such marks."""
QUESTIONS = ("question", "problem", "instruction")
"""Columns that hold a user's question in data sets of the Hub."""
PROMPT_FORMS = "prompt, messages, conversations, text, question, problem, instruction or prompt_token_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How prompts are made."""

    prompt_tokens: tuple[int, int] = (16, 256)
    """Of pieces of text: fewest and most; short lengths are as likely as long ones (log-uniform)."""
    beginnings: float = 0.25
    """Share of pieces that begin where a document does."""
    chat: bool = False
    """`prompt` is a user's message."""
    thinking: bool = True
    """Think before answering messages."""
    system_prompt: str | None = None
    """Before messages that have none."""

    def __post_init__(self) -> None:
        """Raise `UsageError` naming the field that cannot be."""
        least, most = self.prompt_tokens
        if not 1 <= least <= most:
            raise UsageError(f"prompt_tokens are {least} to {most}", hint="write FEWEST:MOST, from 1 on")
        if not 0 <= self.beginnings <= 1:
            raise UsageError(f"beginnings is {self.beginnings}, a share is from 0 to 1")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where prompts came from: enough to know whether it is the same again."""

    name: str
    rows: int | None
    """None of text."""
    tokens: int | None
    """None of rows."""
    sha256: str


class Source(Protocol):
    """Prompts of one data set."""

    origin: Origin

    @property
    def limit(self) -> int | None:
        """Prompts that differ; None where there is no end of them."""

    def prompt(self, number: int, chance: random.Random) -> list[int]:
        """Token ids."""


class TextSource:
    """Pieces of one text."""

    def __init__(self, name: str, ids: array[int], beginnings: Sequence[int], cut: Cut) -> None:
        self._ids, self._beginnings, self._cut = ids, beginnings, cut
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        self.origin = Origin(name, None, len(ids), digest)

    limit = None

    def prompt(self, number: int, chance: random.Random) -> list[int]:
        return piece(self._ids, self._beginnings, self._cut, chance)

    def pieces(self, prompt_tokens: int, max_tokens: int, most: int) -> list[Sample]:
        """Pieces at even distances, the first at the beginning, the last at the end."""
        length = min(prompt_tokens + max_tokens, len(self._ids))
        room = len(self._ids) - length
        starts = sorted({room * i // max(1, most - 1) for i in range(most)})
        prompt = min(prompt_tokens, length)
        return [
            sample_of(str(at), self._ids[at : at + prompt], self._ids[at + prompt : at + length])
            for at in starts
        ]


class RowSource:
    """Rows, each of which is a prompt; of rows of text a piece."""

    def __init__(
        self,
        name: str,
        rows: list[tuple[str, dict[str, Any]]],
        tokenizer: Tokenizer | None,
        vocab_size: int,
        cut: Cut,
    ) -> None:
        self._rows, self._tokenizer, self._vocab_size, self._cut = rows, tokenizer, vocab_size, cut
        digest = hashlib.sha256()
        for _, row in rows:
            digest.update(repr(sorted(row.items())).encode("utf-8", "backslashreplace"))
        self.origin = Origin(name, len(rows), None, digest.hexdigest())

    @property
    def limit(self) -> int:
        return len(self._rows)

    def prompt(self, number: int, chance: random.Random) -> list[int]:
        where, row = self._rows[number % len(self._rows)]
        if row.get("prompt_token_ids") is not None:
            return token_ids(row["prompt_token_ids"], self._vocab_size, f"{where}: `prompt_token_ids`")
        messages = messages_of(row, where)
        if messages is not None:
            return self._chat(messages, row.get("tools"), where)
        for key in ("prompt", *QUESTIONS):
            if isinstance(row.get(key), str):
                if self._cut.chat or key in QUESTIONS:
                    return self._chat([{"role": "user", "content": row[key]}], None, where)
                return self._encode(row[key], where)
        if isinstance(row.get("text"), str):
            return piece(array("i", self._encode(row["text"], where)), (0,), self._cut, chance)
        keys = escape(", ".join(map(str, row)))
        raise CheckpointError(
            f"{where}: no prompt in a row with the keys {keys}", hint=f"write {PROMPT_FORMS}"
        )

    def samples(self, prompt_tokens: int, max_tokens: int) -> Iterator[Sample]:
        """Each row's prompt, with its answer where it has one; of text the beginning."""
        reader = SampleReader(self._tokenizer, self._vocab_size)
        for number, (where, row) in enumerate(self._rows):
            turns = messages_of(row, where)
            answered = turns is not None and any(turn["role"] == "assistant" for turn in turns)
            if answered or row.get("token_ids") is not None:
                sample = reader.sample(row, where, str(number))
                yield sample.cut(sample.num_prompt + max_tokens)
            elif turns is None and isinstance(row.get("text"), str) and row.get("prompt") is None:
                ids = self._encode(row["text"], where)[: prompt_tokens + max_tokens]
                yield sample_of(str(number), ids[:prompt_tokens], ids[prompt_tokens:])
            else:
                yield sample_of(str(number), self.prompt(number, random.Random(0)), [])

    def _chat(self, messages: list[dict[str, Any]], tools: Any, where: str) -> list[int]:
        """Up to the last turn that is not the assistant's: that one is to be answered."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise CheckpointError(f"{where}: no turn to answer", hint="add a user's message")
        if self._cut.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._cut.system_prompt}, *messages]
        prompt: ChatPrompt = located(
            where,
            lambda: chat_prompt(self._need(), messages, tools=tools, thinking=self._cut.thinking),
        )
        return token_ids(prompt.token_ids, self._vocab_size, where)

    def _encode(self, text: str, where: str) -> list[int]:
        return token_ids(located(where, lambda: self._need().rendered(text)), self._vocab_size, where)

    def _need(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(NO_TOKENIZER, hint="write prompt_token_ids")
        return self._tokenizer


def open_source(
    dataset: str,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    cut: Cut,
    most_rows: int,
    offline: bool = False,
    token: str | None = None,
) -> Source:
    """A data set's prompts.

    Args:
        dataset: a file (JSON lines, Parquet or text) or a Hub id.
        tokenizer: the target's.
        vocab_size: token ids are below it.
        cut: how prompts are made.
        most_rows: of rows, so many are read.
        offline: do not ask the Hub.
        token: for the Hub.

    Raises:
        UsageError: neither a file nor a Hub id, nothing in it, or text without a tokenizer.
        CheckpointError: damaged.
        EnvironmentFault: not to be had.
    """
    named = parse_dataset(dataset)
    path = existing(named.path)
    name = path.name if path is not None else named.path
    if path is not None and path.suffix in TEXT_SUFFIXES:
        if tokenizer is None:
            raise UsageError(NO_TOKENIZER, hint="write token ids")
        ids, beginnings = read_text(path, tokenizer)
        return TextSource(name, ids, beginnings, cut)
    rows: Iterator[tuple[str, dict[str, Any]]]
    if path is None:
        split = named.splits[0] if named.splits else "train"
        rows = streamed_rows(named, split, 0, offline, token)
    else:
        rows = parquet_rows(path) if path.suffix == ".parquet" else json_lines(path)
    taken = list(itertools.islice(rows, most_rows))
    if not taken:
        raise UsageError(f"--dataset {escape(dataset)} holds no rows", hint=f"write {PROMPT_FORMS}")
    return RowSource(name, taken, tokenizer, vocab_size, cut)


def read_text(path: Path, tokenizer: Tokenizer) -> tuple[array[int], list[int]]:
    """(token ids, where documents begin) of a text file; documents begin with a start token, or the file does.

    Raises:
        CheckpointError: not UTF-8, or too large.
        UsageError: empty.
    """
    try:
        text = read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise CheckpointError(
            f"{escape(path)}: not UTF-8 at byte {fault.start}", hint="save it as UTF-8"
        ) from None
    ids: array[int] = array("i")
    beginnings = []
    head, *documents = text.split(BOS)
    for document in ([head] if head else []) + [BOS + d for d in documents]:
        beginnings.append(len(ids))
        ids.extend(tokenizer.rendered(document))
    if not ids:
        raise UsageError(f"{escape(path)} is empty", hint="name a file with text")
    return ids, beginnings


def piece(ids: array[int], beginnings: Sequence[int], cut: Cut, chance: random.Random) -> list[int]:
    """One piece of a text; all of a text that is shorter."""
    least, most = cut.prompt_tokens
    length = round(least * (most / least) ** chance.random())
    if chance.random() < cut.beginnings:
        start = beginnings[chance.randrange(len(beginnings))]
    else:
        start = chance.randrange(max(1, len(ids) - length + 1))
    return ids[start : start + length].tolist()
