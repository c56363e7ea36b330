"""What is asked: the tasks of the drafters' cards with their prompts word for word, or rows of a local file.

Data sets and wrappers are those of z-lab/dflash's benchmark, so that figures can be compared with its cards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from m27quant.checkpoint.paths import existing
from m27quant.checkpoint.strict_json import parse, read_bytes, require_regular_file
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError, escape

Conversation = list[dict[str, Any]]
"""Messages in OpenAI's form."""

MAX_FILE_BYTES = 2**30
STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FILE_HINT = "pass --task FILE.jsonl, or --task NAME=FILE for the wrapper of a task"


@dataclass(frozen=True, slots=True)
class Task:
    """A data set, and how a row of it becomes a user's message."""

    name: str
    hub_id: str
    config: str | None
    split: str
    column: str
    prompt: Callable[[str], str]

    def conversation(self, row: Mapping[str, Any], where: str) -> Conversation:
        """The messages of one row.

        Raises:
            CheckpointError: the column is missing or holds no text.
        """
        value = row.get(self.column)
        if isinstance(value, list) and value:  # MT-Bench: the first turn
            value = value[0]
        if not isinstance(value, str) or not value.strip():
            raise CheckpointError(
                f"{where}: no text in the column {self.column!r}, which {self.name} needs",
                hint=f"take the rows of {self.hub_id}, or another task's name",
            )
        return _user(self.prompt(value))


def _reason(text: str) -> str:
    return text + STEP_BY_STEP


def _solve(text: str) -> str:
    lead = "Write a solution to the following problem and make sure that it passes the tests:"
    return f"{lead}\n```python\n{text}\n```"


def _as_is(text: str) -> str:
    return text


TASKS = {
    task.name: task
    for task in (
        Task("math500", "HuggingFaceH4/MATH-500", None, "test", "problem", _reason),
        Task("gsm8k", "openai/gsm8k", "main", "test", "question", _reason),
        Task("humaneval", "openai/openai_humaneval", None, "test", "prompt", _solve),
        Task("mt-bench", "HuggingFaceH4/mt_bench_prompts", None, "train", "prompt", _as_is),
    )
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A task's questions."""

    name: str
    conversations: list[Conversation]


def load_task(argument: str, *, offline: bool = False, token: str | None = None) -> Loaded:
    """Read what `--task` names: a task of `TASKS` from the Hub, NAME=FILE, or a JSONL or Parquet file.

    A file's rows are taken as the task whose columns they have: `problem` (math500), `question` (gsm8k), `prompt` with
    `entry_point` (humaneval), `prompt` as a list or `turns` (mt-bench).  A plain `prompt` is a user's message as it is,
    and `messages` are a conversation.

    Raises:
        UsageError: neither a task nor a file; a file without rows.
        CheckpointError: a row that cannot be used, by file and line.
        EnvironmentFault: the Hub cannot be reached; says what to do.
    """
    name, has_file, file = argument.partition("=")
    if has_file and name in TASKS:
        path = existing(file)
        if path is None:
            raise UsageError(f"--task {escape(argument)}: no such file", hint=FILE_HINT)
        return _loaded(name, _rows(path), TASKS[name].conversation, escape(path))
    if argument in TASKS:
        rows = _hub_rows(TASKS[argument], offline, token)
        return _loaded(argument, rows, TASKS[argument].conversation, TASKS[argument].hub_id)
    path = existing(argument)
    if path is None:
        raise UsageError(f"--task {escape(argument)}: neither {', '.join(TASKS)} nor a file", hint=FILE_HINT)
    return _loaded(path.stem, _rows(path), conversation_of, escape(path))


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """The messages of a row of a file whose task is told by its columns; raises `CheckpointError`."""
    prompt = row.get("prompt")
    if isinstance(messages := row.get("messages"), list) and messages:
        if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise CheckpointError(
                f"{where}: a message has no role",
                hint='write {"messages": [{"role": "user", "content": "..."}]}',
            )
        return [dict(m) for m in messages]
    if "problem" in row:
        return TASKS["math500"].conversation(row, where)
    if "question" in row:
        return TASKS["gsm8k"].conversation(row, where)
    if "entry_point" in row:
        return TASKS["humaneval"].conversation(row, where)
    if isinstance(prompt, list):
        return TASKS["mt-bench"].conversation(row, where)
    if isinstance(turns := row.get("turns"), list):  # FastChat's own file of MT-Bench
        return TASKS["mt-bench"].conversation({"prompt": turns}, where)
    if isinstance(prompt, str) and prompt.strip():
        return _user(prompt)
    raise CheckpointError(
        f"{where}: none of the columns problem, question, prompt, messages holds a question",
        hint='write {"prompt": "..."} for a plain question',
    )


def _user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def _loaded(
    name: str,
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    conversation: Callable[[Mapping[str, Any], str], Conversation],
    shown: str,
) -> Loaded:
    found = [conversation(row, where) for where, row in rows]
    if not found:
        raise UsageError(f"{shown} holds no rows", hint=FILE_HINT)
    return Loaded(name, found)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, row) of a JSONL or Parquet file."""
    if path.is_dir():
        raise UsageError(f"--task {escape(path)} is a folder", hint=FILE_HINT)
    return _parquet(path) if PurePath(path).suffix == ".parquet" else _jsonl(path)


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(read_bytes(path, MAX_FILE_BYTES).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{escape(path)}, line {number}"
        row = parse(line, where)
        if not isinstance(row, dict):
            raise CheckpointError(
                f"{where}: a row must be an object, found {type(row).__name__}", hint=FILE_HINT
            )
        yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    require_regular_file(path)
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as fault:
        raise CheckpointError(
            f"{escape(path)}: not a readable Parquet file ({escape(fault)})", hint=FILE_HINT
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{escape(path)}, row {number}", row


def _hub_rows(task: Task, offline: bool, token: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import huggingface_hub.constants

    where = f"task {task.name}: {task.hub_id} ({task.split})"
    hint = (
        f"where there is a network: hf download --repo-type dataset {task.hub_id} --local-dir {task.name}; "
        f"then pass its JSONL or Parquet file here as --task {task.name}=FILE"
    )
    if offline or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise EnvironmentFault(f"{where} is on the Hub, and offline mode is on", hint=hint)
    import datasets

    try:
        rows = datasets.load_dataset(task.hub_id, task.config, split=task.split, token=token)
        for number, row in enumerate(rows, start=1):
            yield f"{where}, row {number}", row
    except Exception as fault:  # noqa: BLE001 - network, gating and parsing faults of many libraries
        first = escape(str(fault).partition("\n")[0])
        raise EnvironmentFault(f"{where} cannot be read: {first}", hint=hint) from None
