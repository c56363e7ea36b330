"""Shell patterns over quantizer names, as modelopt matches them (`fnmatch`); no regular expressions."""

from __future__ import annotations

import fnmatch
import re

_PLAIN_CLASS = re.compile(r"\[[A-Za-z_]+\]")
_DIGIT = re.compile(r"[0-9]")


class Pattern:
    """One pattern, compiled, with what tells early that a name cannot match.

    Raises:
        re.error: a character class that Python cannot read.
    """

    def __init__(self, text: str) -> None:
        self._match = re.compile(fnmatch.translate(text)).match
        self.reads_digits = re.search(r"[0-9?\[\]]", _PLAIN_CLASS.sub("", text)) is not None
        """False when only `*` can cover an index: then names that differ in indices alone match alike."""
        head, _, rest = text.partition("[")
        literals = re.split(r"[*?]+", head) + re.split(r"[*?]+", rest.rpartition("]")[2])
        self._words = [word for word in literals if word and not _DIGIT.search(word)]
        self._number = max((word for word in literals if _DIGIT.search(word)), key=len, default="")

    def may_match(self, name: str) -> bool:
        """Return False when no name that differs from `name` in indices alone can match."""
        return all(word in name for word in self._words)

    def matches(self, name: str) -> bool:
        """Return whether the whole of `name` matches."""
        return self._number in name and self._match(name) is not None
