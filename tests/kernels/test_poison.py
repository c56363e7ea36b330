"""The poison itself: a fixture that poisons nothing would let every kernel pass."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.poison import poisoned  # noqa: F401  # a fixture


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 2, dtype=dtype)
    for tensor in (
        torch.empty(3, 2, dtype=dtype),
        torch.empty((), dtype=dtype),
        torch.empty_like(like.T),
        like.new_empty(5),
    ):
        assert tensor.float().isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_fresh_integers_are_minus_one() -> None:
    assert (torch.empty(4, dtype=torch.int64) == -1).all()
    assert torch.empty(0, 4).shape == (0, 4)
