"""Fresh memory that shows itself: what a kernel allocates and does not write is NaN, or -1 where it counts.

Test modules import the fixture `poisoned` and use it for all their tests:

    from tests.kernels.poison import poisoned
    pytestmark = pytest.mark.usefixtures("poisoned")
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def fill(tensor: Tensor) -> Tensor:
    """Every bit set: NaN in F64, F32, BF16, F16 and both FP8, -1 or the largest number in integers."""
    if tensor.numel() and tensor.device.type != "meta":
        tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).fill_(0xFF)
    return tensor


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: fill(allocate(*args, **kwargs))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized tensors hold NaN while a test runs."""
    poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized tensors hold NaN from now on."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))
