"""Routed experts in Triton: against F64 in Triton's interpreter, as every family of chips takes them, and on CUDA."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from m27quant.kernels.nvfp4_gemm import Activations
from m27quant.kernels.nvfp4_moe import ExpertWeights, moe
from tests.kernels import interpreter
from tests.kernels.nvfp4 import values
from tests.kernels.test_nvfp4_moe import EXPERTS, D, E, I, K, expected, judge, tokens

pytest.importorskip("triton", reason="needs Triton, which this platform does not have")

CHECKS = ("tokens", "routing", "slices", "rows", "shared", "sort", "silu")
MODES: tuple[Activations, ...] = ("nvfp4", "bf16")


def check(case: str) -> None:
    """`ARCH CHECK` in the interpreter; where FP4 products are, W4A16 is the same as elsewhere."""
    arch, name = case.split()
    with interpreter.products_of(int(arch)), pytest.MonkeyPatch.context() as patches:
        if int(arch) >= 100:
            patches.setitem(globals(), "MODES", ("nvfp4",))
        on_device(name, torch.device("cpu"))


def on_device(name: str, device: torch.device) -> None:
    globals()[f"check_{name}"](device)


def fill(
    activations: Activations, device: torch.device, first: int = 0, count: int = E, shared: bool = False
) -> ExpertWeights:
    weights = ExpertWeights.empty(E, D, I, activations=activations, device=device, first=first, count=count)
    assert weights.backend == "triton"
    for e in range(first, first + count):
        x = EXPERTS[e]
        scale_13 = EXPERTS[0].input_scale_13 if shared else x.input_scale_13
        weights.set(e, x.w1, x.w2, x.w3, scale_13, x.input_scale_2)
    return weights


def few(T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `tokens`, but to four experts alone, some of them twice: the interpreter is slow."""
    x, experts, w = tokens(T, dtype)
    return x, experts % 4, w


def run(x: Tensor, weights: ExpertWeights, experts: Tensor, w: Tensor, *, invariant: bool = False) -> Tensor:
    device = weights.device
    return moe(x.to(device), weights, experts.to(device), w.to(device), invariant=invariant).cpu()


def check_tokens(device: torch.device) -> None:
    for activations in MODES:
        weights = fill(activations, device)
        for T, dtype in ((0, torch.bfloat16), (1, torch.float32), (1, torch.bfloat16), (9, torch.bfloat16)):
            x, experts, w = few(T, dtype)
            y = run(x, weights, experts, w)
            assert y.dtype == dtype
            judge(y, expected(x, experts, w, activations), activations)
        assert torch.equal(run(x, weights, experts.int(), w), y)


def check_routing(device: torch.device) -> None:
    """All tokens to one expert, one expert twice, slots without expert, no expert at all."""
    x, experts, w = tokens(6, torch.bfloat16)
    experts[::2, 1] = -1
    experts[4] = -1
    for activations in MODES:
        weights = fill(activations, device)
        for routing in (torch.full((6, K), 7), torch.tensor([[3, 3, 5]]).repeat(6, 1), experts):
            y = run(x, weights, routing, w)
            judge(y, expected(x, routing, w, activations), activations)
        assert (y[4] == 0).all()
        assert (run(x, weights, torch.full_like(experts, -1), w) == 0).all()


def check_slices(device: torch.device) -> None:
    x, experts, w = tokens(7, torch.float32)
    for activations in MODES:
        for first, count in ((0, 5), (6, 6)):
            weights = fill(activations, device, first, count)
            outside = (experts < first) | (experts >= first + count)
            for rows in (slice(0, 7), slice(3, 4)):  # one token takes another way
                y = run(x[rows], weights, experts[rows], w[rows])
                inside = experts.masked_fill(outside, -1)
                judge(y, expected(x[rows], inside[rows], w[rows], activations), activations)
                assert (y[outside[rows].all(1)] == 0).all()


def check_rows(device: torch.device) -> None:
    """`invariant`: the same bits for a token, whatever is beside it, alone too."""
    for activations in MODES:
        x, experts, w = few(12, torch.bfloat16)
        weights = fill(activations, device)
        together = run(x, weights, experts, w, invariant=True)
        for some in (torch.randperm(12), torch.arange(0, 12, 5), torch.tensor([11])):
            assert torch.equal(run(x[some], weights, experts[some], w[some], invariant=True), together[some])


def check_shared(device: torch.device) -> None:
    """One input scale for all experts: tokens are quantized once, to the same bits."""
    x, experts, w = few(9, torch.bfloat16)
    weights = fill("nvfp4", device, shared=True)
    y = run(x, weights, experts, w)
    low, high = weights.tensors[-1].tolist()
    assert low == high
    weights.tensors[-1][1] = 2 * high  # as if they differed
    assert torch.equal(run(x, weights, experts, w), y)


def check_sort(device: torch.device) -> None:
    from m27quant.kernels.nvfp4_moe.gpu_sort import sort_slots

    generator = torch.Generator().manual_seed(1)
    for slots, first, count, BT in ((1, 0, 1, 16), (200, 2, 5, 16), (500, 0, 9, 32), (64, 20, 3, 16)):
        experts = torch.randint(-1, 9, (slots // 4 or 1, min(4, slots)), generator=generator)
        places, block_expert = (t.cpu() for t in sort_slots(experts.to(device), first, count, BT))
        blocks = []
        for e in range(count):
            own = (experts.flatten() == first + e).nonzero().flatten().tolist()
            own += [experts.numel()] * (-len(own) % BT)
            blocks += [(e, own[i : i + BT]) for i in range(0, len(own), BT)]
        used = len(blocks)
        assert block_expert.tolist() == [e for e, _ in blocks] + [-1] * (len(block_expert) - used)
        assert places[: used * BT].view(-1, BT).tolist() == [own for _, own in blocks]


def check_silu(device: torch.device) -> None:
    """Gates from far below to far above 0, times an up of 1, through an identity."""
    one, codes = torch.tensor(1.0), torch.zeros(16, 8, dtype=torch.uint8)
    gate, up = codes.clone(), codes.clone()
    gate[:, 0], up[:, 0] = 0x02, 0x20
    eye = torch.eye(16, dtype=torch.uint8)
    down = eye[:, 0::2] * 2 + eye[:, 1::2] * 32
    scales = torch.ones(16, 1).to(torch.float8_e4m3fn)
    weights = ExpertWeights.empty(1, 16, 16, activations="bf16", device=device)
    from m27quant.kernels.nvfp4_pack import PackedNVFP4

    weights.set(0, *(PackedNVFP4(c, scales, one) for c in (gate, down, up)))
    x = torch.zeros(402, 16)
    x[:401, 0] = torch.linspace(-100, 100, 401)
    x[401, 0] = -200.0
    x[:, 1] = 1
    y = run(x, weights, torch.zeros(402, 1).long(), torch.ones(402, 1))[:, 0].double()
    wanted = torch.nn.functional.silu(x[:, 0].double())
    assert ((y - wanted).abs() <= 2.0**-20 * wanted.abs() + 1e-36).all()


def check_benchmark(device: torch.device) -> None:
    """The benchmark for GPUs at a small size: it runs through, and stops before it times a wrong result."""
    from benchmarks import kernels_gpu

    sizes = kernels_gpu.Sizes(D=32, I=16, E=3, K=2)
    results = kernels_gpu.measure(device, (2,), sizes, 1)
    times = results["moe"][0]["us"]
    assert {"W4A4", "W4A4, invariant", "W4A16", "torch BF16, grouped_mm"} <= set(times)
    assert all(isinstance(t, float) for t in times.values()), times
    assert "| 2 | " in kernels_gpu.describe(results)["Experts of a layer, µs (share of the limit)"]
    right = kernels_gpu.nvfp4_moe.moe
    with (
        mock.patch.object(kernels_gpu.nvfp4_moe, "moe", lambda *a, **k: 1.02 * right(*a, **k)),
        pytest.raises(SystemExit, match="W4A4 experts, 2 tokens: wrong"),
    ):
        kernels_gpu.measure(device, (2,), sizes, 1)


RUNS = (
    [f"90 {name}" for name in ("tokens", "routing")],
    [f"90 {name}" for name in CHECKS if name not in ("tokens", "routing")],
    ["100 tokens", "100 shared", "90 benchmark"],
)
"""Each check for the BF16 product, and for the FP4 product those in which quantized activations count."""


@pytest.mark.parametrize("cases", RUNS, ids=["hopper", "hopper-more", "blackwell"])
def test_experts_in_the_interpreter(cases: list[str]) -> None:
    interpreter.run("tests.kernels.test_nvfp4_moe_gpu", cases)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_experts_on_cuda(name: str) -> None:
    with interpreter.hardware() as device:
        on_device(name, device)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", MODES)
def test_a_layer_of_m27_in_a_graph(activations: Activations) -> None:
    """Captured once, it follows the routing of each replay: nothing depends on the host."""
    with interpreter.hardware() as device:
        weights = fill(activations, device)
        x, experts, w = (t.to(device) for t in tokens(40, torch.bfloat16))
        wanted = [moe(x, weights, routing, w) for routing in (experts, experts.flip(0))]
        graph, routing = torch.cuda.CUDAGraph(), experts.clone()
        with torch.cuda.graph(graph):
            y = moe(x, weights, routing, w)
        for now, right in zip((experts, experts.flip(0)), wanted, strict=True):
            routing.copy_(now)
            graph.replay()
            assert torch.equal(y, right)


def test_memory_of_an_expert() -> None:
    with interpreter.products_of(90):
        weights = ExpertWeights.empty(2, 3072, 1536, activations="nvfp4", device="cpu")
        assert weights.nbytes <= 2 * 3072 * 1536 * 3 * 9 / 16 * 1.001
    assert values(EXPERTS[0].w1).shape == (I, D)
