"""Signs of a sick text: spaces where none belong, repetition, broken characters.  Shares from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NGRAM = 8
_EXTENSIONS = (
    "md|py|txt|json|jsonl|js|ts|tsx|html|css|ya?ml|toml|rs|go|cpp|hpp|java|sh|cfg|ini|xml|csv|sql|lock"
)
_SPURIOUS = re.compile(
    "|".join(
        (
            rf"\b\w[\w-]*(?:\. | \.)(?:{_EXTENSIONS})\b",  # a file name cut in two: "SPEC. md"
            r"\b(?:os|sys|self|np|torch|json|re)(?: \. ?|\. )[a-z_]\w*",  # a dotted name: "os. path"
            r"\w '(?:t|s|re|ve|ll)\b",  # a word with its ending apart: "don 't"
        )
    )
)
_WORD = re.compile(r"\S+")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Health:
    """Of one or several texts."""

    spurious_spaces: float
    """Per word."""
    repetition: float
    """Share of 8-grams of tokens that stood in the same text before."""
    broken_characters: float
    """Share of characters that were no valid UTF-8."""


class Counts(NamedTuple):
    """Of one text: how often each sign stands in it, and among how many places."""

    spurious_spaces: int
    words: int
    repeated: int
    ngrams: int
    broken_characters: int
    characters: int


def counts(text: str, tokens: Sequence[int]) -> Counts:
    """The signs of one text and of its tokens."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return Counts(
        spurious_spaces=len(spurious_spaces(text)),
        words=len(_WORD.findall(text)),
        repeated=len(grams) - len(set(grams)),
        ngrams=len(grams),
        broken_characters=text.count(REPLACEMENT),
        characters=len(text),
    )


def health(texts: Iterable[str], tokens: Iterable[Sequence[int]]) -> Health:
    """Figures of texts and of their tokens, all together."""
    each = [counts(text, ids) for text, ids in zip(texts, tokens, strict=True)]
    total = Counts(*(sum(column) for column in zip(*each, strict=True))) if each else Counts(0, 0, 0, 0, 0, 0)
    return Health(
        spurious_spaces=total.spurious_spaces / max(1, total.words),
        repetition=total.repeated / max(1, total.ngrams),
        broken_characters=total.broken_characters / max(1, total.characters),
    )


def spurious_spaces(text: str) -> list[str]:
    """The places where a space stands that nobody writes."""
    return [match[0] for match in _SPURIOUS.finditer(text)]
