"""Swapped nibbles and swizzled scales without the source: seen where rows and columns differ, else nothing is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.kernels import nvfp4_pack
from m27quant.verify import order
from m27quant.verify.difference import swizzle
from m27quant.verify.findings import Severity, VerifyResult
from tests.checkpoints import stored, write_checkpoint, write_rows
from tests.faults import corruptions as c
from tests.faults.order import ORDERS, SHAPE, OrderFault, trained
from tests.verify.conftest import SIDECARS


@pytest.fixture(scope="module")
def good(fast_folder: Path, repository: Path) -> Path:
    """Nobody may change it."""
    model = write_checkpoint(fast_folder / "order", SHAPE, tensors=stored(trained(SHAPE), fp8=True))
    for name in SIDECARS:
        shutil.copy(repository / "examples/tiny-m27" / name, model / name)
    rows = write_rows(fast_folder / "order.jsonl", vocab_size=SHAPE.vocab_size, rows=16)
    out = fast_folder / "order-nvfp4"
    quantize_checkpoint(str(model), out, dataset=str(rows))
    (out / "quantization_report.json").unlink()
    return out


def codes(result: VerifyResult) -> set[str]:
    """Of warnings; a suspicion is never an error."""
    assert not any(f.severity is Severity.ERROR for f in result.findings)
    return {f.check.code for f in result.findings if f.severity is Severity.WARNING}


def test_good_ones_are_not_suspected(good: Path) -> None:
    assert verify_checkpoint(good, level="full").findings == ()


@pytest.mark.parametrize("fault", ORDERS.values(), ids=ORDERS)
def test_a_wrong_order_is_suspected(good: Path, tmp_path: Path, fault: OrderFault) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "checkpoint"))
    fault.change(folder)
    result = verify_checkpoint(folder, level=fault.level)
    assert codes(result) == {fault.code}
    assert all(fault.names in (f.tensor or "") for f in result.findings)
    assert codes(verify_checkpoint(folder, level="quick")) == set()
    if fault.level == "full":
        assert codes(verify_checkpoint(folder)) == set()


def test_most_matrices_that_are_swizzled_are_named(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "checkpoint"))
    ORDERS["all scales swizzled"].change(folder)
    assert (
        sum(f.count for f in verify_checkpoint(folder).findings) >= 20
    )  # of 36; a w1 without rows is not judged


def test_awq_is_not_asked(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "checkpoint"))
    ORDERS["nibbles of w2 swapped"].change(folder)
    c.edit_json(folder / "config.json", lambda d: d["quantization_config"].update(quant_algo="NVFP4_AWQ"))
    found = {f.check.code for f in verify_checkpoint(folder, level="full").findings}
    assert "M27-W008" not in found


def test_the_tiny_model_is_trained_enough(repository: Path, tmp_path: Path) -> None:
    """Real training: its 16 experts of 8 layers show swapped nibbles together, and nothing where they are right."""
    rows = write_rows(tmp_path / "rows.jsonl", rows=4)
    folder = tmp_path / "out"
    quantize_checkpoint(str(repository / "examples/tiny-m27"), folder, dataset=str(rows))
    (folder / "quantization_report.json").unlink()
    assert codes(verify_checkpoint(folder, level="full")) == set()
    ORDERS["all nibbles swapped"].change(folder)
    assert codes(verify_checkpoint(folder, level="full")) == {"M27-W008"}


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "long tails": lambda x: x**3,
    "large rows": lambda x: x * torch.exp(0.1 * torch.randn(x.shape[0], 1)),
    "large columns": lambda x: x * torch.exp(0.3 * torch.randn(x.shape[1])),
    "smooth rows": lambda x: x * torch.exp(0.3 * torch.sin(torch.arange(x.shape[0]) / 20))[:, None],
    "heads": lambda x: x * torch.exp(0.3 * torch.randn(x.shape[0] // 64, 1)).repeat_interleave(64, 0),
    "a few rows": lambda x: x * torch.where(torch.rand(x.shape[0], 1) < 0.02, 8.0, 1.0),
    "of rank 8": lambda x: x + torch.randn(x.shape[0], 8) @ torch.randn(8, x.shape[1]),
    "zero rows": lambda x: x * (torch.rand(x.shape[0], 1) < 0.5),
    "all zero": lambda x: x * 0,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1536, 3072), (3072, 1536), (128, 512), (256, 256)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_right_order_is_suspected(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(len(kind))
    weight = KINDS[kind](torch.randn(128, shape[1]) if shape[0] > 256 else torch.randn(shape)).bfloat16()
    scale = nvfp4_pack.pack(weight, amax=weight.abs().max().float()).weight_scale
    share = order.explained(scale.view(torch.uint8).numpy())
    assert share is None or not share.looks_swizzled
    wrong = order.explained(swizzle(scale).view(torch.uint8).numpy())
    if kind in ("large rows", "smooth rows", "of rank 8") and shape[1] > 1000:
        assert wrong is not None
        assert wrong.looks_swizzled


def test_what_fills_no_tiles_is_not_judged() -> None:
    assert order.explained(np.zeros((64, 17), np.uint8)) is None
    assert order.explained(np.zeros((128, 4), np.uint8)) is None
    assert order.row_pairs(np.ones((5, 3), np.uint8)).tolist() == [0, 0]
    assert order.deviations([1, 1, 1], [1, 2, 3]) == 0
