"""--resume on state that is damaged, on other inputs, on what is finished, on nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import corruptions as c
from tests.faults.conftest import Case
from tests.faults.harness import KILLED, Program, tree, visible


@pytest.fixture
def half(program: Program, case: Case, out: Path) -> Path:
    """An OUT with the embedding and the first layer done, killed in the second."""
    assert program.run(*case.argv(out), env={"M27QUANT_FAULT": "layer-computed:2"}).code == KILLED
    return out


def private(out: Path) -> Path:
    return out / ".m27quant"


def journal(out: Path) -> Path:
    return private(out) / "journal.jsonl"


def resumes(program: Program, case: Case, out: Path, *options: str) -> None:
    ended = program.run(*case.argv(out, "--resume", *options))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


# -- the journal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 40, -1], ids=str)
def test_a_torn_last_line_is_dropped(cut: int, program: Program, case: Case, out: Path) -> None:
    """Killed as the fourth line was written: the states before it are still there."""
    assert program.run(*case.argv(out), env={"M27QUANT_FAULT": "journal-after:4"}).code == KILLED
    lines = journal(out).read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    last = lines[-1]
    journal(out).write_bytes(b"".join(lines[:-1]) + (last[:-cut] if cut > 0 else last[:1]))
    resumes(program, case, out)


@pytest.mark.parametrize(
    "tail", [b"\x00" * 4096, b"{", b"\xff\xfe\n", b"null\n", b'{"crc": 1, "body": {}}\n', b"\n"]
)
def test_garbage_behind_the_last_line_is_dropped(
    tail: bytes, program: Program, case: Case, half: Path
) -> None:
    """What power failure leaves: blocks that were never written."""
    with journal(half).open("ab") as file:
        file.write(tail)
    resumes(program, case, half)


def test_an_empty_journal_begins_afresh(program: Program, case: Case, half: Path) -> None:
    journal(half).write_bytes(b"")
    resumes(program, case, half)


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("damage", ["bit", "gone", "zeros", "swapped"])
def test_a_damaged_line_stops_the_run(
    line: int, damage: str, program: Program, case: Case, half: Path
) -> None:
    lines = journal(half).read_bytes().splitlines(keepends=True)
    assert len(lines) >= 4
    if damage == "bit":
        at = lines[line].index(b'"step"') + 12
        lines[line] = lines[line][:at] + bytes([lines[line][at] ^ 1]) + lines[line][at + 1 :]
    elif damage == "gone":
        lines[line] = lines[line][:10] + b"\n"
    elif damage == "zeros":
        lines[line] = bytes(len(lines[line]) - 1) + b"\n"
    else:
        lines[line] = lines[line].replace(b'"crc": ', b'"crc": 1')
    journal(half).write_bytes(b"".join(lines))
    before = tree(half)
    ended = program.run(*case.argv(half, "--resume"))
    assert ended.code == 3
    assert f"journal.jsonl: damaged at line {line + 1} of {len(lines)}" in ended.err
    assert "start again with --overwrite" in ended.err
    assert {n: d for n, d in tree(half).items() if "owner" not in n} == {
        n: d for n, d in before.items() if "owner" not in n
    }
    ended = program.run(*case.argv(half, "--overwrite"))
    assert (ended.code, tree(half)) == (0, case.undisturbed), ended.err


# -- files that were recorded ----------------------------------------------------------------------


def shard(out: Path) -> Path:
    return next((private(out) / "work").glob("layer-0000-*.safetensors"))


def hidden(out: Path) -> Path:
    (path,) = (private(out) / "work").glob("hidden-0001.*.bin")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit": flip,
    "shorter": lambda p: os.truncate(p, p.stat().st_size - 1),
    "longer": lambda p: os.truncate(p, p.stat().st_size + 1),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "gone": lambda p: p.unlink(),
    "folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", [shard, hidden])
def test_recorded_files_are_checked(
    which: Callable[[Path], Path], damage: str, program: Program, case: Case, half: Path
) -> None:
    DAMAGE[damage](which(half))
    ended = program.run(*case.argv(half, "--resume"))
    assert ended.code == 3
    step = "layer-0000"
    assert f"files of step '{step}' are missing or damaged" in ended.err
    assert "start again with --overwrite" in ended.err
    assert visible(half) == {}
    ended = program.run(*case.argv(half, "--overwrite"))
    assert (ended.code, tree(half)) == (0, case.undisturbed), ended.err


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("moved", [False, True])
def test_a_commit_checks_its_shards_again(
    moved: bool, damage: str, program: Program, case: Case, out: Path
) -> None:
    """Killed in the commit, damaged while nobody ran: the index must not land on such shards."""
    fault = {"M27QUANT_FAULT": "commit-shard:2"}
    assert program.run(*case.argv(out), env=fault).code == KILLED
    folder = out if moved else private(out) / "work"
    DAMAGE[damage](sorted(folder.glob("*.safetensors"))[-1])
    ended = program.run(*case.argv(out, "--resume"))
    assert ended.code == 3, ended.err
    assert ".safetensors: missing or damaged since it was written" in ended.err
    assert not (out / c.INDEX).exists()
    if damage == "folder" and moved:
        return  # somebody's folder in the place of a shard is for somebody to remove
    ended = program.run(*case.argv(out, "--overwrite"))
    assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_files_without_a_journal_line_are_swept(program: Program, case: Case, half: Path) -> None:
    work = private(half) / "work"
    (work / "layer-0001-0.0123456789abcdef.safetensors").write_bytes(b"stale")
    (work / ".tmp-99-x").write_bytes(b"stale")
    (work / "folder").mkdir()
    (private(half) / "documents").mkdir()
    (private(half) / "documents" / ".tmp-1-config.json").write_bytes(b"stale")
    resumes(program, case, half)


# -- other inputs ----------------------------------------------------------------------------------


def refused(program: Program, half: Path, argv: tuple[str, ...], *fields: str, **options: Any) -> None:
    """Exit code 2, every field that differs by name, nothing changed."""
    before = {n: d for n, d in tree(half).items() if "owner" not in n}
    ended = program.run(*argv, **options)
    assert ended.code == 2, ended.err
    assert "inputs are not those of the run to resume" in ended.err
    for field in fields:
        assert f"{field}: " in ended.err
    assert ended.err.count(" then, ") == len(fields), ended.err
    assert "--overwrite" in ended.err
    assert {n: d for n, d in tree(half).items() if "owner" not in n} == before


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (("--recipe", "nvfp4_experts_only"), ("recipe",)),
        (("--moe-calib", "natural"), ("moe_calib", "recipe")),
        (("--num-samples", "3"), ("tokens",)),
        (("--seed", "7"), ("tokens",)),
        (("--max-shard-size", "1GB"), ("max_shard_size",)),
    ],
    ids=str,
)
def test_other_options_are_refused(
    options: tuple[str, ...], fields: tuple[str, ...], program: Program, case: Case, half: Path
) -> None:
    ended = program.run(*case.argv(half, "--resume", *options))
    assert ended.code == 2, ended.err
    named = [f for f in fields if f"{f}: " in ended.err]
    assert named, ended.err
    refused(program, half, case.argv(half, "--resume", *options), *named)
    resumes(program, case, half)


def test_other_data_are_refused(program: Program, case: Case, half: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(case.rows.read_text().replace('input_ids": [', 'input_ids": [1, ', 1))
    argv = ("quantize", str(case.model), str(half), "--dataset", str(rows), "--resume")
    refused(program, half, argv, "tokens")


@pytest.mark.parametrize(
    ("attribute", "value", "field"),
    [
        ("torch.__version__", "9.9.9", "torch"),
        ("m27quant.__version__", "0.0.0", "m27quant"),
    ],
)
def test_other_versions_are_refused(
    attribute: str, value: str, field: str, program: Program, case: Case, half: Path
) -> None:
    setup = [("set_attribute", attribute, value)]
    refused(program, half, case.argv(half, "--resume"), field, setup=setup)


def test_another_device_is_refused(program: Program, case: Case, half: Path) -> None:
    refused(program, half, case.argv(half, "--resume"), "device", setup=[("on_device_class", "NVIDIA H200")])


@pytest.mark.parametrize(
    "change",
    [
        c.config(rope_theta=20000),
        c.add_tensor_named("stray"),
        c.fill("lm_head.weight", b"\x80\x3f", count=48 * 64),
        c.fill(c.EXPERT, b"\x10", count=1536),
    ],
    ids=["config", "header", "head", "expert"],
)
def test_another_source_is_refused(
    change: c.Change, program: Program, case: Case, half: Path, tmp_path: Path
) -> None:
    """Another fine-tune has the same headers to the byte: what tells them apart is content."""
    other = Path(shutil.copytree(case.model, tmp_path / "other"))
    argv = ("quantize", str(other), str(half), "--dataset", str(case.rows), "--resume")
    change(other)
    refused(program, half, argv, "source")


def test_a_copy_of_the_source_is_the_same_source(
    program: Program, case: Case, half: Path, tmp_path: Path
) -> None:
    """Moved to another disk: names, sizes and content count, time stamps and places do not."""
    (tmp_path / "moved").mkdir()
    other = tmp_path / "moved" / case.model.name
    shutil.copytree(case.model, other, copy_function=shutil.copyfile)
    ended = program.run("quantize", str(other), str(half), "--dataset", str(case.rows), "--resume")
    assert (ended.code, tree(half)) == (0, case.undisturbed), ended.err


# -- finished, or nothing there --------------------------------------------------------------------


def test_resuming_what_is_finished_changes_nothing(program: Program, case: Case, out: Path) -> None:
    assert program.run(*case.argv(out)).code == 0
    before = sorted((str(p), p.stat().st_mtime_ns, p.stat().st_ino) for p in (out, *out.rglob("*")))
    ended = program.run(*case.argv(out, "--resume"))
    assert ended.code == 0
    assert ended.out.startswith("already complete")
    said = program.run(*case.argv(out, "--resume", "--json"))
    assert json.loads(said.out)["was_complete"] is True
    assert sorted((str(p), p.stat().st_mtime_ns, p.stat().st_ino) for p in (out, *out.rglob("*"))) == before


def test_resuming_what_was_finished_with_other_inputs(program: Program, case: Case, out: Path) -> None:
    assert program.run(*case.argv(out)).code == 0
    refused(program, out, case.argv(out, "--resume", "--num-samples", "3"), "tokens")


def test_finished_is_not_to_be_replaced_by_accident(program: Program, case: Case, out: Path) -> None:
    assert program.run(*case.argv(out)).code == 0
    before = tree(out)
    ended = program.run(*case.argv(out))
    assert ended.code == 2
    assert "already holds a finished checkpoint" in ended.err
    assert "--overwrite" in ended.err
    assert tree(out) == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model-00002-of-00004.safetensors", "shorter"),
        ("model-00002-of-00004.safetensors", "gone"),
        ("hf_quant_config.json", "gone"),
        ("config.json", "gone"),
        ("config.json", "folder"),
        (c.INDEX, "gone"),
    ],
)
def test_finished_but_damaged_is_not_called_complete(
    name: str, damage: str, program: Program, case: Case, out: Path
) -> None:
    assert program.run(*case.argv(out)).code == 0
    DAMAGE[damage](out / name)
    ended = program.run(*case.argv(out, "--resume"))
    assert ended.code == 3
    assert f"{name}: missing or cut short since the checkpoint was finished" in ended.err
    assert "--overwrite" in ended.err
    if damage != "folder":
        ended = program.run(*case.argv(out, "--overwrite"))
        assert (ended.code, tree(out)) == (0, case.undisturbed), ended.err


def test_resuming_nothing_begins(program: Program, case: Case, out: Path) -> None:
    resumes(program, case, out)
    shutil.rmtree(out)
    out.mkdir()
    resumes(program, case, out)


def test_unfinished_work_is_not_dropped_by_accident(program: Program, case: Case, half: Path) -> None:
    before = tree(half)
    ended = program.run(*case.argv(half))
    assert ended.code == 2
    assert "holds an unfinished run" in ended.err
    assert "--resume" in ended.err
    assert "--overwrite" in ended.err
    assert tree(half) == before
    resumes(program, case, half)


def test_a_smaller_budget_continues_with_the_same_bytes(program: Program, case: Case, half: Path) -> None:
    resumes(program, case, half, "--max-memory", "64GiB")
