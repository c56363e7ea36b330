"""The output folder while it is being made: who may write, what is done, and the moment it becomes a checkpoint.

Invariant: OUT is a checkpoint if and only if config.json and the index exist in it, and they land last.  Until the
commit OUT holds nothing new but `.m27quant/`; an older checkpoint that is being overwritten stays whole until then.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
from m27quant.checkpoint.source import INDEX
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, OutputError, UsageError, escape

PRIVATE = ".m27quant"
REPORT = "quantization_report.json"
CONFIG = "config.json"
LAST = (CONFIG, INDEX)
"""Written in this order after everything else: they make the folder a checkpoint."""


class Workspace:
    """OUT, opened by one run.  Use as a context manager: the lock is held inside."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.private = out / PRIVATE
        self.work = self.private / "work"
        self.journal: Journal
        self._created = not out.exists()
        self._created_private = not self.private.exists()
        self._lock = FileLock(self.private / "lock", timeout=0)

    # -- opening --------------------------------------------------------------------------------

    def open(
        self, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool, force_unlock: bool = False
    ) -> None:
        """Take the lock and the journal, fresh or resumed.

        Raises:
            OutputError: locked by another run, or somebody else's files.
            UsageError: an unfinished or finished output without the flag that says what to do, or a
                resume with other inputs (every difference is listed).
            EnvironmentFault: not writable.
        """
        self._check_ownership(resume=resume, overwrite=overwrite)
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            self._acquire(force_unlock)
            if overwrite:
                self._discard_work()
            self.work.mkdir(exist_ok=True)
        except OSError as fault:
            raise_for_os_error(fault, self.private)
        try:
            self.journal = Journal(self.private / "journal.jsonl")
            self._check_fingerprint(json.loads(json.dumps(fingerprint)))
            self._sweep()
        except BaseException:
            self._lock.release()
            raise

    def _check_ownership(self, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        shown = escape(self.out)
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{shown}: exists and is not a folder")
        try:
            found = sorted(p.name for p in self.out.iterdir()) if self.out.exists() else []
        except OSError as fault:
            raise_for_os_error(fault, self.out)
        fresh = set(found) <= {PRIVATE} and not self.is_unfinished()  # or it died before it recorded anything
        if fresh or (overwrite and self.is_ours()):
            return
        if not self.is_ours():
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

    def is_unfinished(self) -> bool:
        return (self.private / "journal.jsonl").exists()

    def is_ours(self) -> bool:
        return self.is_unfinished() or self.private.is_dir() or self._report() is not None

    def is_complete(self) -> bool:
        """A finished checkpoint of ours with nothing left to do."""
        return not self.is_unfinished() and all((self.out / n).exists() for n in (*LAST, REPORT))

    def _report(self) -> dict[str, Any] | None:
        try:
            report = read_object(self.out / REPORT)
        except CheckpointError:
            return None
        return report if report.get("producer", {}).get("name") == "m27quant" else None

    def finished_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint that a finished checkpoint's report records."""
        report = self._report()
        return report.get("fingerprint") if report else None

    def _acquire(self, force_unlock: bool) -> None:
        owner = self.private / "owner.json"
        try:
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"{escape(self.out)}: another run is writing here ({_describe(owner)})",
                hint="wait for it, or stop it first",
            ) from None
        host = _host()
        try:
            other = read_object(owner) if owner.exists() else {}
        except CheckpointError:
            other = {}
        if other.get("host") not in (None, host) and not force_unlock:
            self._lock.release()
            raise OutputError(
                f"{escape(self.out)}: a run on another machine is or was writing here ({_describe(owner)})",
                hint="make sure that it is dead, then pass --force-unlock",
            )
        owner.write_text(json.dumps({"pid": os.getpid(), "host": host}))

    def _check_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        begun = self.journal.find("begin")
        if begun is None:
            self.journal.append("begin", fingerprint=fingerprint)
            return
        check_same(begun["fingerprint"], fingerprint)

    def _discard_work(self) -> None:
        (self.private / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what no journal line vouches for."""
        sweep_temporaries(self.out)
        sweep_temporaries(self.private)
        known = {f["name"] for entry in self.journal.entries for f in entry.get("files", [])}
        for path in self.work.iterdir():
            if path.name not in known:
                path.unlink() if not path.is_dir() else shutil.rmtree(path)

    # -- work -----------------------------------------------------------------------------------

    def intact(self, entry: Mapping[str, Any]) -> bool:
        """The files of a journal entry have the size and content that it says (power may have failed)."""
        for file in entry["files"]:
            path = self.work / file["name"]
            if not path.exists() or path.stat().st_size != file["size"] or sha256_of(path) != file["sha256"]:
                return False
        return True

    # -- the end --------------------------------------------------------------------------------

    def commit(self, shards: Mapping[str, str], documents: Mapping[str, bytes]) -> None:
        """Make OUT the checkpoint: `shards` maps work files to final names, `documents` are the small files.

        May be killed anywhere and called again with the same arguments.
        """
        if self.journal.find("commit") is None:
            self.journal.append("commit")
        fault_point("commit-begin")
        staged = self.private / "documents"
        staged.mkdir(exist_ok=True)
        for name, data in documents.items():
            write_durably(staged / name, data)
        for name in reversed(LAST):  # an older checkpoint stops being one before its shards go
            (self.out / name).unlink(missing_ok=True)
        sync_folder(self.out)
        fault_point("commit-unlinked")
        self._remove_old({*shards.values(), *documents})
        for work_name, final in shards.items():
            if (self.work / work_name).exists():
                move_durably(self.work / work_name, self.out / final)
                fault_point("commit-shard")
        for name in sorted(documents, key=lambda n: (LAST.index(n) if n in LAST else -1, n)):
            if (staged / name).exists():
                move_durably(staged / name, self.out / name)
                fault_point("commit-document")
        self._clean_up()

    def _remove_old(self, keep: set[str]) -> None:
        """Remove the files of the checkpoint that is overwritten: those that its own report lists."""
        for name in (self._report() or {}).get("files", []):
            if isinstance(name, str) and Path(name).name == name and name not in keep:
                (self.out / name).unlink(missing_ok=True)

    def _clean_up(self) -> None:
        """Leave only the run's log behind.  The journal goes first: without it the folder is finished."""
        fault_point("clean-up")
        (self.private / "journal.jsonl").unlink(missing_ok=True)
        sync_folder(self.private)
        self.discard_leftovers()

    def discard_leftovers(self) -> None:
        """Remove everything private but the log (after the commit, or when that was cut short)."""
        for path in self.private.iterdir():
            if path.name not in ("run.log", "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def abandon(self) -> None:
        """Forget a run that has nothing worth resuming; leaves the folder as it was found."""
        if self.journal.find("unit") is not None:
            return
        self._discard_work()
        (self.private / "owner.json").unlink(missing_ok=True)
        self.close()
        if self._created_private:
            shutil.rmtree(self.private, ignore_errors=True)
        if self._created:
            self.out.rmdir()

    def close(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
            del self.journal
        self._lock.release()
        if not self.is_unfinished() and self.private.exists():
            (self.private / "lock").unlink(missing_ok=True)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare two fingerprints.

    Raises:
        UsageError: they differ; lists every field with both values.
    """
    fields = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if fields:
        lines = "; ".join(f"{k}: {_short(before.get(k))} then, {_short(now.get(k))} now" for k in fields)
        raise UsageError(
            f"this run's inputs are not those of the run to resume: {lines}",
            hint="repeat the first run's arguments, or start afresh with --overwrite",
        )


def _short(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value, sort_keys=True), 80)


def _host() -> str:
    return socket.gethostname()


def _describe(owner: Path) -> str:
    try:
        record = read_object(owner)
        return f"process {escape(record.get('pid'))} on {escape(record.get('host'))}"
    except Exception:  # noqa: BLE001 - only a courtesy in a message
        return "its owner is unknown"
