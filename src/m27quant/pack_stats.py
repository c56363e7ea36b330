"""What packing found: figures by projection and expert, and what they make of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from m27quant.checkpoint import names
from m27quant.kernels import nvfp4_pack
from m27quant.recipes.algorithm import Method


@dataclass(slots=True)
class PackStats:
    """Per projection and expert what packing found; lists run over experts."""

    sqnr_db: dict[str, list[float | None]] = field(
        default_factory=lambda: {p: [] for p in names.EXPERT_PROJECTIONS}
    )
    """None where the matrix is all zero."""
    weight_scale_2: dict[str, list[float]] = field(
        default_factory=lambda: {p: [] for p in names.EXPERT_PROJECTIONS}
    )
    max_sqnr_db: dict[str, list[float | None]] = field(default_factory=dict)
    """What `sqnr_db` would be under block scales from maxima; empty where it is that."""
    weighted: dict[str, list[list[float]]] = field(default_factory=dict)
    """Signal, noise, and noise under block scales from maxima, as the recipe counts squares; empty without."""
    factors: dict[str, list[list[float]]] = field(default_factory=dict)
    """Of each matrix' Hessian the damping, the attempts that it took, and its dead channels; empty without."""
    zero_groups: int = 0
    saturated_groups: int = 0
    tiny_groups: int = 0
    dead: list[str] = field(default_factory=list)
    """Expert matrices that are all zero."""

    def add(self, module: str, projection: str, weight: torch.Tensor, packed: nvfp4_pack.PackedNVFP4) -> None:
        """Compare the BF16 `weight` with what became of it."""
        error = nvfp4_pack.squared_error(weight, None, packed)
        counts = nvfp4_pack.count_groups(weight, None, packed.weight_scale_2)
        self.sqnr_db[projection].append(_decibels(error))
        self.weight_scale_2[projection].append(float(packed.weight_scale_2))
        self.zero_groups += counts.zero
        self.saturated_groups += counts.saturated
        self.tiny_groups += counts.tiny
        if not error.signal:
            self.dead.append(module)

    def add_max(self, projection: str, weight: torch.Tensor, amax: torch.Tensor) -> nvfp4_pack.PackedNVFP4:
        """What block scales from maxima would have given, beside what was gained over them; returns it."""
        packed = nvfp4_pack.pack(weight, amax=amax)
        error = nvfp4_pack.squared_error(weight, None, packed)
        self.max_sqnr_db.setdefault(projection, []).append(_decibels(error))
        return packed

    def figures(self, method: Method) -> dict[str, Any]:
        """As the report has them for a layer packed by `method`."""
        found: dict[str, Any] = {
            "sqnr_db": self.sqnr_db,
            "weight_scale_2": self.weight_scale_2,
            **({"max_sqnr_db": self.max_sqnr_db} if self.max_sqnr_db else {}),
            "zero_groups": self.zero_groups,
            "saturated_groups": self.saturated_groups,
            "tiny_groups": self.tiny_groups,
            "dead": self.dead,
        }
        if errors := self._relative_errors(method):
            found["output_error" if self.factors else "weighted_error"] = errors
        if self.factors:
            found["hessians"] = {
                kind: {
                    "damping": [damping for damping, _, _ in factors],
                    "attempts": [int(attempts) for _, attempts, _ in factors],
                    "dead_channels": [int(dead) for _, _, dead in factors],
                }
                for kind, factors in (("w13", self.factors["w1"][:1]), ("w2", self.factors["w2"]))
            }
        return found

    def _relative_errors(self, method: Method) -> dict[str, dict[str, float]]:
        """Of each projection the layer's noise over its signal, as packed and under maxima."""
        found = {}
        for projection, experts in self.weighted.items():
            signal, noise, noise_of_max = (math.fsum(column) for column in zip(*experts, strict=True))
            if signal:
                found[projection] = {
                    str(method): _rounded(noise / signal),
                    "max": _rounded(noise_of_max / signal),
                }
        return found


def merged_stats(parts: Sequence[PackStats], num_experts: int) -> PackStats:
    """The figures of ranks that were dealt the experts one by one, in the order of experts."""
    size, projections = len(parts), names.EXPERT_PROJECTIONS

    def dealt(field: str) -> dict[str, Any]:
        by_rank = [getattr(part, field) for part in parts]
        if not by_rank[0]:
            return {}
        return {p: [by_rank[e % size][p][e // size] for e in range(num_experts)] for p in projections}

    dead = {module for part in parts for module in part.dead}
    order = [(module, module.split(".")) for module in dead]
    return PackStats(
        sqnr_db=dealt("sqnr_db"),
        weight_scale_2=dealt("weight_scale_2"),
        max_sqnr_db=dealt("max_sqnr_db"),
        weighted=dealt("weighted"),
        factors=dealt("factors"),
        zero_groups=sum(part.zero_groups for part in parts),
        saturated_groups=sum(part.saturated_groups for part in parts),
        tiny_groups=sum(part.tiny_groups for part in parts),
        dead=[module for module, _ in sorted(order, key=lambda m: (int(m[1][-2]), m[1][-1]))],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _decibels(error: nvfp4_pack.SquaredError) -> float | None:
    value = error.sqnr_db if error.signal else None
    return None if value is None or math.isinf(value) else round(value, 3)
