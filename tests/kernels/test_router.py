"""The router on a CPU: scores against F64, ties, NaN, and the same bits wherever a logit stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m27quant.kernels import native
from m27quant.kernels.router import route, select
from tests.kernels.poison import poisoned  # noqa: F401  # a fixture
from tests.tolerance import ROUTER_WEIGHT_STEPS

pytestmark = pytest.mark.usefixtures("poisoned")
needs_core = pytest.mark.skipif(native.load().error is not None, reason=str(native.load().error))


@pytest.fixture(params=["core", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setenv("M27QUANT_KERNELS", "reference")
    elif error := native.load().error:
        pytest.skip(error)
    return str(request.param)


def by_hand(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """F64; equal wishes by index."""
    scores = 1 / (1 + torch.exp(-logits.double()))
    experts = [sorted(range(len(row)), key=lambda e: (-float(row[e] + bias[e]), e))[:k] for row in scores]
    chosen = scores.gather(1, torch.tensor(experts))
    return torch.tensor(experts), chosen / chosen.sum(1, keepdim=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("T", "E", "k"), [(1, 1, 1), (7, 5, 5), (20, 33, 4), (40, 256, 8), (3, 16, 2)])
@pytest.mark.parametrize("bias_size", [0.0, 1.0, 9.0])
def test_choice_and_weights(T: int, E: int, k: int, bias_size: float) -> None:
    logits, bias = torch.randn(T, E) * 3, torch.randn(E) * bias_size
    experts, weights = select(logits, bias, k)
    assert (experts.dtype, weights.dtype, experts.shape) == (torch.int64, torch.float32, (T, k))
    _, expected = by_hand(logits, bias, k)
    scores = torch.sigmoid(logits.double())
    wish = scores + bias
    # F32 may order what lies closer than its steps the other way
    best = wish.sort(1, descending=True).values[:, :k]
    assert ((wish.gather(1, experts) - best).abs() <= 2**-21 * (1 + bias.abs().max())).all()
    chosen = scores.gather(1, experts)
    expected = chosen / chosen.sum(1, keepdim=True)
    assert ((weights - expected).abs() <= ROUTER_WEIGHT_STEPS * 2**-24 * expected).all()
    assert all(len(set(row)) == k for row in experts.tolist())


@pytest.mark.usefixtures("kernels")
def test_the_product_is_in_f32_and_a_token_by_itself() -> None:
    h, gate, bias = torch.randn(30, 96).bfloat16(), torch.randn(64, 96) * 0.2, torch.randn(64)
    experts, weights = route(h, gate, bias, 8, invariant=True)
    expected = by_hand((h.double() @ gate.double().T).float(), bias, 8)
    assert torch.equal(experts, expected[0])
    assert torch.equal(route(h, gate, bias, 8)[0], experts)
    for t in range(0, 30, 7):
        one = route(h[t : t + 1], gate, bias, 8, invariant=True)
        assert torch.equal(one[0][0], experts[t])
        assert torch.equal(one[1][0], weights[t])


@pytest.mark.usefixtures("kernels")
def test_ties_go_to_the_lower_index() -> None:
    logits, bias = torch.zeros(1, 20), torch.zeros(20)
    logits[0, [3, 7, 11]] = 2.0
    experts, weights = select(logits, bias, 6)
    assert experts.tolist() == [[3, 7, 11, 0, 1, 2]]
    assert weights[0, 0] == weights[0, 2] > weights[0, 3] == weights[0, 5]
    bias[19] = 8.0  # helps to choose, does not weigh
    experts, more = select(logits, bias, 6)
    assert experts.tolist() == [[19, 3, 7, 11, 0, 1]]
    assert more[0, 0] == more[0, 5]


@pytest.mark.usefixtures("kernels")
def test_a_large_bias_makes_ties_of_small_differences() -> None:
    """The official bias is near 9, where F32 has steps of 2^-20: the sum decides, not the score."""
    logits = torch.full((1, 8), 1.0)
    logits[0, 5] += 2**-22
    assert select(logits, torch.full((8,), 9.0), 2)[0].tolist() == [[0, 1]]


@needs_core
def test_every_lane_gives_the_same() -> None:
    """Which torch's sigmoid does not: its vectors and their tails differ."""
    values = torch.cat((torch.linspace(-120, 120, 199), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])))
    for E in (7, 16, 37):
        for at in range(0, E, 5):
            logits = torch.zeros(len(values), E)
            logits[:, at] = values
            bias = torch.zeros(E)
            bias[at] = 10.0
            found = select(logits, bias, 2)[1][:, 0]
            first = torch.zeros(len(values), 7)
            first[:, 0] = values
            assert torch.equal(found, select(first, torch.tensor([10.0] + [0] * 6), 2)[1][:, 0])


@pytest.mark.usefixtures("kernels")
def test_extreme_logits() -> None:
    logits = torch.tensor([[200.0, -200.0, torch.inf, -torch.inf, 0.0]])
    experts, weights = select(logits, torch.zeros(5), 4)
    assert experts.tolist() == [[0, 2, 4, 1]]
    assert weights.tolist() == [[0.4000000059604645, 0.4000000059604645, 0.20000000298023224, 0.0]]


@pytest.mark.usefixtures("kernels")
def test_a_nan_counts_as_largest_and_stays_in_its_token() -> None:
    logits = torch.randn(3, 6)
    logits[1, 4] = torch.nan
    experts, weights = select(logits, torch.zeros(6), 2)
    assert experts[1, 0] == 4
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    everywhere = select(torch.full((1, 6), torch.nan), torch.zeros(6), 3)[0]
    assert everywhere.tolist() == [[0, 1, 2]]


@pytest.mark.usefixtures("kernels")
def test_no_tokens() -> None:
    experts, weights = route(torch.zeros(0, 4), torch.zeros(6, 4), torch.zeros(6), 3, invariant=True)
    assert experts.shape == weights.shape == (0, 3)


@pytest.mark.usefixtures("kernels")
def test_what_does_not_fit_is_refused() -> None:
    logits, bias = torch.zeros(2, 4), torch.zeros(4)
    for k in (0, 5):
        with pytest.raises(ValueError, match="cannot choose"):
            select(logits, bias, k)
    with pytest.raises(ValueError, match="selection bias"):
        select(logits, torch.zeros(5), 2)
    with pytest.raises(ValueError, match="float32"):
        select(logits, bias.bfloat16(), 2)
    with pytest.raises(ValueError, match="gate is torch"):
        route(torch.zeros(2, 3), torch.zeros(4, 3).bfloat16(), bias, 2)
