"""Routed experts on a CPU, every implementation, against F64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels import nvfp4_moe
from m27quant.kernels.nvfp4_gemm import Activations
from m27quant.kernels.nvfp4_moe import ExpertWeights, moe
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.kernels.nvfp4_quantize import fake_quantize
from tests.kernels.nvfp4 import (
    implementation,  # noqa: F401  # a fixture
    num_threads,  # noqa: F401  # a fixture
    random_packed,
    values,
)
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import SQNR_MOE_DB, relative_error, sqnr_db

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.bfloat16, torch.float32]
E, D, I, K = 12, 144, 80, 3
F32_RELATIVE = 2e-6


@dataclass(frozen=True)
class Expert:
    """One expert's matrices as in a checkpoint; w1 and w3 differ in their global scales."""

    w1: PackedNVFP4
    w2: PackedNVFP4
    w3: PackedNVFP4
    input_scale_13: Tensor
    input_scale_2: Tensor


def make_expert(e: int, d: int = D, i: int = I) -> Expert:
    scale_2 = (2.0**-14, 3e-5, 2.0**-13 * (1 + e / 16))
    w1, w2, w3 = (
        random_packed(*shape, seed=10 * e + n, scale_2=scale_2[n], usual=True)
        for n, shape in enumerate(((i, d), (d, i), (i, d)))
    )
    return Expert(w1, w2, w3, torch.tensor(0.0015 + e * 1e-4), torch.tensor(0.001 + e * 1e-4))


EXPERTS = [make_expert(e) for e in range(E)]


def fill(activations: Activations, first: int = 0, count: int = E) -> ExpertWeights:
    weights = ExpertWeights.empty(E, D, I, activations=activations, device="cpu", first=first, count=count)
    for e in range(first, first + count):
        x = EXPERTS[e]
        weights.set(e, x.w1, x.w2, x.w3, x.input_scale_13, x.input_scale_2)
    return weights


def expected(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, activations: Activations) -> Tensor:
    """The definition in F64, one slot after the other; rounded where the contract rounds."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, k in ((t, k) for t in range(len(x_TD)) for k in range(experts_TK.shape[1])):
        if experts_TK[t, k] < 0:
            continue
        e = EXPERTS[int(experts_TK[t, k])]
        h = x_TD[t : t + 1].float()
        if activations == "nvfp4":
            h = fake_quantize(h, e.input_scale_13)
        act = F.silu(h.double() @ values(e.w1).T) * (h.double() @ values(e.w3).T)
        act = act.to(x_TD.dtype).float()
        if activations == "nvfp4":
            act = fake_quantize(act, e.input_scale_2)
        y_TD[t] += float(weights_TK[t, k]) * (act.double() @ values(e.w2).T)[0]
    return y_TD


def judge(y: Tensor, wanted: Tensor, activations: Activations) -> None:
    assert y.shape == wanted.shape
    if not y.numel():
        return
    if y.dtype == torch.float32 and activations == "bf16":
        assert relative_error(wanted, y) < F32_RELATIVE
    else:
        assert sqnr_db(wanted, y) > SQNR_MOE_DB


def tokens(T: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=g).to(dtype)
    experts = (
        torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    )
    return x, experts, torch.rand(T, K, generator=g)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_tokens(dtype: torch.dtype, activations: Activations) -> None:
    weights = fill(activations)
    for T in (0, 1, 2, 3, 21, 60):
        x, experts, w = tokens(T, dtype)
        y = moe(x, weights, experts, w)
        assert y.dtype == dtype
        judge(y, expected(x, experts, w, activations), activations)
        assert torch.equal(moe(x, weights, experts.int(), w), y)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_all_tokens_to_one_expert_and_an_expert_twice(activations: Activations) -> None:
    x, _, w = tokens(19, torch.bfloat16)
    weights = fill(activations)
    for experts in (torch.full((19, K), 7), torch.tensor([[3, 3, 5]]).expand(19, K)):
        judge(moe(x, weights, experts, w), expected(x, experts, w, activations), activations)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_slots_without_expert(activations: Activations) -> None:
    x, experts, w = tokens(9, torch.bfloat16)
    weights = fill(activations)
    experts[::2, 1] = -1
    experts[4] = -1
    y = moe(x, weights, experts, w)
    judge(y, expected(x, experts, w, activations), activations)
    assert (y[4] == 0).all()
    assert (moe(x, weights, torch.full_like(experts, -1), w) == 0).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_slices_of_the_experts_add_up(activations: Activations) -> None:
    x, experts, w = tokens(13, torch.float32)
    parts = []
    for first, count in ((0, 5), (5, 1), (6, 6)):
        y = moe(x, fill(activations, first, count), experts, w)
        outside = (experts < first) | (experts >= first + count)
        judge(y, expected(x, experts.masked_fill(outside, -1), w, activations), activations)
        assert (y[outside.all(1)] == 0).all()
        parts.append(y)
    judge(sum(parts[1:], parts[0]), expected(x, experts, w, activations), activations)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(dtype: torch.dtype, activations: Activations) -> None:
    x, experts, w = tokens(40, dtype)
    weights = fill(activations)
    together = moe(x, weights, experts, w, invariant=True)
    for some in (
        torch.randperm(40),
        torch.arange(0, 40, 3),
        torch.arange(8),
        *torch.arange(0, 40, 7)[:, None],
    ):
        y = moe(x[some], weights, experts[some], w[some], invariant=True)
        assert torch.equal(y, together[some])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_threads_do_not_change_a_bit(num_threads: int, activations: Activations) -> None:  # noqa: F811
    x, experts, w = tokens(70, torch.bfloat16)
    y = moe(x, fill(activations), experts, w, invariant=True)
    torch.set_num_threads(1)
    assert torch.equal(moe(x, fill(activations), experts, w, invariant=True), y)


@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
def test_several_passes_are_as_one(activations: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("m27quant.kernels.nvfp4_moe.cpu")
    x, experts, w = tokens(50, torch.bfloat16)
    weights = fill(activations)
    y = moe(x, weights, experts, w)
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", 100_000)
    assert torch.equal(moe(x, weights, experts, w), y)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_every_size(dtype: torch.dtype) -> None:
    """silu from far below to far above 0: rows of ones in w1 make the gate what x's first column is."""
    one = torch.tensor(1.0)
    w1 = torch.zeros(16, 8, dtype=torch.uint8)
    w1[:, 0] = 0x02  # column 0 counts 1
    w3, w2 = torch.zeros_like(w1), torch.zeros_like(w1)
    w3[:, 0] = 0x20  # column 1 counts 1
    w2[:] = torch.eye(16)[:, 0::2].to(torch.uint8) * 2 + torch.eye(16)[:, 1::2].to(torch.uint8) * 32
    scales = torch.ones(16, 1).to(torch.float8_e4m3fn)
    weights = ExpertWeights.empty(1, 16, 16, activations="bf16", device="cpu")
    weights.set(0, *(PackedNVFP4(codes, scales, one) for codes in (w1, w2, w3)))
    x = torch.zeros(2004, 16)
    x[:2001, 0] = torch.linspace(-100, 100, 2001)
    x[2001:, 0] = torch.tensor([torch.inf, -200.0, 1e30])
    x[:, 1] = 1
    x = x.to(dtype)
    y = moe(x, weights, torch.zeros(2004, 1).long(), torch.ones(2004, 1))[:, 0]
    wanted = F.silu(x[:, 0].double())
    finite = wanted.isfinite()
    steps = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21
    assert ((y - wanted)[finite].abs() <= steps * wanted[finite].abs() + 1e-36).all()


def test_how_much_memory_the_weights_take() -> None:
    weights = ExpertWeights.empty(2, 3072, 1536, activations="nvfp4", device="cpu", first=1)
    assert weights.count == 1
    assert weights.nbytes <= 3072 * 1536 * 3 * 9 / 16 * 1.001


@pytest.mark.usefixtures("implementation")
def test_experts_are_set_in_any_order_again_and_all_of_them() -> None:
    x, experts, w = tokens(5, torch.bfloat16)
    weights = ExpertWeights.empty(E, D, I, activations="nvfp4", device="cpu")
    assert weights.unset == list(range(E))
    for e in [4, 3, *reversed(range(E))]:
        with pytest.raises(ValueError, match="never set, the first is"):
            moe(x, weights, experts, w)
        other = EXPERTS[(e + 1) % E]
        weights.set(e, other.w1, other.w2, other.w3, other.input_scale_13, other.input_scale_2)
        right = EXPERTS[e]
        weights.set(e, right.w1, right.w2, right.w3, right.input_scale_13, right.input_scale_2)
    assert torch.equal(moe(x, weights, experts, w), moe(x, fill("nvfp4"), experts, w))


def test_experts_that_do_not_belong() -> None:
    weights = ExpertWeights.empty(E, D, I, activations="nvfp4", device="cpu", first=2, count=3)
    x = EXPERTS[0]
    scales = (x.input_scale_13, x.input_scale_2)
    for e in (-1, 1, 5):
        with pytest.raises(ValueError, match="not one of 2 to 4"):
            weights.set(e, x.w1, x.w2, x.w3, *scales)
    with pytest.raises(CheckpointError, match=r"expert 3, w2 has shape \[80, 144\], must be \[144, 80\]"):
        weights.set(3, x.w1, x.w1, x.w3, *scales)
    with pytest.raises(CheckpointError, match="expert 3 has no input_scale of w2"):
        weights.set(3, x.w1, x.w2, x.w3, x.input_scale_13)
    with pytest.raises(CheckpointError, match="expert 3: input_scale of w1 and w3 must be one positive"):
        weights.set(3, x.w1, x.w2, x.w3, torch.tensor(0.0), x.input_scale_2)
    assert weights.unset == [2, 3, 4]


@pytest.mark.parametrize(
    "wrong", [{"first": -1}, {"first": 12}, {"first": 3, "count": 10}, {"count": 0}, {"hidden_size": 24}]
)
def test_sizes_that_cannot_be(wrong: dict[str, int]) -> None:
    sizes = {"num_experts": E, "hidden_size": D, "intermediate_size": I, **wrong}
    with pytest.raises(ValueError, match=r"slice|multiple of 16"):
        ExpertWeights.empty(**sizes, activations="bf16", device="cpu")  # type: ignore[arg-type]


def test_routing_that_does_not_fit() -> None:
    weights = fill("bf16")
    x, experts, w = tokens(4, torch.bfloat16)
    for bad, message in (
        ((x, experts.float(), w), "I64 or I32"),
        ((x, experts, w.double()), "F32 weights"),
        ((x, experts[:, :2], w), "needs experts and weights"),
        ((x[:3], experts, w), "routing of 3 tokens"),
        ((x, experts + E, w), f"must be -1 to {E - 1}"),
        ((x, experts - 20, w), "expert numbers from"),
        ((x[:, :16], experts, w), "shape"),
        ((x.half(), experts, w), "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            moe(bad[0], weights, bad[1], bad[2])


def test_the_reference_is_what_runs_without_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M27QUANT_KERNELS", "reference")
    assert fill("bf16").backend == "reference"
    assert nvfp4_moe.reference.__doc__
