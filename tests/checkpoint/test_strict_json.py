"""JSON from anybody: bounded, strict, and never another error than ours."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.strict_json import parse, read_bytes, read_object, require_regular_file
from m27quant.errors import CheckpointError, M27Error

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "line 1, column 1"),
    "cut": (b'{"a": [1,\n 2', "line 2, column 3"),
    "comma": (b'{"a": 1,}', "line 1, column 9"),
    "comment": (b"{} // none", "line 1, column 4"),
    "two": (b"{}{}", "line 1, column 3"),
    "single quotes": (b"{'a': 1}", "line 1, column 2"),
    "control character": (b'"\x00"', "line 1, column 2"),
    "NaN": (b"NaN", "NaN is not JSON"),
    "Infinity": (b"[Infinity]", "Infinity is not JSON"),
    "minus Infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "beyond F64": (b"[1e400]", "1e400 is no finite number"),
    "beyond F64 below": (b"[-1.5E+999]", "-1.5E+999 is no finite number"),
    "same key": (b'{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice"),
    "same key by escape": (b'{"a": 1, "\\u0061": 1}', "key 'a' appears twice"),
    "same key within": (b'[{"x": {"k": 1, "k": 2}}]', "key 'k' appears twice"),
    "hostile key": (b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', "key '\\x1b[2J' appears twice"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
    "latin-1": (b'{"a": "\xe4"}', "not UTF-8 at byte 7"),
    "surrogate in UTF-8": (b'"\xed\xa0\x80"', "not UTF-8 at byte 1"),
    "deep list": (b"[" * 200_000, "nested too deeply"),
    "deep object": (b'{"a":' * 200_000, "nested too deeply"),
    "number of 10,000 digits": (b"9" * 10_000, "digits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, says = REFUSED[name]
    with pytest.raises(CheckpointError) as raised:
        parse(data, "file.json")
    assert raised.value.message.startswith("file.json: ")
    assert says in raised.value.message
    assert raised.value.hint
    assert raised.value.message.isprintable()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_whatever_json_writes_is_read_back(value: Any) -> None:
    assert parse(json.dumps(value).encode(), "x") == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_our_error(data: bytes) -> None:
    try:
        parse(data, "x")
    except M27Error:
        return
    json.loads(data)  # what is accepted is JSON


@given(st.text(alphabet='{}[],:"\\ue1+-.0 \nNaIfty', max_size=60))
def test_any_near_json_is_a_value_or_our_error(text: str) -> None:
    try:
        value = parse(text.encode(), "x")
    except M27Error:
        return
    assert not isinstance(value, float) or math.isfinite(value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, says in {
        "fifo": "not a regular file",
        "folder": "not a regular file",
        "zero": "not a regular file",
        "loop": "cannot be opened",
        "dangling": "no such file",
        "gone": "no such file",
        "n" * 300: "cannot be opened",
    }.items():
        with pytest.raises(CheckpointError, match=says) as raised:
            require_regular_file(tmp_path / name)
        assert raised.value.hint


def test_sizes_are_bounded_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes, more than the 16,777,216 allowed"):
        read_object(path)
    path.write_bytes(b"{}  ")
    assert read_bytes(path, 4) == b"{}  "
    with pytest.raises(CheckpointError, match="4 bytes, more than the 3"):
        read_bytes(path, 3)


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "list"), ("7", "int"), ("null", "NoneType"), ('"x"', "str")]
)
def test_objects_only(text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"expected a JSON object, found {kind}"):
        read_object(tmp_path / "x.json")
