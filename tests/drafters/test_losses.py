"""The loss of drafted tokens and its gradient: softmax minus target, times the weight, through the head."""

from __future__ import annotations

import pytest
import torch

from m27quant.drafters import losses
from m27quant.drafters.losses import head_loss
from tests.drafters.making import cross_entropy
from tests.tolerance import F64

R, D, V = 7, 5, 11


@pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_once", [1, 3 * V, 10**9])
def test_loss_and_gradients_are_the_formulas(
    monkeypatch: pytest.MonkeyPatch, soft: float, at_once: int
) -> None:
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", at_once)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(R, D, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(R, V, generator=g, dtype=torch.float64)
    tokens, weights = torch.randint(V, (R,), generator=g), torch.rand(R, generator=g, dtype=torch.float64)
    total, rows, hits = head_loss(hidden, head, tokens, weights, teacher.__getitem__, soft)
    expected, grad_hidden, grad_head = torch.zeros(()), torch.zeros(R, D), torch.zeros(V, D)
    grad_hidden, grad_head = grad_hidden.double(), grad_head.double()
    for i in range(R):
        logits = torch.stack([(hidden[i] * head[j]).sum() for j in range(V)]).detach()
        loss = cross_entropy(logits, int(tokens[i]), teacher[i], soft)
        assert abs(float(loss - rows[i])) < F64
        assert bool(hits[i]) == (int(logits.argmax()) == int(tokens[i]))
        expected = expected + weights[i] * loss
        q, p = torch.softmax(logits, 0), torch.softmax(teacher[i], 0)
        for j in range(V):
            target = soft * p[j] + (1 - soft) * float(j == tokens[i])
            grad_hidden[i] += weights[i] * (q[j] - target) * head[j].detach()
            grad_head[j] += weights[i] * (q[j] - target) * hidden[i].detach()
    assert abs(float((expected - total).detach())) < F64
    found = torch.autograd.grad(3 * total, (hidden, head))
    torch.testing.assert_close(found, (3 * grad_hidden, 3 * grad_head), atol=F64, rtol=0)


def test_a_frozen_head_gets_no_gradient_and_nothing_is_kept_without_one() -> None:
    hidden, head = torch.randn(3, D, requires_grad=True), torch.randn(V, D)
    tokens, weights = torch.tensor([0, 1, 2]), torch.ones(3)
    total, _, _ = head_loss(hidden, head, tokens, weights, None, 0.0)
    (grad,) = torch.autograd.grad(total, [hidden])
    assert grad.abs().sum() > 0
    with torch.no_grad():
        silent, _, _ = head_loss(hidden, head, tokens, weights, None, 0.0)
    assert not silent.requires_grad
    assert torch.equal(silent, total)


def test_no_rows() -> None:
    hidden, head = torch.randn(0, D, requires_grad=True), torch.randn(V, D)
    total, rows, hits = head_loss(hidden, head, torch.empty(0, dtype=torch.int64), torch.empty(0), None, 0.0)
    assert float(total.detach()) == 0
    assert rows.shape == hits.shape == (0,)
    assert torch.autograd.grad(total, [hidden])[0].shape == (0, D)


def test_distillation_needs_the_target() -> None:
    with pytest.raises(ValueError, match="logits are needed"):
        head_loss(torch.randn(1, D), torch.randn(V, D), torch.tensor([0]), torch.ones(1), None, 0.5)
