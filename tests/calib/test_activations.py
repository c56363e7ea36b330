"""Chunks and the two places where hidden states may lie."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m27quant.calib.activations import FileRows, MemoryRows, Rows, load_rows, plan_chunks, save_rows
from m27quant.errors import CheckpointError, EnvironmentFault

CPU = torch.device("cpu")
HIDDEN = 24


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_chunks_are_runs_of_whole_sequences(lengths: list[int], chunk_tokens: int) -> None:
    chunks = plan_chunks(lengths, chunk_tokens)
    assert [n for c in chunks for n in c.lengths] == lengths
    assert [s for c in chunks for s in c.sequences] == list(range(len(lengths)))
    at = 0
    for chunk in chunks:
        assert chunk.begin == at
        at = chunk.end
        assert len(chunk) == sum(chunk.lengths) > 0
        assert len(chunk) <= chunk_tokens or len(chunk.lengths) == 1, "only a long sequence exceeds"
    assert at == sum(lengths)
    for left, right in itertools.pairwise(chunks):
        assert len(left) + right.lengths[0] > chunk_tokens, "as few as possible"


MAKE: dict[str, Callable[[Path, int], Rows]] = {
    "memory": lambda folder, n: MemoryRows(n, HIDDEN, CPU),
    "file": lambda folder, n: FileRows(folder / "scratch", n, HIDDEN, CPU),
}


@pytest.mark.parametrize("kind", MAKE)
def test_rows_come_back_as_they_were_written(kind: str, tmp_path: Path) -> None:
    chunks = plan_chunks([3, 5, 2, 7], 8)
    values = torch.randn(17, HIDDEN).bfloat16()
    values[0, 0], values[1, 1] = float("nan"), float("-inf")
    rows = MAKE[kind](tmp_path, 17)
    for chunk in reversed(chunks):
        rows.write(chunk, values[chunk.begin : chunk.end])
    for chunk in chunks:
        found = rows.read(chunk)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), values[chunk.begin : chunk.end].view(torch.int16))
    rows.write(chunks[1], torch.zeros(len(chunks[1]), HIDDEN).bfloat16())
    assert not rows.read(chunks[1]).any()
    assert torch.equal(rows.read(chunks[0])[2], values[2])
    rows.close()


def test_a_transposed_part_is_written_by_value(tmp_path: Path) -> None:
    """What is written need not be contiguous."""
    (chunk,) = plan_chunks([4], 8)
    values = torch.randn(HIDDEN, 4).bfloat16().T
    rows = FileRows(tmp_path / "scratch", 4, HIDDEN, CPU)
    rows.write(chunk, values)
    assert torch.equal(rows.read(chunk), values)
    rows.close()


def test_scratch_has_no_name(tmp_path: Path) -> None:
    """So that a killed process leaves nothing behind; its space is reserved at once."""
    rows = FileRows(tmp_path / "scratch", 1000, HIDDEN, CPU)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(rows._fd).st_size == 1000 * HIDDEN * 2
    rows.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(rows._fd)


def test_scratch_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        FileRows(tmp_path / "missing" / "scratch", 10, HIDDEN, CPU)


def test_saved_rows_are_loaded_again(tmp_path: Path) -> None:
    chunks = plan_chunks([3, 5, 2, 7], 8)
    values = torch.randn(17, HIDDEN).bfloat16()
    path = tmp_path / "hidden.bin"
    save_rows(path, ((c, values[c.begin : c.end]) for c in chunks), 17, HIDDEN)
    assert path.read_bytes() == values.view(torch.uint8).numpy().tobytes()
    for other in (chunks, plan_chunks([3, 5, 2, 7], 1)):  # chunks may differ between the two
        loaded = list(load_rows(path, other, HIDDEN))
        assert [c for c, _ in loaded] == other
        assert torch.equal(torch.cat([part for _, part in loaded]), values)


def test_rows_cut_short_are_an_error_and_no_crash(tmp_path: Path) -> None:
    chunks = plan_chunks([8, 8], 8)
    path = tmp_path / "hidden.bin"
    save_rows(path, ((c, torch.ones(8, HIDDEN).bfloat16()) for c in chunks), 16, HIDDEN)
    os.truncate(path, 9 * HIDDEN * 2)
    rows = load_rows(path, chunks, HIDDEN)
    assert next(rows)[1].sum() == 8 * HIDDEN
    with pytest.raises(CheckpointError, match="ended at byte"):
        next(rows)
