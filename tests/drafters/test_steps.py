"""What a step is made of: the order of data, the learning rate, the optimizers, when states are written."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from m27quant.drafters.optimizer import DrafterOptimizer, global_norm
from m27quant.drafters.order import Order, generator_of
from m27quant.drafters.saving import Pace
from m27quant.drafters.schedule import lr_scale

LENGTHS = [(7 * n) % 50 + 3 for n in range(103)]


def test_an_epoch_reads_every_sample() -> None:
    order = Order(LENGTHS, 8, seed=3)
    assert order.steps_per_epoch == 13
    for epoch in range(2):
        drawn = [d for step in range(13) for d in order.batch(13 * epoch + step)]
        assert {d.epoch for d in drawn} == {epoch}
        counts = Counter(d.index for d in drawn)
        assert set(counts) == set(range(103))
        assert max(counts.values()) <= 2  # the last batch is filled up
    assert order.batch(0) != order.batch(13)


def test_the_order_hangs_on_the_seed_alone() -> None:
    assert Order(LENGTHS, 8, 0).batch(40) == Order(LENGTHS, 8, 0).batch(40)
    assert Order(LENGTHS, 8, 0).batch(0) != Order(LENGTHS, 8, 1).batch(0)


def test_little_of_a_batch_is_padding() -> None:
    order = Order(LENGTHS, 8, 0)
    batches = [[LENGTHS[d.index] for d in order.batch(step)] for step in range(13)]
    padded = sum(len(b) * max(b) for b in batches) / sum(map(sum, batches))
    assert padded < 1.2


def test_fewer_samples_than_a_batch() -> None:
    assert [d.index for d in Order([5], 3, 0).batch(7)] == [0, 0, 0]


def test_a_samples_randomness_is_its_own() -> None:
    order = Order(LENGTHS, 4, 0)
    a, b = order.batch(0)[:2]
    again = order.batch(0)[0]
    assert generator_of(0, a).initial_seed() == generator_of(0, again).initial_seed()
    assert generator_of(0, a).initial_seed() != generator_of(0, b).initial_seed()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 49 / 60, 0.0]),
    ],
)
def test_rates(schedule: str, expected: list[float]) -> None:
    """At the begin and end of a warm-up of 2 of 100 steps, behind it, in the middle, at the end."""
    found = [lr_scale(step, 100, 0.02, schedule) for step in (0, 1, 2, 51, 100)]
    assert found == pytest.approx(expected)
    assert lr_scale(1, 100, 2, schedule) == 1.0
    assert all(lr_scale(0, 1, warmup, schedule) == 1.0 for warmup in (0, 0.04))


def make(kind: str, dtype: torch.dtype = torch.float32) -> DrafterOptimizer:
    g = torch.Generator().manual_seed(0)
    masters = {
        "a.weight": torch.randn(4, 6, generator=g),
        "norm.weight": torch.ones(6),
        "lm_head.weight": torch.randn(5, 6, generator=g),
    }
    return DrafterOptimizer(masters, dtype, kind=kind, lr=0.1, adam_lr=0.01, weight_decay=0.2)


def gradients(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(w.shape, generator=g) for name, w in make("adamw").masters.items()}


def by_formula(name: str, lr: float, decay: float) -> torch.Tensor:
    """AdamW (Loshchilov and Hutter) in F64, two steps at factors 1 and 0.5."""
    w = make("adamw").masters[name].double()
    m = v = torch.zeros_like(w)
    for step, scale in enumerate((1.0, 0.5), start=1):
        grad = gradients(step - 1)[name].double()
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = w * (1 - lr * scale * decay)
        w = w - lr * scale * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adamw_is_its_formula(kind: str) -> None:
    optimizer = make(kind)
    for step, scale in enumerate((1.0, 0.5)):
        optimizer.step(gradients(step), scale)
    rates = {"norm.weight": (0.1, 0.0), "a.weight": (0.1, 0.2), "lm_head.weight": (0.1, 0.2)}
    if kind == "muon":
        rates = {"norm.weight": (0.01, 0.0), "lm_head.weight": (0.01, 0.0)}
    for name, (lr, decay) in rates.items():
        torch.testing.assert_close(
            optimizer.masters[name].double(), by_formula(name, lr, decay), atol=1e-6, rtol=0
        )


def test_muon_moves_a_matrix_along_all_its_directions() -> None:
    optimizer = make("muon")
    before = optimizer.masters["a.weight"].clone()
    optimizer.step(gradients(0), 1.0)
    moved = (before * (1 - 0.1 * 0.2) - optimizer.masters["a.weight"]) / 0.1
    lengths = torch.linalg.svdvals(moved)
    assert ((lengths > 0.6) & (lengths < 1.3)).all()  # five Newton-Schulz steps bring them near one


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_kept_state_is_the_state(kind: str) -> None:
    whole, parts = make(kind, torch.bfloat16), make(kind, torch.bfloat16)
    for step in range(4):
        whole.step(gradients(step), 1.0)
        parts.step(gradients(step), 1.0)
        kept = {name: tensor.clone() for name, tensor in parts.state().items()}
        parts = make(kind, torch.bfloat16)
        parts.load_state(kept)
    for name in whole.masters:
        assert whole.masters[name].equal(parts.masters[name])
        assert whole.copies[name].equal(parts.copies[name])
        assert whole.copies[name].equal(whole.masters[name].bfloat16())


def test_the_norm_of_all_gradients() -> None:
    grads = gradients(0)
    flat = torch.cat([grad.flatten() for grad in grads.values()])
    assert global_norm(grads).item() == pytest.approx(flat.norm().item())


def test_states_are_written_when_they_are_due() -> None:
    assert [step for step in range(1, 11) if Pace(4).is_due(step, 10)] == [4, 8, 10]
    now_and_then = Pace(None)
    assert now_and_then.is_due(1, 10)
    with now_and_then.timed():
        pass
    now_and_then._cost_s = 60.0
    assert not now_and_then.is_due(2, 10)
    assert now_and_then.is_due(10, 10)
