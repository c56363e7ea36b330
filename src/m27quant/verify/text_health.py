"""Signs of a sick text: spaces where none belong, repetition, broken characters.  Shares from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def health(texts: Iterable[str], tokens: Iterable[Sequence[int]]) -> Health:
    """Figures of texts and of their tokens."""
    together = list(texts)
    words = sum(len(_WORD.findall(text)) for text in together)
    characters = sum(map(len, together))
    repeated, total = 0, 0
    for ids in tokens:
        grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return Health(
        spurious_spaces=sum(len(spurious_spaces(text)) for text in together) / max(1, words),
        repetition=repeated / max(1, total),
        broken_characters=sum(text.count(REPLACEMENT) for text in together) / max(1, characters),
    )


def spurious_spaces(text: str) -> list[str]:
    """The places where a space stands that nobody writes."""
    return [match[0] for match in _SPURIOUS.finditer(text)]
