"""A source whose weights are not on this machine yet: what its config.json promises, for a dry run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from m27quant.checkpoint.header import DTYPE_BITS, TensorInfo
from m27quant.checkpoint.layout import SCALE_SUFFIX, official_tensors
from m27quant.checkpoint.source import Source, torch_dtype

if TYPE_CHECKING:
    import torch


class AssumedSource(Source):
    """The official layout with random weights: right in names, types and sizes, if the real files are."""

    def _locate_tensors(self) -> dict[str, TensorInfo]:
        self.warnings.append("the weights are not on this machine; the official layout is assumed")
        path = self.folder / "not-fetched.safetensors"
        sizes = ((s, math.prod(s.shape) * DTYPE_BITS[s.dtype] // 8) for s in official_tensors(self.config))
        return {s.name: TensorInfo(s.name, s.dtype, s.shape, path, 0, nbytes) for s, nbytes in sizes}

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Random values as a weight has them, ones for block scales."""
        import torch

        info = self.info(name)
        if name.endswith(SCALE_SUFFIX):
            return torch.ones(info.shape)
        return (torch.randn(info.shape) * 0.02).to(torch_dtype(info))
