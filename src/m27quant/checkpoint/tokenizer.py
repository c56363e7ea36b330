"""A checkpoint's own tokenizer and chat template: read as data, nothing of the checkpoint's code is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, UsageError, escape


class Tokenizer:
    """Text or conversations to token ids and back, with tokenizer.json of a checkpoint folder as it stands.

    transformers' tokenizer classes are kept out: version 5 replaces the pre-tokenizer of M2's class.
    """

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json.

        Raises:
            CheckpointError: missing or damaged.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{escape(folder)}: no tokenizer.json, so text cannot become tokens",
                hint="fetch it, or pass --dataset rows that hold `input_ids`",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as fault:  # noqa: BLE001 - the library raises bare Exception
            raise CheckpointError(f"{escape(path)}: not a tokenizer ({escape(fault)})") from None
        self._tokenizer.no_padding()  # a tokenizer.json may ask for both
        self._tokenizer.no_truncation()
        self._folder = folder
        self._template: str | None = None
        self._bytes: dict[int, bytes] | None = None
        self._special: frozenset[int] = frozenset()

    def text(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of `text`, at most `limit`, with the special tokens that the tokenizer adds by itself.

        Raises:
            CheckpointError: text that UTF-8 cannot hold.
        """
        return self._encode(text, special=True)[:limit]

    def chat(self, messages: list[dict[str, Any]], tools: Any = None, limit: int | None = None) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template.

        Raises:
            CheckpointError: as `render`, or text that UTF-8 cannot hold.
            UsageError: as `render`.
        """
        return self.rendered(self.render(messages, tools))[:limit]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Any = None,
        *,
        add_generation_prompt: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The text of a conversation; `template_arguments` are variables that the template may look at.

        Raises:
            CheckpointError: the template refuses the conversation.
            UsageError: the checkpoint has no template.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._chat_template()
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **template_arguments,
            )[0]
        except Exception as fault:  # noqa: BLE001 - a template may raise whatever it likes
            raise CheckpointError(f"the chat template refuses the messages: {escape(fault)}") from None
        return str(rendered[0])

    def rendered(self, text: str) -> list[int]:
        """Token ids of text in which a template has already put every special token.

        Raises:
            CheckpointError: text that UTF-8 cannot hold.
        """
        return self._encode(text, special=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no whole character become U+FFFD, ids without a token nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, index: int, *, skip_special_tokens: bool = True) -> bytes:
        """What one token adds to the text's UTF-8; a character may be spread over several tokens.

        Joined and decoded with replacement these are the text that `decode` gives.

        Raises:
            CheckpointError: a tokenizer that is not byte-level, as M2's is.
        """
        if self._bytes is None:
            self._bytes = self._byte_level()
        return b"" if skip_special_tokens and index in self._special else self._bytes.get(index, b"")

    def _byte_level(self) -> dict[int, bytes]:
        from tokenizers import decoders

        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            raise CheckpointError(
                f"{escape(self._folder)}: tokenizer.json has no byte-level decoder, as MiniMax-M2's has",
                hint="fetch the official tokenizer.json",
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        byte_of = _byte_of_character()
        result = {}
        for text, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            known = all(c in byte_of for c in text)
            result[index] = bytes(byte_of[c] for c in text) if known else text.encode()
        return result

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text; None where the vocabulary has none."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise CheckpointError(f"text with half a surrogate pair at character {fault.start}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can become a prompt."""
        try:
            return bool(self._chat_template())
        except UsageError:
            return False

    def _chat_template(self) -> str:
        if self._template is None:
            path = self._folder / "chat_template.jinja"
            config = self._folder / "tokenizer_config.json"
            if path.is_file():
                self._template = path.read_text(encoding="utf-8")
            elif config.is_file():
                self._template = read_object(config).get("chat_template")
            if not isinstance(self._template, str):
                raise UsageError(
                    f"{escape(self._folder)}: no chat template, so messages cannot become a prompt",
                    hint="add chat_template.jinja, or give plain text",
                )
        return self._template


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as a printable character: those of Latin-1 as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
