"""One calibration row to token ids: ids as they are, text, or a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, escape
from m27quant.recipes.schema import Dataset

TEXT_FIELDS = ("text", "article", "content", "prompt")
CHAT_FIELDS = ("messages", "conversations")


class Encoder:
    """One row to token ids; the tokenizer is read only when a row needs it."""

    def __init__(self, folder: Path, seq_len: int, vocab_size: int, max_length: int) -> None:
        self.seq_len = seq_len
        self._folder, self._vocab_size, self._max_length = folder, vocab_size, max_length
        self._tokenize: Tokenizer | None = None

    @property
    def tokenize(self) -> Tokenizer:
        if self._tokenize is None:
            self._tokenize = Tokenizer(self._folder)
        return self._tokenize

    def row(self, row: dict[str, Any], dataset: Dataset, where: str) -> list[int]:
        field = dataset.field or next(
            (f for f in ("input_ids", *CHAT_FIELDS, *TEXT_FIELDS) if row.get(f) is not None), None
        )
        if field is None or field not in row:
            wanted = f"`{field}`" if field else "`input_ids`, `messages` or `text`"
            raise CheckpointError(
                f"{where}: no {wanted} in a row with the keys {escape(sorted(map(str, row)))}"
            )
        value = row[field]
        if isinstance(value, str):
            return self.check(self._text(value, where), where)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return self.check(self._chat(value, row, dataset, where), where)
        if isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return self.check(_without_padding(value, row.get("attention_mask"), where), where)
        raise CheckpointError(
            f"{where}: `{escape(field)}` is neither text, nor chat messages, nor a list of token ids"
        )

    def _text(self, text: str, where: str) -> list[int]:
        tokenize = self.tokenize
        with _located(where):
            return tokenize.text(text, self.seq_len)

    def _chat(
        self, messages: list[dict[str, Any]], row: dict[str, Any], dataset: Dataset, where: str
    ) -> list[int]:
        _check_turns(messages, dataset, where)
        if dataset.chat == "join":
            return self._text("\n".join(str(turn["content"]) for turn in messages), where)
        tokenize = self.tokenize
        with _located(where):
            return tokenize.chat(messages, row.get("tools"), self.seq_len)

    def check(self, ids: list[int], where: str) -> list[int]:
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            bad = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise CheckpointError(
                f"{where}: token id {bad} is outside of the vocabulary of {self._vocab_size}"
            )
        if len(ids) > self._max_length:
            raise CheckpointError(f"{where}: {len(ids)} tokens, the model takes at most {self._max_length}")
        return ids


def _check_turns(messages: list[dict[str, Any]], dataset: Dataset, where: str) -> None:
    """Refuse a turn that lacks what a template looks for: most templates silently make nothing of it."""
    template = dataset.chat == "template"
    for turn in messages:
        if not isinstance(turn, dict):
            raise CheckpointError(f"{where}: a chat turn is {type(turn).__name__}, not an object")
        if template and not isinstance(turn.get("role"), str):
            raise CheckpointError(f"{where}: a chat turn without `role`")
        if turn.get("content") is None and not (template and turn.get("tool_calls")):
            raise CheckpointError(f"{where}: a chat turn without `content`")


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say of what is wrong with a row's text where the row is."""
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(f"{where}: {fault.message}", hint=fault.hint) from None


def _without_padding(ids: list[int], mask: Any, where: str) -> list[int]:
    """The ids whose attention_mask is not 0: padding never counts."""
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise CheckpointError(f"{where}: attention_mask and input_ids differ in length")
    return [i for i, kept in zip(ids, mask, strict=True) if kept]
