"""The bytes behind a tensor, for reading and writing files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy.

    Raises:
        ValueError: not contiguous, or not on the CPU.
    """
    import torch

    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous tensor on the CPU has bytes to look at")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
