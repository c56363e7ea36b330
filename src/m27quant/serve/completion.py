"""POST /v1/completions: text or token ids that the model goes on with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from m27quant.errors import UsageError
from m27quant.runtime.api import LLM
from m27quant.runtime.sequence import Sequence as Running
from m27quant.serve.errors import from_fault, invalid
from m27quant.serve.forms import Form, choice_json, to_json
from m27quant.serve.logprobs import completion_logprobs
from m27quant.serve.protocol import CompletionRequest
from m27quant.serve.worker import Piece


def prompts_of(llm: LLM, asked: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        ApiError: text without a tokenizer or that is no valid Unicode, ids that the vocabulary does not have.
    """
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise invalid("best_of must be equal to n", param="best_of")
    if asked.echo and asked.logprobs is not None:
        raise invalid("echo has no log probabilities of the prompt: leave one of the two out", param="echo")
    try:
        return [llm.encode(prompt) for prompt in asked.prompts]
    except UsageError as fault:
        raise from_fault(fault, param="prompt") from None


class CompletionForm(Form):
    """Texts that go on."""

    kind, id_prefix = "text_completion", "cmpl"

    def __init__(
        self, llm: LLM, asked: CompletionRequest, prompts: Sequence[Sequence[int]], model: str
    ) -> None:
        n = asked.n or 1
        super().__init__(asked, model, len(prompts) * n)
        self._tokenizer, self._asked, self._prompts = llm.tokenizer, asked, prompts
        self._echoes = self._given_texts() if asked.echo else [""] * len(prompts)
        self._begun = [False] * self.num_choices
        self._offsets = [0] * self.num_choices

    def _given_texts(self) -> list[str]:
        given = self._asked.prompts
        return [
            text if isinstance(text, str) else self._tokenizer.decode(text) if self._tokenizer else ""
            for text in given
        ]

    def choices(self, piece: Piece) -> Iterable[str]:
        index = piece.ticket.index
        text, more = piece.text, ""
        if not self._begun[index]:
            self._begun[index] = True
            text = self._echoes[index // (self._asked.n or 1)] + text
        if self._asked.return_token_ids:
            more = f',"token_ids":{to_json(piece.token_ids)}'
        reason = piece.finished.finish_reason if piece.finished is not None else None
        if text or reason or more or piece.logprobs:
            yield choice_json(index, "text", to_json(text), self._logprobs(piece), reason, more)

    def _logprobs(self, piece: Piece) -> str:
        if self._asked.logprobs is None:
            return "null"
        index = piece.ticket.index
        found = completion_logprobs(self._tokenizer, piece.logprobs, self._offsets[index])
        self._offsets[index] += sum(map(len, found["tokens"]))
        return to_json(found)

    def choice(self, piece: Piece) -> dict[str, Any]:
        assert piece.finished is not None
        index = piece.ticket.index
        at = index // (self._asked.n or 1)
        found: dict[str, Any] = {
            "index": index,
            "text": self._echoes[at] + piece.text,
            "logprobs": None,
            "finish_reason": piece.finished.finish_reason,
        }
        if self._asked.logprobs is not None:
            found["logprobs"] = completion_logprobs(self._tokenizer, piece.logprobs, 0)
        if self._asked.return_token_ids:
            found |= {"token_ids": piece.token_ids, "prompt_token_ids": list(self._prompts[at])}
        return found

    def num_reasoning_tokens(self, sequence: Running) -> int:
        return 0
