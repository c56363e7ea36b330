"""Other packages' experts for benchmarks/kernels_gpu.py, where they can be imported; none of this has run yet.

humming-kernels (vllm-project/humming) is the one with NVFP4 experts on Hopper that fits beside torch.  gemlite has no
mixture of experts, FlashInfer's NVFP4 ones want sm_100 and are left to a machine that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.kernels_gpu import Batch, Layer

Rival = Callable[["Layer", "Batch"], Tensor]


def moe_rivals(layer: Layer) -> dict[str, Rival]:
    """Those that are installed; building one may fail at its first call, which is then its result."""
    if layer.device.type == "cuda" and find_spec("humming"):
        return {"humming W4A16": Humming()}
    return {}


class Humming:
    """W4A16 with experts' tokens one after the other (`grouped_contiguous`); sorting and the sum are torch's."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Any, Any]] = {}

    def __call__(self, layer: Layer, batch: Batch) -> Tensor:
        up, down = self.layers.setdefault(id(layer), ()) or self._prepare(layer)
        x_TD, experts_TK, weights_TK = batch
        (T, D), K = x_TD.shape, experts_TK.shape[1]
        order = experts_TK.flatten().argsort(stable=True)
        offsets = torch.zeros(layer.sizes.E + 1, dtype=torch.int64, device=x_TD.device)
        offsets[1:].scatter_add_(0, experts_TK.flatten(), torch.ones_like(order))
        offsets = offsets.cumsum(0)
        grouped = {"expert_layout": offsets, "compute_config": {"gemm_type": "grouped_contiguous"}}
        gate, value = up(x_TD[order // K], **grouped).chunk(2, 1)
        out = down(F.silu(gate) * value, **grouped)
        y_SD = torch.empty(T * K, D, dtype=torch.float32, device=x_TD.device)
        y_SD[order] = out.float() * weights_TK.flatten()[order][:, None]
        return y_SD.view(T, K, D).sum(1).bfloat16()

    def _prepare(self, layer: Layer) -> tuple[Any, Any]:
        D, I, E, _ = layer.sizes
        w1, s1, g1, w2, s2, g2, w3, s3, _, _, _ = layer.plain
        self.layers[id(layer)] = (
            self._layer(2 * I, D, E, torch.cat((w1, w3), 1), torch.cat((s1, s3), 1), g1),
            self._layer(D, I, E, w2, s2, g2),
        )
        return self.layers[id(layer)]

    def _layer(self, N: int, K: int, E: int, codes: Tensor, scales: Tensor, scale_2: Tensor) -> Any:
        from humming.layer import HummingLayer

        made = HummingLayer(
            shape_n=N, shape_k=K, num_experts=E, torch_dtype=torch.bfloat16,
            weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        ).to(codes.device)  # fmt: skip
        made.load_from_tensors({"weight": codes, "weight_scale": scales, "weight_scale_2": scale_2[:, None]})
        made.transform()
        return made
