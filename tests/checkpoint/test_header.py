"""safetensors headers as hostile input: what is accepted is right, what is not ends in one error, at bounded cost."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from m27quant.checkpoint.header import DTYPE_BITS, pread_exactly, read_header
from m27quant.errors import CheckpointError, M27Error
from tests.checkpoint.common import check_fault, outcome

ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Each example writes the same file anew."""


def file_of(header: bytes | dict[str, Any], body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    as_list = [list(x) if isinstance(x, tuple) else x for x in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


BAD: dict[str, tuple[bytes, str]] = {
    "no byte": (b"", "0 bytes, too small"),
    "seven bytes": (b"\x00" * 7, "7 bytes, too small"),
    "length alone": (struct.pack("<Q", 2), "a header of 2 bytes, the file has 8"),
    "length 0": (struct.pack("<Q", 0), "not valid JSON"),
    "length 2^64 - 1": (b"\xff" * 8, "18,446,744,073,709,551,615"),
    "text": (b"hello, world", "a header of"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}", "a pickle"),
    "zip": (b"PK\x03\x04" + b"\x00" * 60, "a pickle"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
    "list": (file_of(b"[]"), "not a JSON object"),
    "tensor is a list": (file_of({"a": []}), "exactly dtype, shape and data_offsets"),
    "tensor lacks shape": (file_of({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "exactly"),
    "metadata a number": (file_of({"__metadata__": 1}), "__metadata__"),
    "17 dimensions": (file_of({"a": entry(shape=[1] * 17, offsets=[0, 1])}, b"x"), "bad shape"),
    "dimension 2^63": (file_of({"a": entry(shape=[2**63])}), "bad shape"),
    "dimension null": (file_of({"a": entry(shape=[None])}), "bad shape [None]"),
    "shape a number": (file_of({"a": entry(shape=4)}), "bad shape 4"),
    "product 2^126": (file_of({"a": entry(shape=[2**62, 2**62, 4])}), "could exist"),
    "offsets reversed": (file_of({"a": entry(offsets=[4, 0])}, b"1234"), "span -4"),
    "offsets negative": (file_of({"a": entry(offsets=[-4, 0])}, b"1234"), "bad data_offsets"),
    "offsets three": (file_of({"a": entry(offsets=[0, 2, 4])}, b"1234"), "bad data_offsets"),
    "offsets 2^63": (file_of({"a": entry(offsets=[2**63, 2**63 + 4])}), "bad data_offsets"),
    "offsets far": (file_of({"a": entry(offsets=[2**62, 2**62 + 4])}), "a hole of"),
    "does not begin at 0": (file_of({"a": entry(offsets=[1, 5])}, b"12345"), "a hole of 1 bytes"),
    "same bytes twice": (file_of({"a": entry(), "b": entry()}, b"1234"), "overlaps the one before it"),
    "one within the other": (file_of({"a": entry(), "b": entry(shape=[2], offsets=[1, 3])}, b"1234"), "overlaps"),
    "body short": (file_of({"a": entry()}, b"123"), "truncated"),
    "body long": (file_of({"a": entry()}, b"12345"), "1 trailing bytes"),
    "body without tensors": (file_of({}, b"1"), "1 trailing bytes"),
    "F4 of three": (file_of({"a": entry("F4", [3], [0, 2])}, b"12"), "whole number of bytes"),
    "F6 of one": (file_of({"a": entry("F6_E2M3", [1], [0, 1])}, b"1"), "whole number of bytes"),
    "type in lower case": (file_of({"a": entry("u8")}, b"1234"), "unknown dtype 'u8'"),
    "spaces before": (file_of(b"  [}"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_literal_bytes(name: str, tmp_path: Path) -> None:
    data, says = BAD[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert raised.value.message.startswith(str(path))
    assert says in raised.value.message
    assert raised.value.hint


def test_headers_of_every_length_are_read(tmp_path: Path) -> None:
    """128, 384, 640 ... begin with a pickle's first byte."""
    path = tmp_path / "length.safetensors"
    for length in range(2, 1500):
        path.write_bytes(file_of(b"{}" + b" " * (length - 2)))
        assert read_header(path).tensors == {}, length


def test_headers_as_deep_as_they_are_parsed(tmp_path: Path) -> None:
    """What the parser still takes may be too deep to be shown; the error is ours all the same."""
    path = tmp_path / "deep.safetensors"
    for depth in range(50, 1500, 10):
        path.write_bytes(
            file_of(
                b'{"a": {"dtype": "U8", "data_offsets": [0, 1], "shape": '
                + b"[" * depth
                + b"]" * depth
                + b"}}"
            )
        )
        with pytest.raises(CheckpointError) as raised:
            read_header(path)
        check_fault(raised.value)


def test_what_a_good_header_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.zeros(0, 5),
        "s": torch.tensor(2.0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in header.tensors.items()} == {
        "b": ("F32", (2, 3), 24),
        "a": ("F32", (0, 5), 0),
        "s": ("F32", (), 4),
    }
    info = header.tensors["b"]
    assert path.read_bytes()[info.start : info.end] == tensors["b"].numpy().tobytes()


@ONE_FOLDER
@given(st.binary(max_size=400))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    found = outcome(lambda: read_header(path))
    if isinstance(found, M27Error):
        check_fault(found)


NAMES = st.text(max_size=8) | st.sampled_from(["__metadata__", "\x00", "../x", "\x1b[2J", "a" * 300])
NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63)])
JUNK: st.SearchStrategy[Any] = st.none() | st.booleans() | st.floats(0, 9) | st.text(max_size=3) | NUMBERS
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F7", ""]) | JUNK,
        "shape": st.lists(NUMBERS | JUNK, max_size=4) | JUNK,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.lists(JUNK, max_size=3) | JUNK,
    },
    optional={"extra": JUNK},
)


@ONE_FOLDER
@given(st.dictionaries(NAMES, ENTRY | JUNK | st.lists(JUNK, max_size=2), max_size=4), st.binary(max_size=40))
@example({"a": entry("BOOL", [2, 0, 3], [0, 0])}, b"")
def test_any_header(tmp_path: Path, header: dict[str, Any], body: bytes) -> None:
    """Ours accepts nothing that the library refuses; whatever it refuses, it says in one line."""
    path = tmp_path / "x"
    path.write_bytes(file_of(header, body))
    found = outcome(lambda: read_header(path))
    if isinstance(found, M27Error):
        check_fault(found)
        return
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(found.tensors)


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TYPES = st.sampled_from(["U8", "I64", "BF16", "F32", "F16", "F8_E4M3", "BOOL", "F64"])


@ONE_FOLDER
@given(st.dictionaries(NAMES.filter(lambda n: n != "__metadata__"), st.tuples(TYPES, SHAPES), max_size=6))
def test_any_honest_header(tmp_path: Path, specs: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """What tiles the buffer is accepted, by ours and by the library, with the same names and ranges."""
    header, at = {}, 0
    for name, (dtype, shape) in specs.items():
        size = DTYPE_BITS[dtype] // 8
        for n in shape:
            size *= n
        header[name] = entry(dtype, list(shape), [at, at + size])
        at += size
    path = tmp_path / "x"
    path.write_bytes(file_of(header, bytes(at)))
    found = read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in found.tensors.items()} == specs
    try:
        with safe_open(path, "pt") as library:
            assert set(library.keys()) == set(specs)
    except SafetensorError as fault:
        pytest.fail(f"the library refuses it: {fault}")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 300_000,
        b"[" * 1_000_000,
        json.dumps({"a": entry(shape=[2**62] * 16)}).encode(),
        json.dumps({"a" * 1_000_000: entry(offsets=[0, 5])}).encode(),
        json.dumps({"a": entry(shape="x" * 1_000_000)}).encode(),
        json.dumps({str(i): entry(shape=[2**62], offsets=[0, 2**62]) for i in range(2000)}).encode(),
    ],
    ids=["deep object", "deep list", "product", "long name", "long shape", "overlapping giants"],
)
def test_lies_cost_nothing(header: bytes, tmp_path: Path) -> None:
    """Memory goes with the size of the header, whatever the header promises; messages stay short."""
    path = tmp_path / "x"
    path.write_bytes(file_of(header, b"1234"))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(header) + 2**20
    finally:
        tracemalloc.stop()
    assert len(raised.value.message) < 1000


def test_a_length_is_no_allocation(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="99,999,999"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_reading_behind_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        view = bytearray(6)
        pread_exactly(file.fileno(), memoryview(view), 4, "x")
        assert view == b"456789"
        with pytest.raises(CheckpointError, match="ended at byte 10 while it was read"):
            pread_exactly(file.fileno(), memoryview(view), 5, "x")
