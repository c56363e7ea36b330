"""Batch-invariant products and the router in Triton: against F64 in Triton's interpreter and on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m27quant.kernels.router import reference as router_reference
from tests.kernels import interpreter
from tests.tolerance import ROUTER_WEIGHT_STEPS, product_bound

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

from m27quant.kernels.linear import gpu as linear
from m27quant.kernels.router import gpu as router
from tests.kernels import aot

CHECKS = ("products", "rows", "segments", "route", "ties", "special")
DTYPES = (torch.float32, torch.bfloat16)


def check(case: str) -> None:
    with pytest.MonkeyPatch.context() as patches:
        interpreter.poison(patches)
        globals()[f"check_{case}"](torch.device("cpu"))


def check_products(device: torch.device) -> None:
    for T, N, K in ((0, 3, 4), (1, 1, 1), (5, 70, 320), (70, 65, 259)):
        for dtype in DTYPES:
            for weight_dtype in DTYPES:
                x, w = torch.randn(T, K + 3).to(dtype)[:, :K], torch.randn(N, K).to(weight_dtype)
                y = linear.linear_invariant(x.to(device), w.to(device)).cpu()
                expected = x.double() @ w.double().T
                assert (y.shape, y.dtype) == (expected.shape, dtype)
                bound = product_bound(x.double(), w.double(), expected, dtype)
                assert ((y.double() - expected).abs() <= bound).all()
    assert (
        linear.linear_invariant(torch.ones(2, 0, device=device), torch.ones(3, 0, device=device)) == 0
    ).all()
    x, w = torch.randn(40, 6), torch.randn(40, 7)  # columns for rows
    y = linear.linear_invariant(x.to(device).T, w.to(device).T).cpu()
    assert torch.allclose(y, x.T @ w, rtol=0, atol=1e-4)


def check_rows(device: torch.device) -> None:
    for dtype in DTYPES:
        x, w = torch.randn(70, 600).to(dtype).to(device), torch.randn(66, 600).to(dtype).to(device)
        together = linear.linear_invariant(x, w)
        order = torch.randperm(70)
        assert torch.equal(linear.linear_invariant(x[order], w), together[order])
        for T in (1, 2, 33):
            assert torch.equal(linear.linear_invariant(x[:T], w), together[:T])


def check_segments(device: torch.device) -> None:
    """Spread over programs or one after the other: the same bits."""
    for dtype in DTYPES:
        x, w = torch.randn(3, 900).to(dtype).to(device), torch.randn(20, 900).to(dtype).to(device)
        assert linear._splits(x, w)
        spread = linear.linear_invariant(x, w)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(linear, "_splits", lambda x, w: False)
            assert torch.equal(linear.linear_invariant(x, w), spread)


def judge_route(h: Tensor, gate: Tensor, bias: Tensor, k: int, device: torch.device) -> None:
    experts, weights = (t.cpu() for t in router.route(h.to(device), gate.to(device), bias.to(device), k))
    scores = torch.sigmoid(h.double() @ gate.double().T)
    wish = scores + bias.double()
    assert (experts.dtype, weights.dtype, experts.shape, weights.shape) == (
        torch.int64, torch.float32, (len(h), k), (len(h), k),
    )  # fmt: skip
    chosen = wish.gather(1, experts)
    best = wish.topk(k, dim=-1).values
    assert torch.allclose(chosen, best, rtol=0, atol=2e-6)  # F32 scores below 1 tell apart what is further
    assert all(len(set(row)) == k for row in experts.tolist())
    expected = scores.gather(1, experts)
    expected /= expected.sum(-1, keepdim=True)
    logits_steps = 2.0**-24 * (h.double().abs() @ gate.double().abs().T).max()  # a logit's own error
    bound = (ROUTER_WEIGHT_STEPS * 2.0**-24 + 2 * logits_steps) * expected
    assert ((weights.double() - expected).abs() <= bound).all()


def check_route(device: torch.device) -> None:
    for T, E, D, k in ((1, 256, 320, 8), (5, 7, 16, 3), (3, 300, 40, 9), (2, 5, 8, 5)):
        for dtype in DTYPES:
            judge_route(torch.randn(T, D).to(dtype), torch.randn(E, D) * 0.2, torch.randn(E), k, device)
    experts, weights = router.route(
        torch.empty(0, 8, device=device), torch.randn(4, 8, device=device), torch.zeros(4, device=device), 2
    )
    assert experts.shape == weights.shape == (0, 2)


def check_ties(device: torch.device) -> None:
    """Equal rows of the gate give equal scores, and the lower index comes first."""
    gate = (torch.randn(1, 200) * 0.05).expand(70, 200).contiguous()
    gate[40] *= 2
    h = gate[:1].bfloat16()
    experts, _ = router.route(h.to(device), gate.to(device), torch.zeros(70, device=device), 5)
    assert experts.tolist() == [[40, 0, 1, 2, 3]]
    logits = torch.zeros(1, 6)
    bias = torch.tensor([-0.5, 0.0, 0.25, -0.5, 0.25, -0.0])  # wishes 0, 0.5, 0.75, 0, 0.75, 0.5
    for k in (1, 4, 6):
        found = router.select(logits.to(device), bias.to(device), k)
        assert found[0].tolist() == [[2, 4, 1, 5, 0, 3][:k]]
        assert torch.equal(found[1].cpu(), router_reference.select(logits, bias, k)[1])


def check_special(device: torch.device) -> None:
    """A NaN counts as largest and stays in its row; both zeros are equal; infinite logits are scores of 0 and 1."""
    logits = torch.tensor([[0.0, -0.0, 9.0, torch.nan], [torch.inf, -torch.inf, 0.0, -200.0]])
    experts, weights = (t.cpu() for t in router.select(logits.to(device), torch.zeros(4, device=device), 4))
    assert experts.tolist() == [[3, 2, 0, 1], [0, 2, 1, 3]]
    assert weights[0].isnan().all()
    assert weights[1].tolist() == pytest.approx([1 / 1.5, 0.5 / 1.5, 0, 0])


def test_products_in_the_interpreter() -> None:
    interpreter.run("tests.kernels.test_linear_gpu", CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_products_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        globals()[f"check_{name}"](device)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1024, 6144])
def test_rows_of_real_size_on_cuda(N: int) -> None:
    """One row, a tile, and so many that segments are no longer spread: the same bits."""
    w = torch.randn(N, 3072, device="cuda").bfloat16()
    x = torch.randn(4096, 3072, device="cuda").bfloat16()
    together = linear.linear_invariant(x, w)
    for T in (1, 8, 64, 100, 512):
        assert torch.equal(linear.linear_invariant(x[:T], w), together[:T])


def test_weights_alone_decide_the_order_of_the_sum() -> None:
    assert linear.plan(6144, 3072, tensor_cores=True) == (128, 64, 64, 512)
    assert linear.plan(200064, 3072, tensor_cores=True).segment == 3072  # enough programs without segments
    assert linear.plan(256, 3072, tensor_cores=False) == (32, 32, 32, 128)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_machine_code(arch: int) -> None:
    """Tensor cores for BF16, true F32 for the router; nothing spilled, also where K is odd."""
    with aot.launches(arch) as compiled:
        linear.linear_invariant(aot.meta(1, 3072), aot.meta(6144, 3072))
        linear.linear_invariant(aot.meta(4096, 3072), aot.meta(6144, 3072))
        linear.linear_invariant(aot.meta(7, 203), aot.meta(130, 203))
        f32 = {"dtype": torch.float32}
        router.route(aot.meta(5, 3072), aot.meta(256, 3072, **f32), aot.meta(256, **f32), 8)
    names = [kernel.name for kernel in compiled]
    assert names == ["linear_kernel", "sum_segments_kernel", *["linear_kernel"] * 3, "select_kernel"]
    for kernel in compiled:
        kernel.check()
    few, _, many, odd, gate, _ = compiled
    for kernel in (few, many, odd):
        instruction = {90: r"wgmma\.mma_async\S*bf16", 100: r"tcgen05\.mma"}.get(arch, r"mma\.sync\S*bf16")
        assert kernel.count(instruction)
    assert not gate.count(r"mma|tf32")
    assert gate.count(r"fma\.rn\.f32")
