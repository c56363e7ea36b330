"""The output folder while it is being made: who may write, what is done, and the moment it becomes a checkpoint.

Invariant: OUT is a checkpoint if and only if config.json and the index exist in it, and they land last.  Until the
commit OUT holds nothing new but `.m27quant/`; an older checkpoint that is being overwritten stays whole until then.
Only what the journal or an older report of ours names is ever replaced or removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from m27quant.checkpoint.durable import (
    fault_point,
    move_durably,
    raise_for_os_error,
    sha256_of,
    sweep_temporaries,
    sync_folder,
    write_durably,
)
from m27quant.checkpoint.journal import Journal
from m27quant.checkpoint.lock import OutputLock
from m27quant.checkpoint.source import INDEX
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, OutputError, UsageError, escape

PRIVATE = ".m27quant"
REPORT = "quantization_report.json"
CONFIG = "config.json"
LAST = (CONFIG, INDEX)
"""Written in this order after everything else: they make the folder a checkpoint."""


class Workspace:
    """OUT, opened by one run from `open` to `close`; the lock is held between them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.private = out / PRIVATE
        self.work = self.private / "work"
        self.journal: Journal
        self._staged = self.private / "documents"
        self._lock = OutputLock(self.private)
        self._made: list[Path] = []
        """Folders that this run made, outermost first."""
        self._mine = False
        """The journal is this run's: begun by it, or by an earlier one with the same inputs."""

    # -- opening --------------------------------------------------------------------------------

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin here, as far as can be told without changing anything.

        Raises:
            OutputError: locked by another run, or somebody else's files.
            UsageError: an unfinished or finished output without the flag that says what to do.
            CheckpointError: `resume` on a finished output that has lost files since.
            EnvironmentFault: not readable.
        """
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other", hint="choose one of them")
        shown = escape(self.out)
        try:
            if self.private.is_symlink():
                raise OutputError(f"{escape(self.private)}: a link", hint="put a folder in its place")
            if self.out.exists() and not self.out.is_dir():
                raise OutputError(f"{shown}: exists and is not a folder", hint="choose another OUT")
            found = sorted(p.name for p in self.out.iterdir()) if self.out.exists() else []
            self._lock.probe()
            ours = self._is_ours()
        except OSError as fault:
            raise_for_os_error(fault, self.out)
        fresh = set(found) <= {PRIVATE} and not self.is_unfinished()  # or it died before it recorded anything
        if fresh or (overwrite and ours):
            return
        if not ours:
            names = ", ".join(escape(n) for n in found[:5]) + (" ..." if len(found) > 5 else "")
            raise OutputError(
                f"{shown}: not empty, and not made by m27quant ({names})",
                hint="choose an empty or new folder",
            )
        if not resume and self.is_unfinished():
            raise UsageError(
                f"{shown}: holds an unfinished run",
                hint="continue it with --resume, or drop it with --overwrite",
            )
        if not resume:
            raise UsageError(
                f"{shown}: already holds a finished checkpoint", hint="replace it with --overwrite"
            )
        self._check_finished_files()

    def open(
        self, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool, force_unlock: bool = False
    ) -> None:
        """Take the lock and the journal, fresh or resumed.

        Raises:
            M27Error: as `check` does.
            UsageError: a resume with other inputs; every difference is listed.
            EnvironmentFault: not writable.
        """
        self.check(resume=resume, overwrite=overwrite)
        try:
            self._make_folders()
            self._lock.acquire(force=force_unlock)
            self.check(resume=resume, overwrite=overwrite)  # another run may have come and gone
            if overwrite:
                self._discard()
            self.work.mkdir(exist_ok=True)
            sync_folder(self.private)
            self.journal = Journal(self.private / "journal.jsonl")
            self._check_fingerprint(json.loads(json.dumps(fingerprint)))
            self._sweep()
        except BaseException as fault:
            self.abandon()
            if isinstance(fault, OSError):
                raise_for_os_error(fault, self.private)
            raise

    def _make_folders(self) -> None:
        missing = [p for p in (self.private, *self.private.parents) if not p.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                folder.mkdir()
                self._made.append(folder)
                sync_folder(folder.parent)

    def is_unfinished(self) -> bool:
        """True where a journal tells of work that is not committed and cleaned up."""
        return (self.private / "journal.jsonl").exists()

    def is_complete(self) -> bool:
        """A finished checkpoint of ours with nothing left to do."""
        return not self.is_unfinished() and self._report() is not None and self._has_last()

    def _has_last(self) -> bool:
        return all((self.out / name).exists() for name in LAST)

    def _is_ours(self) -> bool:
        return self.private.is_dir() or self._report() is not None

    def _report(self) -> dict[str, Any] | None:
        """quantization_report.json of a finished checkpoint, if it is one of ours."""
        try:
            report = read_object(self.out / REPORT)
        except CheckpointError:
            return None
        producer = report.get("producer")
        return report if isinstance(producer, dict) and producer.get("name") == "m27quant" else None

    def finished_report(self) -> dict[str, Any]:
        """The content of a finished checkpoint's quantization_report.json."""
        return self._report() or {}

    def finished_fingerprint(self) -> dict[str, Any]:
        """The fingerprint that a finished checkpoint's report records."""
        fingerprint = (self._report() or {}).get("fingerprint")
        return fingerprint if isinstance(fingerprint, dict) else {}

    def _check_finished_files(self) -> None:
        """A finished output that has lost files is neither to be resumed nor to be called complete."""
        report = self._report()
        if self.is_unfinished() or report is None:
            return
        sizes = report.get("shards")
        for name in _file_names(report.get("files")):
            path = self.out / name
            entry = sizes.get(name) if isinstance(sizes, dict) else None
            size = entry.get("size") if isinstance(entry, dict) else None
            if not path.is_file() or (size is not None and path.stat().st_size != size):
                raise CheckpointError(
                    f"{escape(path)}: missing or cut short since the checkpoint was finished",
                    hint="replace the checkpoint with --overwrite",
                )

    def _check_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        begun = self.journal.find("begin")
        if begun is not None:
            check_same(begun["fingerprint"], fingerprint)
        self._mine = True
        if begun is None:
            self.journal.append("begin", fingerprint=fingerprint)

    def _sweep(self) -> None:
        """Remove what no journal line vouches for."""
        sweep_temporaries(self.private)
        shutil.rmtree(self._staged, ignore_errors=True)
        known = {f["name"] for entry in self.journal.entries for f in entry.get("files", [])}
        for path in self.work.iterdir():
            if path.name not in known:
                path.unlink() if not path.is_dir() else shutil.rmtree(path)

    # -- work -----------------------------------------------------------------------------------

    def intact(self, entry: Mapping[str, Any]) -> bool:
        """The files of a journal entry have the size and content that it says (power may have failed)."""
        return all(is_intact(self.work / file["name"], file) for file in entry["files"])

    def refuse_collisions(self, names: Iterable[str]) -> None:
        """Raise `OutputError` where OUT holds a file of one of `names` that is not ours to replace."""
        ours = self._replaceable(self.journal)
        there = (n for n in names if (self.out / n).exists() or (self.out / n).is_symlink())
        strange = sorted(n for n in there if n not in ours)
        if strange:
            raise OutputError(
                f"{escape(self.out)}: holds files that m27quant did not make and would replace: "
                + ", ".join(escape(n) for n in strange[:5]),
                hint="move them away, then run again",
            )

    def _replaceable(self, journal: Journal) -> set[str]:
        """Files of the checkpoint that is overwritten, and of a commit that has begun."""
        committed = journal.find("commit") or {}
        return {*_file_names((self._report() or {}).get("files")), *_file_names(committed.get("names"))}

    # -- the end --------------------------------------------------------------------------------

    def commit(self, shards: Mapping[str, str], documents: Mapping[str, bytes]) -> None:
        """Make OUT the checkpoint: `shards` maps work files to final names, `documents` are the small files.

        May be killed anywhere and called again with the same arguments.

        Raises:
            OutputError: OUT holds files of these names that are not ours.
            CheckpointError: called again, and a shard is missing or damaged.
            EnvironmentFault: not writable, no space.
        """
        names = sorted({*shards.values(), *documents})
        self.refuse_collisions(names)
        try:
            if self.journal.find("commit") is None:
                self.journal.append("commit", names=names)
            else:
                self._check_shards(shards)
            if not self._has_landed():
                self._land(shards, documents)
            self._clean_up()
        except OSError as fault:
            raise_for_os_error(fault, self.out)

    def _check_shards(self, shards: Mapping[str, str]) -> None:
        """After a crash in a commit: every shard is intact, be it moved already or not."""
        recorded = {f["name"]: f for entry in self.journal.all("unit") for f in entry["files"]}
        for work_name, final in shards.items():
            waiting = self.work / work_name
            if not is_intact(waiting if waiting.exists() else self.out / final, recorded[work_name]):
                raise CheckpointError(
                    f"{escape(self.out / final)}: missing or damaged since it was written",
                    hint="the disk may be failing; start again with --overwrite",
                )

    def _has_landed(self) -> bool:
        """A commit that was cut short after the index had landed needs only the cleaning up."""
        return self._has_last() and not any(self.work.glob("*.safetensors"))

    def _land(self, shards: Mapping[str, str], documents: Mapping[str, bytes]) -> None:
        fault_point("commit-begin")
        self._staged.mkdir(exist_ok=True)
        for name, data in documents.items():
            write_durably(self._staged / name, data)
        stale = self._replaceable(self.journal) - {*shards.values(), *documents}
        self._remove_last()  # an older checkpoint stops being one before its shards go
        fault_point("commit-unlinked")
        for name in sorted(stale):
            (self.out / name).unlink(missing_ok=True)
        for work_name, final in shards.items():
            if (self.work / work_name).exists():
                move_durably(self.work / work_name, self.out / final)
                fault_point("commit-shard")
        for name in sorted(documents, key=lambda n: (LAST.index(n) if n in LAST else -1, n)):
            move_durably(self._staged / name, self.out / name)
            fault_point("commit-document")

    def _remove_last(self) -> None:
        for name in reversed(LAST):
            (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)

    def _clean_up(self) -> None:
        """Leave only the run's log behind.  The journal goes first: without it the folder is finished."""
        fault_point("clean-up")
        (self.private / "journal.jsonl").unlink(missing_ok=True)
        sync_folder(self.private)
        fault_point("clean-up-leftovers")
        self._remove_leftovers()

    def discard_leftovers(self) -> None:
        """Remove what a run left that was killed after its checkpoint was finished."""
        if not self.private.is_dir() or {p.name for p in self.private.iterdir()} <= {"run.log"}:
            return
        with suppress(OSError):  # they do no harm
            self._lock.acquire(force=True)
            if self.is_complete():  # nobody has begun to overwrite it
                self._remove_leftovers()
            self.close()

    def _remove_leftovers(self) -> None:
        for path in self.private.iterdir():
            if path.name not in ("run.log", "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _discard(self) -> None:
        """Forget an older run, and what it may have moved to OUT in a commit that it did not finish."""
        if self.is_unfinished():
            with suppress(CheckpointError):  # a damaged journal vouches for nothing
                journal = Journal(self.private / "journal.jsonl")
                journal.close()
                if journal.find("commit") is not None and not self._has_landed():
                    theirs = self._replaceable(journal)
                    self._remove_last()
                    for name in sorted(theirs, key=lambda n: n == REPORT):  # the list itself goes last
                        (self.out / name).unlink(missing_ok=True)
        self._discard_work()

    def _discard_work(self) -> None:
        (self.private / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self._staged, ignore_errors=True)

    def abandon(self) -> None:
        """Close; a run that has nothing worth resuming is forgotten, and the folder left as it was found."""
        made = self._lock.is_held and self.private in self._made
        worthless = not hasattr(self, "journal") or self.journal.find("unit") is None
        if worthless and (made or self._mine):
            with suppress(OSError):
                self._discard_work()
                if made:
                    shutil.rmtree(self.private)
        self.close()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody has put something in, or another run has taken it
                folder.rmdir()

    def close(self) -> None:
        """Give the lock back."""
        if hasattr(self, "journal"):
            self.journal.close()
            del self.journal
            self._mine = False
        if self._lock.is_held:
            self._lock.release(forget=not self.is_unfinished())


def is_intact(path: Path, file: Mapping[str, Any]) -> bool:
    """The file at `path` has the `size` and `sha256` that `file` says."""
    return path.is_file() and path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare two fingerprints.

    Raises:
        UsageError: they differ; lists every field with both values.
    """
    if lines := differences(before, now, "then", "now"):
        raise UsageError(
            f"this run's inputs are not those of the run to resume: {lines}",
            hint="repeat the first run's arguments, or start afresh with --overwrite",
        )


def differences(one: Mapping[str, Any], two: Mapping[str, Any], at_one: str, at_two: str) -> str:
    """Every field in which two fingerprints differ, with both values and where each is; empty where none does."""
    two = json.loads(json.dumps(two))  # as a file gives it back
    fields = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
    return "; ".join(f"{k}: {_short(one.get(k))} {at_one}, {_short(two.get(k))} {at_two}" for k in fields)


def _file_names(names: Any) -> list[str]:
    """Those of `names` (from a file that may be anybody's) that are plain file names."""
    if not isinstance(names, list):
        return []
    plain = [n for n in names if isinstance(n, str) and n not in ("", ".", "..", PRIVATE)]
    return [n for n in plain if "/" not in n and "\x00" not in n and len(n.encode("utf-8", "replace")) <= 255]


def _short(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, sort_keys=True), 80)
