"""Answers in OpenAI's form: as a stream's chunks and as one document.

A chunk is put together from text: it is made for every step of every answer, on the machine that computes the next
ones.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from m27quant.runtime.sequence import Sequence as Running
from m27quant.serve.errors import server_fault
from m27quant.serve.protocol import Settings
from m27quant.serve.usage import usage_document
from m27quant.serve.worker import Piece

to_json = json.JSONEncoder(separators=(",", ":")).encode
DONE = b"data: [DONE]\n\n"


class Form(ABC):
    """One request's answer."""

    kind: str
    """OpenAI's name of the document."""
    id_prefix: str

    def __init__(self, asked: Settings, model: str, num_choices: int) -> None:
        """`num_choices`: answers that belong to the request; `model`: as clients know it."""
        options = asked.stream_options
        self.asked, self.num_choices = asked, num_choices
        self.with_usage = bool(options and options.include_usage)
        self._counting = bool(options and options.continuous_usage_stats)
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }
        self._start = f"data: {to_json(self._head | {'object': self.chunk_kind})[:-1]},"
        self._num_tokens = [0] * num_choices
        self._num_prompt_tokens = 0

    @property
    def chunk_kind(self) -> str:
        """The name of a stream's documents."""
        return self.kind

    @abstractmethod
    def choices(self, piece: Piece) -> Iterable[str]:
        """A piece as entries of `choices` in chunks: JSON, one for each chunk."""

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole answer as an entry of `choices`."""

    @abstractmethod
    def num_reasoning_tokens(self, sequence: Running) -> int:
        """Of a finished answer."""

    def chunks(self, piece: Piece) -> str:
        """What a stream's reader gets of a piece."""
        if piece.finished is not None:
            check(piece.finished)
        ends = "}\n\n"
        if self._counting:
            ends = f',"usage":{to_json(self._usage_so_far(piece))}}}\n\n'
        elif self.with_usage:
            ends = ',"usage":null}\n\n'
        return "".join(f'{self._start}"choices":[{choice}]{ends}' for choice in self.choices(piece))

    def last_chunk(self, sequences: Sequence[Running]) -> str:
        """Token counts, where they are asked for."""
        if not self.with_usage:
            return ""
        return f'{self._start}"choices":[],"usage":{to_json(self.usage(sequences))}}}\n\n'

    def document(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The whole answer, from one piece for each choice."""
        sequences = [piece.finished for piece in pieces if piece.finished is not None]
        for sequence in sequences:
            check(sequence)
        choices = [self.choice(piece) for piece in sorted(pieces, key=lambda piece: piece.ticket.index)]
        return {**self._head, "choices": choices, "usage": self.usage(sequences)}

    def usage(self, sequences: Sequence[Running]) -> dict[str, Any]:
        """Token counts of all choices together; a prompt counts once, however many answers it got."""
        num_prompts = self.num_choices // (self.asked.n or 1)
        reasoning = sum(map(self.num_reasoning_tokens, sequences))
        return usage_document(sequences, reasoning, prompts_of=num_prompts)

    def _usage_so_far(self, piece: Piece) -> dict[str, int]:
        if not self._num_tokens[piece.ticket.index]:
            self._num_prompt_tokens += (
                0 if piece.ticket.index % (self.asked.n or 1) else len(piece.ticket.prompt)
            )
        self._num_tokens[piece.ticket.index] += len(piece.token_ids)
        prompt, output = self._num_prompt_tokens, sum(self._num_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def check(sequence: Running) -> None:
    """Raise `ApiError` where a sequence ended without an answer."""
    if sequence.finish_reason in ("error", "cancelled"):
        raise server_fault(sequence.error or "the answer was stopped")


def choice_json(index: int, field: str, value: str, logprobs: str, reason: str | None, more: str = "") -> str:
    """An entry of `choices` in a chunk; `value`, `logprobs` and `more` are JSON already."""
    ends = "null" if reason is None else f'"{reason}"'
    return f'{{"index":{index},"{field}":{value},"logprobs":{logprobs},"finish_reason":{ends}{more}}}'
