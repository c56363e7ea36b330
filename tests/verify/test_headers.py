"""Faults of a container that need files made for them, and layouts that are no fault."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from m27quant import verify_checkpoint
from m27quant.errors import EnvironmentFault
from tests.faults import corruptions as c

LAYER_3 = "model-00004-of-00014.safetensors"


def codes(folder: Path) -> list[str]:
    return [f.check.code for f in verify_checkpoint(folder).findings]


def test_overlapping_tensors_are_named(folder: Path) -> None:
    """Two tensors at one place: whatever lay behind is a hole then, too."""
    scales = sorted(n for n in c.split_shard(folder / LAYER_3)[0] if n.endswith("weight_scale_2"))

    def change(header: dict[str, dict[str, object]]) -> None:
        header[scales[1]]["data_offsets"] = header[scales[0]]["data_offsets"]

    c.edit_header(folder / LAYER_3, change)
    findings = verify_checkpoint(folder, level="quick").findings
    (overlap,) = (f for f in findings if f.check.code == "M27-C004")
    assert overlap.tensor in scales[:2]
    assert {f.check.code for f in findings} == {"M27-C004", "M27-C005"}


def test_the_hubs_cache_may_link(folder: Path, tmp_path: Path) -> None:
    """snapshots/COMMIT/file -> blobs/HASH, as huggingface_hub lays it."""
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots/0123").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        shutil.move(path, repo / f"blobs/{number}")
        (repo / "snapshots/0123" / path.name).symlink_to(f"../../blobs/{number}")
    assert codes(repo / "snapshots/0123") == []


def test_one_file_needs_no_index(folder: Path) -> None:
    """A single model.safetensors is a layout of its own."""
    entries, buffers, at = {}, [], 0
    for path in c.shards(folder):
        header, buffer = c.split_shard(path)
        header.pop("__metadata__")
        for name, entry in header.items():
            entries[name] = entry | {"data_offsets": [n + at for n in entry["data_offsets"]]}
        buffers.append(buffer)
        at += len(buffer)
        path.unlink()
    (folder / c.INDEX).unlink()
    c.join_shard(
        folder / "model.safetensors", {"__metadata__": {"format": "pt"}, **entries}, b"".join(buffers)
    )
    assert codes(folder) == []


def test_a_file_that_may_not_be_read_is_no_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == LAYER_3:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFault, match="permission denied"):
        verify_checkpoint(folder)


def test_links_that_go_in_circles(folder: Path) -> None:
    (folder / LAYER_3).unlink()
    (folder / LAYER_3).symlink_to(LAYER_3)
    (finding,) = (f for f in verify_checkpoint(folder).findings if f.severity == "error")
    assert finding.check.code in ("M27-C016", "M27-C022")
    assert LAYER_3 in finding.message


def test_nothing_outside_the_folder_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = folder.parent / "secret.safetensors"
    shutil.copy(folder / LAYER_3, outside)
    opened: list[str] = []
    real = os.open

    def note(path: object, *args: int, **kwargs: int) -> int:
        opened.append(os.path.realpath(os.fsdecode(path)))  # type: ignore[arg-type]
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", note)
    index = "model.layers.3.input_layernorm.weight"
    for path in ("../secret.safetensors", str(outside), "a/../../secret.safetensors"):
        c.edit_json(folder / c.INDEX, lambda value, path=path: value["weight_map"].update({index: path}))
        assert "M27-C015" in codes(folder)
    assert all(str(folder.resolve()) in path for path in opened)
    assert opened  # scales were read
