"""Planned shards: laid out to the byte, each tensor once, as the safetensors library reads them."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from m27quant.checkpoint.header import DTYPE_BITS, read_header
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.writer import WrittenFile, nbytes, open_shards, plan_shard, split_into_shards

TORCH = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(list(TORCH)), SHAPES),
    min_size=1,
    max_size=12,
).map(lambda d: [TensorSpec(name, dtype, shape) for name, (dtype, shape) in d.items()])
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def values(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + len(spec.name))
    raw = torch.randint(0, 120, (nbytes(spec),), generator=generator, dtype=torch.uint8)
    return raw.view(TORCH[spec.dtype]).view(spec.shape)


def write(folder: Path, specs: list[TensorSpec], max_bytes: int) -> list[WrittenFile]:
    written: list[WrittenFile] = []
    with open_shards(folder, "part", split_into_shards(specs, max_bytes), written) as shards:
        for spec in reversed(specs):  # in any order
            shards.write(spec.name, values(spec))
    return written


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@ONE_FOLDER
@given(SPECS, st.integers(1, 2000))
def test_the_library_reads_what_was_written(tmp_path: Path, specs: list[TensorSpec], max_bytes: int) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    written = write(tmp_path, specs, max_bytes)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(w.name for w in written)
    found: dict[str, torch.Tensor] = {}
    for file in written:
        path = tmp_path / file.name
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
        header = read_header(path)
        assert header.metadata == {"format": "pt"}
        for info in header.tensors.values():
            width = DTYPE_BITS[info.dtype] // 8
            assert info.start % width == 0, "aligned"
        part = load_file(path)
        assert not set(part) & set(found)
        found |= part
    assert set(found) == {s.name for s in specs}
    for spec in specs:
        assert (found[spec.name].dtype, tuple(found[spec.name].shape)) == (TORCH[spec.dtype], spec.shape)
        assert bits(found[spec.name]) == bits(values(spec))


@given(SPECS, st.integers(0, 2000))
def test_plans_cover_each_tensor_once_in_order(specs: list[TensorSpec], max_bytes: int) -> None:
    plans = split_into_shards(specs, max_bytes)
    groups = [set(p.offsets) for p in plans]
    at = 0
    for group, plan in zip(groups, plans, strict=True):
        assert group == {s.name for s in specs[at : at + len(group)]}
        at += len(group)
        assert plan.tensor_bytes == sum(nbytes(spec) for spec, _ in plan.offsets.values())
        assert plan.tensor_bytes <= max_bytes or len(group) == 1
    assert at == len(specs)
    for group, plan in zip(groups[1:], plans, strict=False):
        first = next(s for s in specs if s.name in group)
        assert plan.tensor_bytes + nbytes(first) > max_bytes, "as few files as keep the limit"


@given(SPECS, st.randoms())
def test_the_layout_does_not_depend_on_the_order(specs: list[TensorSpec], chance) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(specs)
    chance.shuffle(shuffled)
    assert plan_shard(shuffled).header == plan_shard(specs).header


def test_a_golden_header() -> None:
    specs = [TensorSpec("b", "U8", (2, 3)), TensorSpec("a", "U8", (1,)), TensorSpec("s", "F32", ())]
    plan = plan_shard(specs)
    text = (
        b'{"__metadata__":{"format":"pt"},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"b":{"dtype":"U8","shape":[2,3],"data_offsets":[5,11]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert plan.header == len(padded).to_bytes(8, "little") + padded
    assert json.loads(plan.header[8:])["b"]["data_offsets"] == [5, 11]
    assert plan.size == 8 + len(padded) + 11


def test_tensors_in_parts(tmp_path: Path) -> None:
    spec = TensorSpec("x", "BF16", (6, 4))
    whole = values(spec)
    written: list[WrittenFile] = []
    with open_shards(tmp_path, "part", [plan_shard([spec])], written) as shards:
        shards.write_part("x", whole[4:], 4 * 4 * 2)
        shards.write_part("x", whole[:4].t().contiguous().t(), 0)
    assert bits(load_file(tmp_path / written[0].name)["x"]) == bits(whole)


@pytest.mark.parametrize("when", ["missing tensor", "missing part", "wrong shape", "too much", "interrupt"])
def test_nothing_appears_unless_all_is_written(when: str, tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (3, 2)), TensorSpec("b", "F32", (2,))]
    written: list[WrittenFile] = []
    plans = split_into_shards(specs, 24)
    assert len(plans) == 2
    with (  # noqa: PT012 - the block is what fails
        pytest.raises((AssertionError, KeyboardInterrupt)),
        open_shards(tmp_path, "part", plans, written) as shards,
    ):
        shards.write("b", torch.zeros(2))
        if when == "missing part":
            shards.write_part("a", torch.zeros(2, 2), 0)
        elif when == "wrong shape":
            shards.write("a", torch.zeros(2, 3))
        elif when == "too much":
            shards.write_part("a", torch.zeros(3, 2), 8)
        elif when == "interrupt":
            raise KeyboardInterrupt
    assert written == []
    assert list(tmp_path.iterdir()) == []


def test_a_thousand_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # their number is the subject
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
    try:
        specs = [TensorSpec(f"t{i:04d}", "U8", (1,)) for i in range(1100)]
        written = write(tmp_path, specs, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(written) == len({w.name for w in written}) == 1100
    assert [next(iter(read_header(tmp_path / w.name).tensors)) for w in written] == [s.name for s in specs]


def test_the_same_content_has_the_same_name(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (3,))]
    first = write(tmp_path, specs, 100)
    assert write(tmp_path, specs, 100) == first
    assert first[0].name == f"part-0.{first[0].sha256[:16]}.safetensors"
