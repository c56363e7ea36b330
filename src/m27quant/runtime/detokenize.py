"""Token ids to text, token by token: whole characters only, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from m27quant.checkpoint.tokenizer import Tokenizer


class Detokenizer:
    """The text of one output as it grows; `text` is what may be shown."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, skip_special_tokens: bool) -> None:
        self.text = ""
        self._tokenizer, self._stop, self._skip = tokenizer, stop, skip_special_tokens
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""

    def add(self, token: int) -> bool:
        """Append a token; True where its text completes a stop string, before which the text then ends."""
        piece = self._tokenizer.token_bytes(token, skip_special_tokens=self._skip)
        return self._extend(self._decode(piece))

    def finish(self) -> None:
        """No token follows: what was held back is text now, bytes without an end are U+FFFD."""
        self._extend(self._decode(b"", True))
        self.text += self._held
        self._held = ""

    def _extend(self, piece: str) -> bool:
        self._held += piece
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.text += self._held[: min(found)]
            self._held = ""
            self._stop = ()
            return True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        self.text += self._held[:cut]
        self._held = self._held[cut:]
        return False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
