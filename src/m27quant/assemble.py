"""Join parts of a checkpoint, made by `quantize --layers`, into the checkpoint that one run would have made."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.calib.ranges_file import Calibrated
from m27quant.checkpoint.durable import durable_file, pwrite_all, sync_folder
from m27quant.checkpoint.journal import read_journal
from m27quant.checkpoint.lock import OutputLock
from m27quant.checkpoint.workspace import PRIVATE, Workspace, check_same, is_intact
from m27quant.errors import CheckpointError, FindingsError, OutputError, UsageError, escape
from m27quant.finish import build_result, output_names
from m27quant.plan import Plan, Unit, check_disk, check_paths
from m27quant.prepare import Options, Prepared, prepare
from m27quant.progress import Progress, ProgressCallback, ignore
from m27quant.quantize import QuantizeResult, log
from m27quant.runtime.host_memory import peak_rss_bytes
from m27quant.verify.findings import Severity
from m27quant.verify.run import verify_checkpoint

SHOWN = 20
"""Faults that are named; more are counted."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part as its journal tells of it."""

    out: Path
    about: Mapping[str, Any]
    """The line that says that it is whole."""
    units: dict[str, dict[str, Any]]

    def file(self, name: str) -> Path:
        return self.out / PRIVATE / "work" / name


def assemble_checkpoint(
    parts: Sequence[str | Path],
    out: str | Path,
    *,
    model: str | None = None,
    ranges: str | None = None,
    verify: bool = True,
    progress: ProgressCallback = ignore,
    stop: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = log.info,
) -> QuantizeResult:
    """Join `parts` in `out`, after all of them are checked, and `verify` has found no error in the whole.

    A call that was cut short is repeated: it goes on where it was.

    Args:
        parts: folders that `quantize --layers` has made of one model by one calibration; they stay as they are.
        out: folder to create; on their file system its shards are links to theirs, elsewhere copies.
        model: the source, where it is no longer where the parts found it.
        ranges: the calibration, where it is no longer where the parts found it.
        verify: whether errors of `verify` at its default level refuse the whole.
        progress: called with snapshots of the work.
        stop: called often; raises to end it.
        say: told where the source was found.

    Raises:
        FindingsError: parts that are unfinished, damaged, of different runs, missing or double; or verify's errors.
        M27Error: as `quantize_checkpoint`.
    """
    started, out = time.monotonic(), Path(out)
    found, faults = _read_parts([Path(p) for p in parts])
    _refuse(faults)
    for part in found:
        check_paths(part.out, out)
    options = _options(found[0], ranges)
    prepared = prepare(model or found[0].about["model"], out, options, say)
    with prepared.source:
        fingerprint = prepared.fingerprint(options)
        check_same(found[0].about["fingerprint"], fingerprint)
        assert prepared.calibrated is not None
        report, was_complete = _join(
            found, prepared, prepared.calibrated, options, out, verify, progress, stop
        )
    return QuantizeResult(
        out=out,
        report=report,
        elapsed_s=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        was_complete=was_complete,
    )


# -- what the parts say ----------------------------------------------------------------------------


def _read_parts(folders: list[Path]) -> tuple[list[Part], list[str]]:
    """The parts, and all that is wrong with them as parts of one checkpoint."""
    if not folders:
        raise UsageError("no parts given", hint="name the folders that `m27quant quantize --layers` has made")
    parts: list[Part] = []
    faults: list[str] = []
    for folder in folders:
        try:
            parts.append(_read_part(folder))
        except (FindingsError, CheckpointError, OutputError) as fault:
            faults.append(fault.message)
    for part in parts[1:]:
        for key in ("fingerprint", "max_shard_size"):
            if part.about[key] != parts[0].about[key]:
                faults.append(
                    f"{escape(part.out)}: of another run than {escape(parts[0].out)} "
                    f"({_difference(parts[0].about[key], part.about[key])})"
                )
                break
    return parts, faults


def _read_part(folder: Path) -> Part:
    shown = escape(folder)
    if not (folder / PRIVATE / "journal.jsonl").is_file():
        raise FindingsError(f"{shown}: not a part (no journal of `m27quant quantize --layers`)")
    OutputLock(folder / PRIVATE).probe()
    entries = read_journal(folder / PRIVATE / "journal.jsonl")
    about = next((e for e in entries if e["step"] == "part"), None)
    units = {e["name"]: e for e in entries if e["step"] == "unit"}
    for entry in units.values():
        _check_entry(entry, folder)
    if about is None:
        raise FindingsError(f"{shown}: unfinished; continue it with --resume ({len(units)} units are done)")
    return Part(folder, about, units)


def _check_entry(entry: Mapping[str, Any], folder: Path) -> None:
    """A journal that somebody else has written may say anything: names must be plain."""
    files = entry.get("files")
    plain = isinstance(files, list) and all(
        isinstance(f, dict)
        and isinstance(f.get("name"), str)
        and f["name"] == Path(f["name"]).name
        and isinstance(f.get("size"), int)
        and isinstance(f.get("sha256"), str)
        for f in files
    )
    if not plain or not isinstance(entry.get("name"), str):
        raise CheckpointError(f"{escape(folder)}: its journal is not one of m27quant's")


def _difference(one: Any, two: Any) -> str:
    if isinstance(one, dict) and isinstance(two, dict):
        return ", ".join(escape(k) for k in sorted({*one, *two}) if one.get(k) != two.get(k))
    return f"{escape(one)} and {escape(two)}"


def _owners(parts: Sequence[Part], plan: Plan) -> tuple[dict[str, Part], list[str]]:
    """Which part has each unit; and units that none has, or several have."""
    owners: dict[str, Part] = {}
    faults = []
    for part in parts:
        for name in part.units:
            if name in owners:
                faults.append(f"{name}: in two parts, {escape(owners[name].out)} and {escape(part.out)}")
            else:
                owners[name] = part
    faults += [f"{unit.name}: in none of the parts" for unit in plan.units if unit.name not in owners]
    return owners, faults


def _refuse(faults: Sequence[str]) -> None:
    """Raise `FindingsError` that names `faults`, where there are any."""
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise FindingsError(
            f"the parts make no checkpoint ({len(faults)} faults): " + "; ".join(faults[:SHOWN]) + more,
            hint="finish, add or replace these parts with `m27quant quantize --layers`, then run again",
        )


def _options(part: Part, ranges: str | None) -> Options:
    about = part.about
    return Options(
        recipe=str(about["recipe"]),
        revision=about["revision"],
        max_shard_size=int(about["max_shard_size"]),
        ranges=ranges or str(about["ranges"]),
        device=str(about["device"]),
        resume=True,
    )


# -- joining ---------------------------------------------------------------------------------------


def _join(
    parts: Sequence[Part],
    prepared: Prepared,
    calibrated: Calibrated,
    options: Options,
    out: Path,
    verify: bool,
    progress: ProgressCallback,
    stop: Callable[[], None],
) -> tuple[dict[str, Any], bool]:
    owners, faults = _owners(parts, prepared.plan)
    _refuse(faults)
    fingerprint = prepared.fingerprint(options)
    workspace = Workspace(out)
    workspace.check(resume=True, overwrite=False)
    if workspace.is_complete():
        check_same(workspace.finished_fingerprint(), fingerprint)
        return workspace.finished_report(), True
    workspace.open({**fingerprint, "assembled": True}, resume=True, overwrite=False)
    try:
        workspace.refuse_collisions(output_names(prepared, options))
        journal = workspace.journal
        left = [u for u in prepared.plan.units if journal.find("unit", name=u.name) is None]
        new = _checked(owners, left, progress, stop)
        for entry in new:
            for file in entry["files"]:
                stop()
                source = owners[entry["name"]].file(file["name"])
                _link(source, workspace.work / file["name"], file["size"])
        done = {entry["name"]: entry for entry in [*journal.all("unit"), *new]}
        report, shards, documents = build_result(prepared, done, calibrated.dropped, fingerprint)
        if verify and journal.find("commit") is None:
            _verify(workspace, shards, documents, progress)
        for entry in new:  # not before it is sure that the whole will be
            journal.append("unit", **entry)
        progress(Progress(stage="commit", fraction=1.0))
        workspace.commit(shards, documents)
    except BaseException:
        workspace.abandon()
        raise
    finally:
        workspace.close()
    return report, False


def _checked(
    owners: Mapping[str, Part], units: Sequence[Unit], progress: ProgressCallback, stop: Callable[[], None]
) -> list[dict[str, Any]]:
    """The parts' journal entries of `units`, after their files' content was compared with them."""
    entries, faults = [], []
    for number, unit in enumerate(units):
        stop()
        progress(Progress(stage="check parts", fraction=number / len(units)))
        part = owners[unit.name]
        entry = {k: v for k, v in part.units[unit.name].items() if k != "step"}
        damaged = [f["name"] for f in entry["files"] if not is_intact(part.file(f["name"]), f)]
        if damaged or [f["size"] for f in entry["files"]] != [shard.size for shard in unit.shards]:
            what = ", ".join(escape(name) for name in damaged) or "sizes differ from the plan"
            faults.append(f"{escape(part.out)}: {unit.name} is missing or damaged ({what})")
        entries.append(entry)
    _refuse(faults)
    return entries


def _link(source: Path, target: Path, size: int) -> None:
    """A hard link, or a durable copy where there can be none."""
    try:
        os.link(source, target)
        sync_folder(target.parent)
    except OSError:
        check_disk(target.parent, size)
        with source.open("rb") as file, durable_file(target, size) as fd:
            at = 0
            while piece := file.read(2**24):
                pwrite_all(fd, piece, at)
                at += len(piece)


def _verify(
    workspace: Workspace,
    shards: Mapping[str, str],
    documents: Mapping[str, bytes],
    progress: ProgressCallback,
) -> None:
    """Raise `FindingsError` where the checkpoint, as it would be, has errors."""
    folder = workspace.private / "checked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for work_name, final in shards.items():
            _link(workspace.work / work_name, folder / final, (workspace.work / work_name).stat().st_size)
        for name, data in documents.items():
            (folder / name).write_bytes(data)
        result = verify_checkpoint(folder, progress=progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    errors = [f for f in result.findings if f.severity is Severity.ERROR]
    if errors:
        lines = "; ".join(f"{f.check.code} {escape(f.message)}" for f in errors[:SHOWN])
        raise FindingsError(
            f"verify finds {len(errors)} errors in what the parts make: {lines}",
            hint="see `m27quant explain CODE`; where the source itself is at fault, --no-verify takes it as it is",
        )
