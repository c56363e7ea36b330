"""The logic of the CUDA benchmark of attention, projections, router, norms and activations, on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels_gpu_ops


def test_everything_is_checked_and_told() -> None:
    results = kernels_gpu_ops.measure(torch.device("cpu"), 1e10, 1, small=True)
    sections = kernels_gpu_ops.describe(results)
    assert len(sections) == len(kernels_gpu_ops.TITLES) == len(results) - 1
    assert all(row[name] > 0 for rows in list(results.values())[1:] for row in rows for name in row)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_gpu_ops, "linear", lambda x, w, invariant: x @ (w * 1.1).T)
    with pytest.raises(SystemExit, match=r"invariant product .* wrong"):
        kernels_gpu_ops.measure(torch.device("cpu"), 1e10, 1, small=True)
