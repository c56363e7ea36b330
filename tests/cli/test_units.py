"""Sizes are read with both kinds of prefix and written with one; hypothesis looks for what breaks them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.cli.units import format_duration, format_rate, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 << 30),
        ("16gib", 16 << 30),
        ("5GB", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5Gi", 5 << 30),
        ("1.5MB", 1_500_000),
        (" 10 kB ", 10_000),
        ("2TiB", 2 << 40),
        ("1048576", 1 << 20),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "1e3", "16 GiB GiB", "1,5GB", "5PB", "5iB", "0", "0.1", "nan", "inf", "1_000", "٣GB"],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|is not at least one byte"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_plain_number_is_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(1, 1 << 50))
def test_what_is_printed_can_be_read_back(size: int) -> None:
    assert parse_size(format_size(size).replace(" ", "")) == pytest.approx(size, rel=0.05)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 1


def test_durations_and_rates() -> None:
    assert [format_duration(s) for s in (0, 59.6, 61, 3723, 100 * 3600)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:02:03",
        "100:00:00",
    ]
    assert [format_rate(r) for r in (1.5e6, 5.2e8)] == ["1.5 MB/s", "0.52 GB/s"]
