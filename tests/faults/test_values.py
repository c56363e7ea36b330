"""Values that no checkpoint should hold, and files that change while they are read."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m27quant.errors import CheckpointError, EnvironmentFault, M27Error
from m27quant.job import Job
from m27quant.plan import Unit
from m27quant.progress import Progress
from m27quant.quantize import quantize_checkpoint
from tests.checkpoints import Shape, random_tensors, stored, write_checkpoint
from tests.faults import corruptions as c
from tests.faults.conftest import Quantize

NAN_F32, INF_F32 = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"
NAN_BF16, INF_BF16 = b"\xc0\x7f", b"\x80\xff"
NAN_F8 = b"\x7f"
L0, L1 = "model.layers.0.", "model.layers.1."
LAST_EXPERT = L1 + "block_sparse_moe.experts.3.w2.weight"

# name -> (tensor, how it is spoiled, what the message says, whether layers are already done by then)
NON_FINITE = {
    "expert FP8": (c.EXPERT, c.fill(c.EXPERT, NAN_F8, at=50), ("1 of 1536", "row 1, column 2"), True),
    "late expert": (
        LAST_EXPERT,
        c.fill(LAST_EXPERT, NAN_F8, count=7),
        ("7 of 1536", "row 0, column 0"),
        True,
    ),
    "expert scale NaN": (
        c.EXPERT,
        c.fill(c.EXPERT + "_scale_inv", NAN_F32),
        ("weight_scale_inv", "row 0, column 0"),
        True,
    ),
    "expert scale Inf": (
        c.EXPERT,
        c.fill(c.EXPERT + "_scale_inv", INF_F32),
        ("weight_scale_inv", "row 0, column 0"),
        True,
    ),
    "attention": (
        L0 + "self_attn.q_proj.weight",
        c.fill(L0 + "self_attn.q_proj.weight", NAN_F8, at=49),
        ("1 NaN or Inf", "[1, 1]"),
        True,
    ),
    "attention scale": (
        L1 + "self_attn.o_proj.weight_scale_inv",
        c.fill(L1 + "self_attn.o_proj.weight_scale_inv", INF_F32),
        ("1 NaN or Inf", "[0, 0]"),
        True,
    ),
    "router": (
        L0 + "block_sparse_moe.gate.weight",
        c.fill(L0 + "block_sparse_moe.gate.weight", NAN_F32, at=3),
        ("1 NaN or Inf", "[0, 3]"),
        True,
    ),
    "selection bias": (
        L1 + "block_sparse_moe.e_score_correction_bias",
        c.fill(L1 + "block_sparse_moe.e_score_correction_bias", INF_F32, at=2),
        ("1 NaN or Inf", "[2]"),
        True,
    ),
    "norm": (
        L0 + "input_layernorm.weight",
        c.fill(L0 + "input_layernorm.weight", INF_BF16, at=5, count=2),
        ("2 NaN or Inf", "[5]"),
        True,
    ),
    "embedding": (
        "model.embed_tokens.weight",
        c.fill("model.embed_tokens.weight", NAN_BF16, at=48 * 10),
        ("1 NaN or Inf", "[10, 0]"),
        True,
    ),
    "head": ("lm_head.weight", c.fill("lm_head.weight", NAN_BF16, at=1), ("1 NaN or Inf", "[0, 1]"), False),
}


def private_only(out: Path) -> bool:
    """OUT holds resumable state and nothing else."""
    return [p.name for p in out.iterdir()] == [".m27quant"] and (
        out / ".m27quant" / "journal.jsonl"
    ).is_file()


@pytest.mark.parametrize("name", NON_FINITE)
def test_non_finite_weights_are_named_and_never_encoded(
    name: str, model: Path, tmp_path: Path, quantize: Quantize
) -> None:
    tensor, spoil, says, resumable = NON_FINITE[name]
    spoil(model)
    ended = quantize(model, out := tmp_path / "out")
    assert (ended.code, ended.document) == (3, None)
    for fragment in (tensor, *says):
        assert fragment in ended.error["message"]
    assert ended.error["hint"]
    assert private_only(out) if resumable else not out.exists()


def test_activations_that_overflow_in_most_rows_stop_the_run(
    model: Path, tmp_path: Path, quantize: Quantize
) -> None:
    huge = struct.pack("<f", 1e35)  # finite weights, infinite products
    c.fill(L0 + "self_attn.o_proj.weight_scale_inv", huge)(model)
    c.fill(L0 + "self_attn.v_proj.weight_scale_inv", huge)(model)
    ended = quantize(model, tmp_path / "out")
    assert (ended.code, ended.error["kind"]) == (1, "calibration")
    assert "1 of 6 calibration rows gave NaN or Inf, more than 10%" in ended.error["message"]
    assert ended.error["hint"]
    assert private_only(tmp_path / "out")


def test_dead_experts_are_packed_and_reported(model: Path, tmp_path: Path, quantize: Quantize) -> None:
    for projection in ("w1", "w2", "w3"):
        c.zeroed(f"{L0}block_sparse_moe.experts.2.{projection}.weight")(model)
    ended = quantize(model, tmp_path / "out")
    assert ended.code == 0
    assert ended.document is not None
    assert ended.document["summary"]["dead_matrices"] == 3
    (notice,) = (n for n in ended.document["notices"] if "all zero" in n)
    assert "experts.2.w1" in notice


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\nSee"),
            "out of memory: CUDA out of",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access\nmore"),
            "the device failed: CUDA error",
        ),
    ],
    ids=["host memory", "device memory", "device lost"],
)
def test_memory_and_devices_that_fail(
    fault: Exception,
    says: str,
    good: Path,
    tmp_path: Path,
    quantize: Quantize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(job: Job, unit: Unit, *rest: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr("m27quant.quantize.run_layer", fail)
    ended = quantize(good, tmp_path / "out")
    assert (ended.code, ended.error["kind"]) == (4, "environment")
    assert says in ended.error["message"]
    assert "--resume" in ended.error["hint"]
    assert private_only(tmp_path / "out")
    monkeypatch.undo()
    assert quantize(good, tmp_path / "out", "--resume").code == 0


# -- files that change while they are in use -------------------------------------------------------


def damage_during_run(
    model: Path, out: Path, rows: Path, damage: Callable[[], object], *, stage: str = "experts"
) -> M27Error:
    """Quantize, calling `damage` once in the first layer; returns the error that this must lead to."""
    done: list[bool] = []

    def listen(snapshot: Progress) -> None:
        if snapshot.stage == stage and not done:
            done.append(True)
            damage()

    with pytest.raises(M27Error) as raised:
        quantize_checkpoint(str(model), out, dataset=str(rows), progress=listen)
    assert done
    assert raised.value.hint
    return raised.value


def test_a_shard_that_shrinks_is_an_error_and_no_signal(model: Path, rows: Path, tmp_path: Path) -> None:
    for path in c.shards(model):
        assert path.stat().st_size > 10_000
    fault = damage_during_run(
        model, tmp_path / "out", rows, lambda: [os.truncate(p, 9000) for p in c.shards(model)]
    )
    assert isinstance(fault, CheckpointError)
    assert "while it was read" in fault.message
    assert private_only(tmp_path / "out")


@pytest.mark.parametrize("how", ["touched", "replaced", "gone"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_that_changes_is_noticed(
    how: str, number: int, model: Path, rows: Path, tmp_path: Path
) -> None:
    path = c.shards(model)[number]

    def replace() -> None:
        shutil.copy(path, copy := path.with_name("copy"))
        copy.rename(path)

    damage = {"touched": lambda: os.utime(path, (1, 1)), "replaced": replace, "gone": path.unlink}[how]
    fault = damage_during_run(model, tmp_path / "out", rows, damage)
    assert isinstance(fault, CheckpointError)
    assert path.name in fault.message
    assert private_only(tmp_path / "out")


def test_a_change_while_the_head_is_copied_is_noticed(model: Path, rows: Path, tmp_path: Path) -> None:
    """The head is copied first, and its shard is looked at again before any layer begins."""
    path = c.shard_of(model, "lm_head.weight")

    def listen(snapshot: Progress) -> None:
        raise AssertionError("must not get there")

    with pytest.raises(CheckpointError, match="changed while it was in use"):
        quantize_checkpoint(
            str(model),
            tmp_path / "out",
            dataset=str(rows),
            progress=listen,
            stop=lambda: os.utime(path, (1, 1)),
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_head_is_found_before_the_layers(rows: Path, tmp_path: Path) -> None:
    """Hours of work must not end at a NaN in what is only copied."""
    tensors = stored(random_tensors(Shape()))
    tensors["lm_head.weight"][3, 5] = float("nan")
    model = write_checkpoint(tmp_path / "model", tensors=tensors)

    def listen(snapshot: Progress) -> None:
        raise AssertionError("must not get there")

    with pytest.raises(CheckpointError, match="lm_head"):
        quantize_checkpoint(str(model), tmp_path / "out", dataset=str(rows), progress=listen)
    assert not (tmp_path / "out").exists()


def test_a_failing_disk_under_the_source(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def fail() -> None:
        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", preadv)

    fault = damage_during_run(model, tmp_path / "out", rows, fail)
    monkeypatch.setattr(os, "preadv", real)
    assert isinstance(fault, EnvironmentFault)
    assert "cannot be read (Input/output error)" in fault.message
    assert private_only(tmp_path / "out")
