"""The ways in which a recipe makes NVFP4 of an expert's matrices, and what each notes beside the usual figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from m27quant.calib.moments import ChannelWeights
from m27quant.kernels import nvfp4_gptq, nvfp4_pack
from m27quant.kernels.nvfp4_gptq import Factor
from m27quant.kernels.nvfp4_pack import PackedNVFP4
from m27quant.kernels.nvfp4_pack.weighted import weighted_error
from m27quant.pack_stats import PackStats
from m27quant.recipes.algorithm import Method

SAMPLED_ROWS = 128
"""Of a matrix, spread evenly: those whose output error is measured, as all would cost as much as packing."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix of an expert, as it is stored."""

    expert: int
    projection: str
    weight: torch.Tensor
    """FP8 or BF16 [N, K]."""
    scale_inv: torch.Tensor | None
    block: tuple[int, int]
    amax: torch.Tensor
    """F32 [], of all matrices that share its `weight_scale_2`."""


class Packing(Protocol):
    """How a matrix becomes NVFP4."""

    def pack(self, m: Linear) -> PackedNVFP4:
        """Encode it; raises as `nvfp4_pack.pack` does."""

    def note(self, m: Linear, plain: torch.Tensor, packed: PackedNVFP4, stats: PackStats) -> None:
        """What was gained, by its BF16 values `plain`."""


class ByMaxima:
    """Block scales from each block's largest weight."""

    def pack(self, m: Linear) -> PackedNVFP4:
        return nvfp4_pack.pack(m.weight, m.scale_inv, amax=m.amax, block=m.block)

    def note(self, m: Linear, plain: torch.Tensor, packed: PackedNVFP4, stats: PackStats) -> None:
        return None


@dataclass(frozen=True, slots=True)
class ByLeastError:
    """Block scales of the least squared error, counted by the `channels` where there are some."""

    channels: ChannelWeights | None = None

    def pack(self, m: Linear) -> PackedNVFP4:
        weight = None if self.channels is None else self.channels.of(m.expert)[m.projection]
        return nvfp4_pack.pack(
            m.weight, m.scale_inv, amax=m.amax, block=m.block, scales="mse", channel_weight=weight
        )

    def note(self, m: Linear, plain: torch.Tensor, packed: PackedNVFP4, stats: PackStats) -> None:
        by_maxima = stats.add_max(m.projection, plain, m.amax)
        if self.channels is not None:
            channels = self.channels.of(m.expert)[m.projection]
            (signal, noise), (_, noise_of_max) = (
                weighted_error(plain, tensors, channels) for tensors in (packed, by_maxima)
            )
            stats.weighted.setdefault(m.projection, []).append([signal, noise, noise_of_max])


class Factors(Protocol):
    """Of the Hessians of what a layer's matrices read."""

    def factor(self, expert: int, projection: str) -> Factor:
        """One of them, factorized; asked for twice it is not made twice."""


@dataclass(frozen=True, slots=True)
class ByErrorFeedback:
    """What rounding a column does to the outputs is made good by the columns behind it."""

    factors: Factors

    def pack(self, m: Linear) -> PackedNVFP4:
        factor = self.factors.factor(m.expert, m.projection)
        return nvfp4_gptq.pack(m.weight, m.scale_inv, amax=m.amax, block=m.block, factor=factor)

    def note(self, m: Linear, plain: torch.Tensor, packed: PackedNVFP4, stats: PackStats) -> None:
        by_maxima = stats.add_max(m.projection, plain, m.amax)
        factor = self.factors.factor(m.expert, m.projection)
        rows = slice(None, None, max(1, len(plain) // SAMPLED_ROWS))
        x = plain[rows].float()
        errors = [x - _rows(tensors, rows) for tensors in (packed, by_maxima)]
        stats.weighted.setdefault(m.projection, []).append(
            [nvfp4_gptq.energy(values, factor) for values in (x, *errors)]
        )
        stats.factors.setdefault(m.projection, []).append([factor.damping, factor.attempts, factor.dead])


def _rows(packed: PackedNVFP4, rows: slice) -> torch.Tensor:
    return nvfp4_pack.unpack(
        packed._replace(weight=packed.weight[rows], weight_scale=packed.weight_scale[rows])
    )


def plain_packing(method: Method) -> Packing:
    """Of a recipe that packs by the weights alone."""
    return ByMaxima() if method == "max" else ByLeastError()
