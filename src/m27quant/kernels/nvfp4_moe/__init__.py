"""A layer's routed experts in NVFP4: gate, up, SwiGLU, down and the weighted sum over a token's experts.

`reference.py` holds the formula.  Each backend (`reference`, `cpu`, `gpu`) offers the same functions on the
tensors that it allocated:

    empty(count, hidden_size, intermediate_size, activations, device) -> tuple of tensors
    fill(tensors, index, w1, w2, w3, input_scale_13, input_scale_2)        index: place within the slice
    moe(x_TD, tensors, experts_TK, weights_TK, first, activations, invariant) -> y_TD

where `experts_TK - first` outside of 0..count-1 stands for no expert.

Shapes: T tokens, D hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from m27quant.errors import CheckpointError
from m27quant.kernels.dispatch import Backend, choose
from m27quant.kernels.nvfp4_gemm import Activations
from m27quant.kernels.nvfp4_gemm.checks import check_activations, check_packed, check_rows
from m27quant.kernels.nvfp4_moe import reference
from m27quant.kernels.nvfp4_pack import GROUP, PackedNVFP4
from m27quant.kernels.nvfp4_quantize import is_usable

__all__ = ["ExpertWeights", "moe"]


class ExpertWeights:
    """All experts of a layer, or the slice [first, first + count) of them, prepared for `moe`."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activations: Activations,
        first: int,
        count: int,
        backend: Backend,
        tensors: tuple[Tensor, ...],
    ) -> None:
        """Take what `empty` allocated; call that instead."""
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.activations, self.first, self.count = activations, first, count
        self.backend, self.tensors = backend, tensors
        self._unset = set(range(first, first + count))

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activations: Activations,
        device: torch.device | str,
        first: int = 0,
        count: int | None = None,
    ) -> ExpertWeights:
        """Room for the experts, none of them filled yet.

        Args:
            num_experts: E, what ids of `moe` count up to.
            hidden_size: D, a multiple of 16.
            intermediate_size: I, a multiple of 16.
            activations: "nvfp4" (W4A4) or "bf16" (W4A16), as in `nvfp4_gemm`.
            device: where the weights lie and the products run.
            first: the first expert of the slice that is held here.
            count: how many experts are held; by default all from `first` on.

        Raises:
            ValueError: sizes that do not fit, a slice outside of the experts.
        """
        check_activations(activations)
        count = num_experts - first if count is None else count
        if first < 0 or count < 1 or first + count > num_experts:
            raise ValueError(f"experts {first} to {first + count - 1} are not a slice of {num_experts}")
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size < GROUP or size % GROUP:
                raise ValueError(f"{name} must be a positive multiple of {GROUP}, is {size}")
        device = torch.device(device)
        backend = choose("nvfp4_moe", device).backend
        return cls(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activations=activations,
            first=first,
            count=count,
            backend=backend,
            tensors=_module(backend).empty(count, hidden_size, intermediate_size, activations, device),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and where activations must lie."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unset(self) -> list[int]:
        """Experts of the slice that `set` has not filled yet, ascending."""
        return sorted(self._unset)

    def set(
        self,
        expert: int,
        w1: PackedNVFP4,
        w2: PackedNVFP4,
        w3: PackedNVFP4,
        input_scale_13: Tensor | None = None,
        input_scale_2: Tensor | None = None,
    ) -> None:
        """Fill one expert in place, from tensors on any device.

        Args:
            expert: its number among all E.
            w1: gate [I, D]; w1 and w3 may have different `weight_scale_2`.
            w2: down [D, I].
            w3: up [I, D].
            input_scale_13: F32 [], the static scale of the input of w1 and w3; needed in W4A4, ignored in W4A16.
            input_scale_2: the same of w2's input.

        Raises:
            ValueError: an expert outside of the slice.
            CheckpointError: a matrix that is not one of this layer's (see `nvfp4_gemm.prepare`), or a scale that is
                missing, not positive, not finite or without a finite reciprocal.
        """
        if not self.first <= expert < self.first + self.count:
            raise ValueError(f"expert {expert} is not one of {self.first} to {self.first + self.count - 1}")
        D, I = self.hidden_size, self.intermediate_size
        for name, packed, shape in (("w1", w1, (I, D)), ("w2", w2, (D, I)), ("w3", w3, (I, D))):
            check_packed(packed, shape, f"expert {expert}, {name}")
        scales: list[Tensor | None] = [None, None]
        if self.activations == "nvfp4":
            wanted = {"input_scale of w1 and w3": input_scale_13, "input_scale of w2": input_scale_2}
            scales = [self._input_scale(expert, name, scale) for name, scale in wanted.items()]
        on_device = [PackedNVFP4(*(t.to(self.device) for t in packed)) for packed in (w1, w2, w3)]
        _module(self.backend).fill(self.tensors, expert - self.first, *on_device, *scales)
        self._unset.discard(expert)

    def _input_scale(self, expert: int, name: str, scale: Tensor | None) -> Tensor:
        if scale is None:
            raise CheckpointError(
                f"expert {expert} has no {name}, which W4A4 needs",
                hint="run it with BF16 activations (W4A16)",
            )
        if scale.dtype != torch.float32 or scale.numel() != 1 or not is_usable(scale):
            raise CheckpointError(
                f"expert {expert}: {name} must be one positive F32 number with a finite reciprocal",
                hint="calibrate again, or run it with BF16 activations (W4A16)",
            )
        return scale.reshape(()).to(self.device)


def moe(
    x_TD: Tensor, weights: ExpertWeights, experts_TK: Tensor, weights_TK: Tensor, *, invariant: bool = False
) -> Tensor:
    """The experts' weighted sum y [T, D], in x's dtype.

    Args:
        x_TD: BF16 or F32 [T, D], T may be 0.
        weights: the experts, all of them `set`.
        experts_TK: I64 or I32 [T, K], numbers among all E, -1 for none.  An expert outside of the slice that
            `weights` holds contributes 0.
        weights_TK: F32 [T, K], what each slot counts.
        invariant: a token's result does not depend on which or how many others are computed with it.

    Raises:
        ValueError: shapes, dtypes or devices; experts that were never set; a number that no expert has (looked at
            on a CPU alone; elsewhere it contributes 0).
    """
    check_rows(x_TD, weights.hidden_size, weights.device)
    _check_routing(x_TD, experts_TK, weights_TK, weights.num_experts)
    if weights.unset:
        raise ValueError(f"{len(weights.unset)} experts were never set, the first is {weights.unset[0]}")
    y_TD: Tensor = _module(weights.backend).moe(
        x_TD.contiguous(),
        weights.tensors,
        experts_TK.contiguous(),
        weights_TK.contiguous(),
        weights.first,
        weights.activations,
        invariant,
    )
    return y_TD


def _check_routing(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> None:
    if experts_TK.dtype not in (torch.int64, torch.int32) or weights_TK.dtype != torch.float32:
        raise ValueError(
            f"routing needs I64 or I32 experts and F32 weights, got {experts_TK.dtype}, {weights_TK.dtype}"
        )
    if experts_TK.dim() != 2 or experts_TK.shape != weights_TK.shape or len(experts_TK) != len(x_TD):
        raise ValueError(
            f"routing of {len(x_TD)} tokens needs experts and weights [T, K], "
            f"got {list(experts_TK.shape)} and {list(weights_TK.shape)}"
        )
    if not (x_TD.device == experts_TK.device == weights_TK.device):
        raise ValueError("activations, experts and weights must lie on one device")
    if experts_TK.device.type == "cpu" and experts_TK.numel():
        least, most = (int(bound) for bound in experts_TK.aminmax())
        if least < -1 or most >= num_experts:
            raise ValueError(f"expert numbers from {least} to {most}, must be -1 to {num_experts - 1}")


def _module(backend: Backend) -> ModuleType:
    if backend == "cpu-native":
        from m27quant.kernels.nvfp4_moe import cpu

        return cpu
    if backend == "triton":
        from m27quant.kernels.nvfp4_moe import gpu

        return gpu
    return reference
