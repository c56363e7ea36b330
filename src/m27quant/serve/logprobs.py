"""Log probabilities in the two forms that OpenAI's interface has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.runtime.sequence import TokenLogprobs

LEAST = -9999.0
"""In place of minus infinity, which JSON does not have; as OpenAI writes it."""


def chat_logprobs(tokenizer: Tokenizer | None, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a chat's choice: one entry per token, with the bytes that it adds to the text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = _bytes(tokenizer, token)
        return {"token": _text(raw, token, tokenizer), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    content = [
        {**entry(t.token, t.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in t.top]}
        for t in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None, found: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offset`: characters of the text before the first token."""
    tokens = [_text(_bytes(tokenizer, t.token), t.token, tokenizer) for t in found]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [max(t.logprob, LEAST) for t in found],
        "top_logprobs": [
            {
                _text(_bytes(tokenizer, token), token, tokenizer): max(logprob, LEAST)
                for token, logprob in reversed(t.top)
            }
            for t in found
        ],
        "text_offset": offsets,
    }


def _bytes(tokenizer: Tokenizer | None, token: int) -> bytes:
    return b"" if tokenizer is None else tokenizer.token_bytes(token, skip_special_tokens=False)


def _text(raw: bytes, token: int, tokenizer: Tokenizer | None) -> str:
    """A token as text; part of a character is U+FFFD, as OpenAI has it."""
    return f"token_id:{token}" if tokenizer is None else raw.decode("utf-8", "replace")
