"""OUT while a drafter is being trained: who may write, the last state, the log, and the moment it becomes a drafter.

OUT/.m27quant/ holds training.json (what the run is fixed by, and whether it is finished), state.safetensors (replaced
whole, durably) and log.jsonl.  OUT is a drafter only once config.json is in it, which lands last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.durable import (
    fault_point,
    raise_for_os_error,
    sweep_temporaries,
    sync_folder,
    write_durably,
)
from m27quant.checkpoint.lock import OutputLock
from m27quant.checkpoint.strict_json import parse, read_object
from m27quant.checkpoint.workspace import PRIVATE, check_same
from m27quant.drafters.tensor_file import read_tensors, write_tensors
from m27quant.errors import CheckpointError, OutputError, UsageError, escape

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RECORD, STATE, LOG = "training.json", "state.safetensors", "log.jsonl"
HEAD = "training.json"
"""The tensor of a state that is no tensor: JSON about all others."""
DAMAGED = "the disk may be failing; start again with --overwrite"


@dataclass(frozen=True, slots=True)
class State:
    """A run between two steps."""

    step: int
    """Steps done."""
    facts: dict[str, Any]
    """What else is kept: seconds, tokens, where it was computed."""
    tensors: dict[str, Tensor]


class TrainingFolder:
    """OUT, opened by one run."""

    def __init__(self, out: Path) -> None:
        self.out, self.private = out, out / PRIVATE
        self._lock = OutputLock(self.private)

    # -- opening --------------------------------------------------------------------------------

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin here, as far as can be told without changing anything.

        Raises:
            OutputError: locked by another run, or somebody else's files.
            UsageError: an unfinished or finished run without the flag that says what to do.
            EnvironmentFault: not readable.
        """
        shown = escape(self.out)
        try:
            if self.private.is_symlink():
                raise OutputError(f"{escape(self.private)}: a link", hint="put a folder in its place")
            if self.out.exists() and not self.out.is_dir():
                raise OutputError(f"{shown}: exists and is not a folder", hint="choose another OUT")
            found = sorted(p.name for p in self.out.iterdir()) if self.out.exists() else []
            self._lock.probe()
        except OSError as fault:
            raise_for_os_error(fault, self.out)
        record = self.record()
        if record is None:
            if set(found) <= {PRIVATE}:
                return
            names = ", ".join(escape(n) for n in found[:5]) + (" ..." if len(found) > 5 else "")
            raise OutputError(
                f"{shown}: not empty, and not made by m27quant drafter train ({names})",
                hint="choose an empty or new folder",
            )
        if resume or overwrite:
            return
        if record.get("finished"):
            raise UsageError(f"{shown}: already holds a finished drafter", hint="replace it with --overwrite")
        raise UsageError(
            f"{shown}: holds an unfinished run", hint="continue it with --resume, or drop it with --overwrite"
        )

    def record(self) -> dict[str, Any] | None:
        """What training.json says; None where there is none that is ours.

        Raises:
            CheckpointError: it is there and damaged.
        """
        path = self.private / RECORD
        if not path.exists():
            return None
        record = read_object(path)
        return record if isinstance(record.get("fingerprint"), dict) else None

    def is_finished(self) -> bool:
        """A drafter is there, whole."""
        record = self.record()
        whole = all((self.out / name).is_file() for name in (CONFIG, WEIGHTS))
        return record is not None and bool(record.get("finished")) and whole

    def open(
        self, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool, force_unlock: bool = False
    ) -> None:
        """Take the lock and begin, or go on.

        Raises:
            M27Error: as `check` does.
            UsageError: a resume with other inputs; every difference is listed.
            EnvironmentFault: not writable.
        """
        self.check(resume=resume, overwrite=overwrite)
        fixed = json.loads(json.dumps(fingerprint))
        if resume and (record := self.record()) is not None:
            check_same(record["fingerprint"], fixed)
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(force=force_unlock)
            self.check(resume=resume, overwrite=overwrite)  # another run may have come and gone
            sweep_temporaries(self.private)
            sweep_temporaries(self.out)
            if overwrite or self.record() is None:
                for name in (STATE, LOG):
                    (self.private / name).unlink(missing_ok=True)
                self._write_record({"fingerprint": fixed, "finished": False})
        except OSError as fault:
            self.close()
            raise_for_os_error(fault, self.private)
        except BaseException:
            self.close()
            raise

    def _write_record(self, record: Mapping[str, Any]) -> None:
        text = json.dumps({"schema_version": 1, **record}, indent=2, sort_keys=True) + "\n"
        write_durably(self.private / RECORD, text.encode())

    def close(self) -> None:
        """Let others write here."""
        if self._lock.is_held:
            self._lock.release(forget=True)

    # -- state ----------------------------------------------------------------------------------

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state; when this returns, nothing up to `step` can be lost."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        head = {
            "step": step,
            "facts": dict(facts),
            "checksums": {n: xxhash.xxh3_64_hexdigest(byte_view(t)) for n, t in on_cpu.items()},
        }
        data = torch.frombuffer(bytearray(json.dumps(head, sort_keys=True).encode()), dtype=torch.uint8)
        fault_point("state-before")
        write_tensors(self.private / STATE, on_cpu | {HEAD: data})
        fault_point("state-after")

    def load(self) -> State | None:
        """The last state; None before the first.

        Raises:
            CheckpointError: damaged.
        """
        path = self.private / STATE
        if not path.exists():
            return None
        tensors = read_tensors(path)
        if HEAD not in tensors:
            raise CheckpointError(f"{escape(path)}: no state of a training run", hint=DAMAGED)
        head = parse(bytes(tensors.pop(HEAD).tolist()), escape(path))
        for name, tensor in tensors.items():
            if head["checksums"].get(name) != xxhash.xxh3_64_hexdigest(byte_view(tensor)):
                raise CheckpointError(f"{escape(path)}: '{escape(name)}' is damaged", hint=DAMAGED)
        return State(head["step"], head["facts"], tensors)

    # -- the end --------------------------------------------------------------------------------

    def finish(self, documents: Mapping[str, bytes], tensors: Mapping[str, Tensor], result: Any) -> None:
        """Make OUT the drafter: weights and documents, config.json last.  May be killed and called again."""
        try:
            (self.out / CONFIG).unlink(
                missing_ok=True
            )  # an older drafter stops being one before its weights go
            sync_folder(self.out)
            write_tensors(self.out / WEIGHTS, tensors)
            for name in sorted(documents, key=lambda name: (name == CONFIG, name)):
                fault_point("finish-document")
                write_durably(self.out / name, documents[name])
            record = self.record() or {}
            self._write_record({"fingerprint": record["fingerprint"], "finished": True, "result": result})
            fault_point("finish-clean-up")
            (self.private / STATE).unlink(missing_ok=True)
        except OSError as fault:
            raise_for_os_error(fault, self.out)


class Log:
    """log.jsonl: one JSON object a line, for every step, evaluation and beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, last_step: int) -> list[dict[str, Any]]:
        """Cut off what lies behind `last_step`, which will be done again; returns the rest."""
        entries = [e for e in self.read() if e.get("step", 0) <= last_step]
        write_durably(self._path, "".join(_line(e) for e in entries).encode())
        return entries

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn one is what a crash leaves."""
        found = []
        if self._path.exists():
            for line in self._path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    found.append(entry)
        return found

    def write(self, event: str, step: int, **fields: Any) -> dict[str, Any]:
        """Append a line."""
        entry = {"event": event, "step": step, **fields}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
        except OSError as fault:
            raise_for_os_error(fault, self._path)
        return entry


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
