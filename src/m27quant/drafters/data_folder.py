"""A data folder while it is being made: every answer durable when it is there, every shard when it is full.

OUT/shard-00000.jsonl ... hold samples in the order of their numbers, and OUT/manifest.json says which shards there are.
Answers of a shard that is not full yet lie in OUT/.m27quant/shard-00000.journal, in the order in which they came.
What a run that was killed leaves behind becomes, resumed, byte for byte what it would have been.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from m27quant.checkpoint.durable import (
    fault_point,
    raise_for_os_error,
    sha256_of,
    sweep_temporaries,
    write_durably,
)
from m27quant.checkpoint.journal import Journal
from m27quant.checkpoint.lock import OutputLock
from m27quant.checkpoint.workspace import PRIVATE
from m27quant.drafters.samples import MANIFEST, SCHEMA_VERSION, read_manifest
from m27quant.errors import OutputError, UsageError, escape

KIND = "drafter data"
TOLD = ("command", "target_name")
"""What a description says that samples do not follow from."""
FIELDS = ("id", "prompt_token_ids", "token_ids", "finish_reason", "prompt", "text")
"""Of a row, in this order, whether or not it has been through a journal."""


class DataFolder:
    """OUT, opened by one run; the lock is held until `close`."""

    def __init__(
        self,
        out: Path,
        description: Mapping[str, Any],
        num_samples: int,
        shard_size: int,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Begin, or go on where a former run stopped.

        Args:
            out: the folder; made if it is not there.
            description: whatever the samples follow from (JSON values), and more that the manifest is to say.
            num_samples: samples in all.
            shard_size: samples of a shard.
            resume: go on if there is something to go on with.
            overwrite: drop what is there.

        Raises:
            OutputError: somebody else's files, or another run is writing.
            UsageError: data are there and neither flag was given, or `resume` with other settings.
            CheckpointError: what is there is damaged.
            EnvironmentFault: not writable.
        """
        self.out, self._size, self._num_samples = out, shard_size, num_samples
        self._private = out / PRIVATE
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "kind": KIND}
        self._head = head | json.loads(json.dumps(dict(description)))
        check_free(out, resume=resume, overwrite=overwrite)
        try:
            self._private.mkdir(parents=True, exist_ok=True)
            self._lock = OutputLock(self._private)
            self._lock.acquire(force=False)
        except OSError as fault:
            raise_for_os_error(fault, out)
        try:
            self._begin(resume=resume, overwrite=overwrite)
        except BaseException:
            self._give_back(forget=True)
            raise

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        check_free(self.out, resume=resume, overwrite=overwrite)  # another run may have come and gone
        there = (self.out / MANIFEST).exists()
        if overwrite:
            self._clear()
        sweep_temporaries(self.out)
        self.shards: dict[int, dict[str, Any]] = {}
        """Manifest entries by number."""
        if there and resume:
            self._take_up()
        self._journals: dict[int, Journal] = {}
        self._rows: dict[int, dict[int, dict[str, Any] | None]] = {}
        for number in range(self.num_shards):
            path = self._journal_path(number)
            if number in self.shards:
                path.unlink(missing_ok=True)
            elif path.exists():
                self._open(number)
        self._write_manifest()
        for number in sorted(self._rows):
            self._close_if_full(number)

    def _take_up(self) -> None:
        manifest = read_manifest(self.out)
        for key in TOLD:
            self._head[key] = manifest.get(key)  # of the run that began
        changed = [key for key, value in self._head.items() if manifest.get(key) != value]
        if changed:
            raise UsageError(
                f"{escape(self.out)} belongs to another run: {_difference(manifest, self._head, changed[0])}",
                hint="repeat the former command with --resume, or pass --overwrite",
            )
        for entry in manifest["shards"]:
            path = self.out / entry["file"]
            number = int(entry["file"][6:-6])
            if path.is_file() and sha256_of(path) == entry["sha256"] and number < self.num_shards:
                self.shards[number] = entry  # a shard that is lost or damaged is made again

    def _clear(self) -> None:
        (self.out / MANIFEST).unlink(missing_ok=True)
        for path in (*self.out.glob("shard-*.jsonl"), *self._private.glob("shard-*.journal")):
            path.unlink(missing_ok=True)

    # -- writing -----------------------------------------------------------------------------------

    @property
    def num_shards(self) -> int:
        return -(-self._num_samples // self._size)

    def missing(self) -> list[int]:
        """Numbers of samples that are not there yet, ascending."""
        return [
            index
            for index in range(self._num_samples)
            if index // self._size not in self.shards and index not in self._rows.get(index // self._size, {})
        ]

    def add(self, index: int, row: Mapping[str, Any] | None) -> None:
        """Make a sample durable; None where there is none to be had."""
        number = index // self._size
        if number not in self._journals:
            self._open(number)
        self._journals[number].append("sample", index=index, row=None if row is None else dict(row))
        self._rows[number][index] = None if row is None else dict(row)
        self._close_if_full(number)

    def _open(self, number: int) -> None:
        journal = Journal(self._journal_path(number))
        self._journals[number] = journal
        self._rows[number] = {entry["index"]: entry["row"] for entry in journal.all("sample")}
        journal.entries.clear()  # they are kept as rows

    def _close_if_full(self, number: int) -> None:
        begin = number * self._size
        indices = range(begin, min(begin + self._size, self._num_samples))
        rows = self._rows[number]
        if len(rows) < len(indices):
            return
        found = [row for index in indices if (row := rows[index]) is not None]
        path = self.out / f"shard-{number:05d}.jsonl"
        lines = "".join(
            json.dumps({key: row[key] for key in FIELDS}, ensure_ascii=False) + "\n" for row in found
        )
        write_durably(path, lines.encode("utf-8", "replace"))
        fault_point("shard-written")
        self.shards[number] = {
            "file": path.name,
            "samples": len(found),
            "failed": len(rows) - len(found),
            "prompt_tokens": sum(len(row["prompt_token_ids"]) for row in found),
            "tokens": sum(len(row["token_ids"]) for row in found),
            "sha256": sha256_of(path),
        }
        self._write_manifest()
        fault_point("manifest-written")
        self._journals.pop(number).close()
        self._journal_path(number).unlink(missing_ok=True)
        del self._rows[number]

    def _write_manifest(self) -> None:
        shards = [self.shards[number] for number in sorted(self.shards)]
        totals = {
            key: sum(shard[key] for shard in shards)
            for key in ("samples", "failed", "prompt_tokens", "tokens")
        }
        document = self._head | {"finished": len(shards) == self.num_shards, **totals, "shards": shards}
        write_durably(self.out / MANIFEST, (json.dumps(document, indent=2) + "\n").encode())

    def _journal_path(self, number: int) -> Path:
        return self._private / f"shard-{number:05d}.journal"

    def close(self) -> None:
        """Give the folder back; of finished data nothing of ours is left but the data."""
        for journal in self._journals.values():
            journal.close()
        self._give_back(forget=len(self.shards) == self.num_shards)

    def _give_back(self, *, forget: bool) -> None:
        self._lock.release(forget=forget)
        if forget:
            with suppress(OSError):  # an unfinished shard is in it, or another run has come
                self._private.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_free(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may write to `out`, as far as can be told without changing anything.

    Raises:
        OutputError: it holds what no run of ours puts there.
        UsageError: data are there without the flag that says what to do.
        EnvironmentFault: not readable.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", hint="choose one of them")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{escape(out)}: exists and is not a folder", hint="choose another OUT")
    try:
        found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as fault:
        raise_for_os_error(fault, out)
    strange = [name for name in found if not _is_ours(name)]
    if strange:
        raise OutputError(
            f"{escape(out)}: holds other files ({escape(strange[0])})", hint="choose a new or empty folder"
        )
    if MANIFEST in found and not (resume or overwrite):
        kind = "finished" if read_manifest(out).get("finished") is True else "unfinished"
        raise UsageError(
            f"{escape(out)}: {kind} data are there already",
            hint="pass --resume to go on, or --overwrite to start again",
        )


def _is_ours(name: str) -> bool:
    shard = name.startswith("shard-") and name.endswith(".jsonl")
    return name in (PRIVATE, MANIFEST) or shard or name.startswith(".tmp-")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    was, will = before.get(key), now[key]
    if isinstance(was, dict) and isinstance(will, dict):
        inner = next(name for name in sorted({*was, *will}) if was.get(name) != will.get(name))
        return f"{key}.{escape(inner)} was {escape(was.get(inner))}, now {escape(will.get(inner))}"
    return f"{key} was {escape(was)}, now {escape(will)}"
