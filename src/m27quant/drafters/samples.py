"""What a drafter learns from: token sequences, and which of their tokens the target wrote.

A data folder of `m27quant drafter generate-data` is read by its manifest; a JSON-lines file row by row, each row in
one of these forms:

    {"prompt_token_ids": [...], "token_ids": [...]}             a prompt and the target's answer
    {"messages": [{"role": "user", "content": "..."}, ...]}     a chat; `conversations` too, also as ShareGPT has it
    {"text": "..."}                                             text: all of it is learned
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.calib.data import TEXT_SUFFIXES
from m27quant.checkpoint.durable import sha256_of
from m27quant.checkpoint.strict_json import parse, read_object, require_regular_file
from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError, escape

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_LINE_BYTES = 64 * 2**20
FORMS = "prompt_token_ids and token_ids, messages, conversations, or text"
NOT_ROWS = (*TEXT_SUFFIXES, ".parquet")
"""Of files that prompts are taken from, and that hold nothing to learn as they are."""
NO_TOKENIZER = "text needs a tokenizer, and the target has no tokenizer.json"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "tool": "tool"}  # fmt: skip
"""ShareGPT's names of roles, and OpenAI's."""
ANSWER = re.compile(r"(\]~b\]ai\n(?:<think>\n)?)(.*?\[e~\[)", re.DOTALL)
"""A turn of the assistant in MiniMax-M2's template: what a prompt ends in, and what the target writes behind it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of prompt and answer."""

    id: str
    tokens: array[int]
    """int32, all of them; `ids` as a list."""
    learned: tuple[tuple[int, int], ...]
    """[begin, end) of each stretch that the target wrote, ascending."""

    @property
    def ids(self) -> list[int]:
        return self.tokens.tolist()

    @property
    def num_prompt(self) -> int:
        """Tokens before the first one that the target wrote."""
        return self.learned[0][0] if self.learned else len(self.tokens)

    @property
    def loss_mask(self) -> list[bool]:
        """For each token whether the target wrote it."""
        mask = [False] * len(self.tokens)
        for begin, end in self.learned:
            mask[begin:end] = [True] * (end - begin)
        return mask

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, max_length: int) -> Sample:
        """Its first `max_length` tokens."""
        if len(self.tokens) <= max_length:
            return self
        kept = tuple((b, min(e, max_length)) for b, e in self.learned if b < max_length)
        return Sample(self.id, self.tokens[:max_length], kept)


def sample_of(id: str, prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """A prompt and what the target wrote behind it."""
    begin, end = len(prompt), len(prompt) + len(answer)
    return Sample(id, array("i", [*prompt, *answer]), ((begin, end),) if answer else ())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data folder.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{escape(folder)}: no {MANIFEST} in it, so no data folder",
            hint="name a folder of `m27quant drafter generate-data`, or a JSONL file",
        )
    manifest = read_object(folder / MANIFEST)
    where = escape(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{where}: schema_version is {escape(manifest.get('schema_version'))}, {SCHEMA_VERSION} is known",
            hint="read it with the version of m27quant that made it",
        )
    shards = manifest.get("shards")
    good = isinstance(shards, list) and all(
        isinstance(s, dict)
        and re.fullmatch(r"shard-\d{5,9}\.jsonl", str(s.get("file")), re.ASCII)
        and isinstance(s.get("sha256"), str)
        and isinstance(s.get("samples"), int)
        for s in shards
    )
    if not good:
        raise CheckpointError(
            f"{where}: shards is no list of file, samples and sha256", hint="make the data again"
        )
    return manifest


def read_samples(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> list[Sample]:
    """All samples of a data folder, or of a JSON-lines file.

    Args:
        path: the folder, of which the shards that are finished count, or the file.
        tokenizer: the target's; for rows of text or messages.
        vocab_size: token ids must be below it.
        max_length: samples are cut to so many tokens.

    Raises:
        CheckpointError: a row that cannot be used (file and line are named), or a shard that has changed.
        UsageError: no sample at all, or rows that need a tokenizer where there is none.
    """
    path = Path(path)
    if path.is_file() and path.suffix in NOT_ROWS:
        raise UsageError(
            f"{escape(path)}: no JSON lines",
            hint=f"let the target write behind it: m27quant drafter generate-data TARGET OUT --dataset {escape(path)}",
        )
    samples = list(_folder(path, vocab_size) if path.is_dir() else _file(path, tokenizer, vocab_size))
    if not samples:
        raise UsageError(f"{escape(path)} holds no samples", hint=f"write one row for each: {FORMS}")
    return samples if max_length is None else [sample.cut(max_length) for sample in samples]


def _folder(folder: Path, vocab_size: int | None) -> Iterator[Sample]:
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["file"]
        require_regular_file(path)
        if sha256_of(path) != shard["sha256"]:
            raise CheckpointError(
                f"{escape(path)}: not what {MANIFEST} says (SHA-256)",
                hint="make the data again, or fetch them again",
            )
        yield from _file(path, None, vocab_size)


def _file(path: Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> Iterator[Sample]:
    reader = SampleReader(tokenizer, vocab_size)
    for number, (where, row) in enumerate(json_lines(path)):
        sample = reader.sample(row, where, str(number))
        if len(sample):
            yield sample


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", row) of every line that is not blank.

    Raises:
        CheckpointError: a line that is too long, no JSON, or no object.
        EnvironmentFault: the file cannot be read.
    """
    require_regular_file(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                where = f"{escape(path)}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise CheckpointError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes", hint="cut it")
                if not line.strip():
                    continue
                row = parse(line, where)
                if not isinstance(row, dict):
                    raise CheckpointError(
                        f"{where}: a row must be an object, found {type(row).__name__}", hint=f"write {FORMS}"
                    )
                yield where, row
    except OSError as fault:
        raise EnvironmentFault(
            f"{escape(path)}: cannot be read ({fault.strerror})", hint="check its permissions"
        ) from None


class SampleReader:
    """Rows to samples."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def sample(self, row: dict[str, Any], where: str, number: str) -> Sample:
        id = row["id"] if isinstance(row.get("id"), str) else number
        if row.get("prompt_token_ids") is not None or row.get("token_ids") is not None:
            prompt, answer = (
                token_ids(row.get(key, []), self._vocab_size, f"{where}: `{key}`")
                for key in ("prompt_token_ids", "token_ids")
            )
            return sample_of(id, prompt, answer)
        messages = messages_of(row, where)
        if messages is not None:
            return self._chat(id, messages, row.get("tools"), where)
        if isinstance(row.get("text"), str):
            return sample_of(id, [], self._encode(row["text"], where))
        keys = escape(", ".join(map(str, row)))
        raise CheckpointError(
            f"{where}: nothing to learn in a row with the keys {keys}", hint=f"write {FORMS}"
        )

    def _chat(self, id: str, messages: list[dict[str, Any]], tools: Any, where: str) -> Sample:
        text = located(where, lambda: self._need().render(messages, tools))
        ids: array[int] = array("i")
        learned = []
        at = 0
        for found in ANSWER.finditer(text):
            ids.extend(self._encode(text[at : found.start(2)], where))
            begin, at = len(ids), found.end(2)
            ids.extend(self._encode(found[2], where))
            learned.append((begin, len(ids)))
        if not learned:
            raise CheckpointError(f"{where}: no turn of the assistant to learn", hint="add its answer")
        ids.extend(self._encode(text[at:], where))
        return Sample(id, ids, tuple(learned))

    def _encode(self, text: str, where: str) -> list[int]:
        ids = located(where, lambda: self._need().rendered(text))
        return token_ids(ids, self._vocab_size, where)

    def _need(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(NO_TOKENIZER, hint="write prompt_token_ids and token_ids")
        return self._tokenizer


def messages_of(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The turns of a chat row, under OpenAI's names; None where the row is none.

    Raises:
        CheckpointError: turns that are no turns.
    """
    key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
    if key is None:
        return None
    turns = row[key]
    hint = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise CheckpointError(f"{where}: `{key}` is no list of turns", hint=hint)
    found = []
    for turn in turns:
        if "from" in turn and "role" not in turn:
            role = ROLES.get(str(turn["from"]))
            turn = {"role": role, "content": turn.get("value")}
        if not isinstance(turn.get("role"), str):
            raise CheckpointError(f"{where}: a turn of `{key}` without a role that is known", hint=hint)
        if turn.get("content") is None and not turn.get("tool_calls"):
            raise CheckpointError(f"{where}: a turn of `{key}` without content", hint=hint)
        found.append(turn)
    return found


def token_ids(value: Any, vocab_size: int | None, where: str) -> list[int]:
    """A list of token ids, checked."""
    limit = 2**31 if vocab_size is None else vocab_size
    if not isinstance(value, list):
        raise CheckpointError(f"{where} is no list of token ids", hint="write [1, 2, 3]")
    for index in value:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < limit:
            raise CheckpointError(
                f"{where} holds {escape(repr(index))}; token ids are integers from 0 to {limit - 1}",
                hint="make the data with this target's tokenizer",
            )
    return value


def located(where: str, make: Any) -> Any:
    """Say of what is wrong with a row where the row is."""
    try:
        return make()
    except (CheckpointError, UsageError) as fault:
        raise type(fault)(f"{where}: {fault.message}", hint=fault.hint or f"write {FORMS}") from None
