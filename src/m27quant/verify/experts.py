"""Expert matrices as they arrive from `stream`, held until an expert is complete, then compared with the source."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import Source
from m27quant.kernels import fp8_dequant, native, nvfp4_pack
from m27quant.kernels.nvfp4_pack.reference import global_scale
from m27quant.pack import Naming, Stored
from m27quant.verify.difference import Matrix, Outcome, diagnose, proven
from m27quant.verify.stream import usable_cores
from m27quant.verify.view import View

PARTS = ("weight", "weight_scale", "weight_scale_2")
MOST_HELD = 2**28
"""Bytes of incomplete experts that one thread keeps."""

Place = tuple[int, int]
"""Layer and expert."""


def whole_experts(view: View) -> dict[Place, dict[str, TensorInfo]]:
    """Experts whose nine tensors are there in the right types and shapes; the others were reported."""
    experts: dict[Place, dict[str, TensorInfo]] = {}
    if view.config is None:
        return experts
    for layer in range(view.config.num_hidden_layers):
        for expert in range(view.config.num_local_experts):
            found = dict(_right(view, layer, expert))
            if len(found) == 3 * len(PARTS):
                experts[layer, expert] = found
    return experts


def _right(view: View, layer: int, expert: int) -> Iterator[tuple[str, TensorInfo]]:
    for projection in names.EXPERT_PROJECTIONS:
        module = names.expert(layer, expert, projection)
        for name in (f"{module}.{part}" for part in PARTS):
            info, spec = view.tensors.get(name), view.expected.get(name)
            if info is None or spec is None or info.dtype != spec.dtype:
                continue
            right = info.shape == spec.shape or (not spec.shape and info.nbytes == 4)
            if right and info.end <= view.shard_sizes.get(info.path.name, 0):
                yield name, info


class Held:
    """Tensors of one thread's incomplete experts, in memory that is used again for the next ones."""

    def __init__(self, experts: dict[Place, dict[str, TensorInfo]]) -> None:
        self._experts = experts
        self._parts: dict[Place, dict[str, bytearray]] = {}
        self._missing: dict[Place, int] = {}
        self._spare: defaultdict[int, list[bytearray]] = defaultdict(list)
        self._bytes = 0

    def add(self, at: Place, info: TensorInfo, offset: int, data: memoryview) -> bool:
        """Bytes of a tensor in order; True once the expert is complete.  What began unseen is left out."""
        if offset == 0:
            if at not in self._parts:
                self._parts[at] = {}
                self._missing[at] = sum(i.nbytes for i in self._experts[at].values())
            spare = self._spare[info.nbytes]
            self._parts[at][info.name] = spare.pop() if spare else bytearray(info.nbytes)
            self._bytes += info.nbytes
        elif info.name not in self._parts.get(at, ()):
            return False
        self._parts[at][info.name][offset : offset + len(data)] = data
        self._missing[at] -= len(data)
        return not self._missing[at]

    @property
    def is_full(self) -> bool:
        """More is held than should be."""
        return self._bytes > MOST_HELD

    def __getitem__(self, at: Place) -> dict[str, bytearray]:
        return self._parts[at]

    def release(self, at: Place) -> None:
        """The expert's memory may be overwritten."""
        del self._missing[at]
        for data in self._parts.pop(at).values():
            self._spare[len(data)].append(data)
            self._bytes -= len(data)

    def give_up(self) -> list[Place]:
        """Let go of all that is incomplete; which experts that was."""
        places = list(self._parts)
        for at in places:
            self.release(at)
        return places


class ExpertComparison:
    """Quantizes experts of the source again; threads may call it at the same time."""

    def __init__(self, view: View, source: Source) -> None:
        self._view, self._source = view, source
        self._thread = threading.local()
        self._every_core_busy = len(view.shard_sizes) >= usable_cores()

    def compare(self, at: Place, tensors: dict[str, bytearray]) -> list[Outcome]:
        """All three matrices of one expert, whose nine tensors are given as bytes."""
        with native.one_thread() if self._every_core_busy else nullcontext():
            return list(self._compare(at, tensors))

    def _compare(self, at: Place, tensors: dict[str, bytearray]) -> Iterator[Outcome]:
        exact, amax = {}, {}
        scales = self._view.block_scales
        for p in names.EXPERT_PROJECTIONS:
            m = self._matrix(at, p, tensors)
            with Naming(m.module):
                found = None
                if scales == "max" or scales == "mse":  # else no checkpoint says how to repeat it
                    found = nvfp4_pack.compare(m.weight, m.scale_inv, m.packed, block=m.block, scales=scales)
                exact[p] = found
                amax[p] = found.amax if found else nvfp4_pack.amax(m.weight, m.scale_inv, block=m.block)
        shared = torch.maximum(amax["w1"], amax["w3"])
        for p in names.EXPERT_PROJECTIONS:
            module = names.expert(*at, p)
            scale_2 = _packed(self._view, module, tensors).weight_scale_2
            # w1 and w3 with a scale each are reported from the scales; their bytes may be right all the same
            largest = amax[p] if p == "w2" or scale_2 == global_scale(amax[p]) else shared
            if (found := exact[p]) is not None and scale_2 == global_scale(largest):
                yield proven(module, at[0], found)
            else:
                said = self._view.recorded_sqnr_db.get(at[0], {}).get(p, {}).get(at[1])
                yield diagnose(self._source, self._matrix(at, p, tensors), largest, scales, said)

    def _matrix(self, at: Place, projection: str, tensors: dict[str, bytearray]) -> Matrix:
        """One of them; its source lies in memory that the thread's next matrix overwrites."""
        module = names.expert(*at, projection)
        block = self._source.config.weight_block_size or fp8_dequant.BLOCK
        return Matrix(
            module, *at, projection, *self._read(module), block, _packed(self._view, module, tensors)
        )

    def _read(self, module: str) -> Stored:
        info = self._source.info(f"{module}.weight")
        room: torch.Tensor | None = getattr(self._thread, "room", None)
        if room is None or room.numel() < info.nbytes:
            room = self._thread.room = torch.empty(info.nbytes, dtype=torch.uint8)
        weight = self._source.read(f"{module}.weight", room)
        if weight.dtype != torch.float8_e4m3fn:
            return weight, None
        return weight, self._source.read(f"{module}.weight_scale_inv")


def _packed(view: View, module: str, tensors: dict[str, bytearray]) -> nvfp4_pack.PackedNVFP4:
    codes, scale, scale_2 = (tensors[f"{module}.{part}"] for part in PARTS)

    def typed(data: bytearray, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(data, dtype=dtype).view(view.expected[name].shape)

    return nvfp4_pack.PackedNVFP4(
        typed(codes, f"{module}.weight", torch.uint8),
        typed(scale, f"{module}.weight_scale", torch.float8_e4m3fn),
        torch.frombuffer(scale_2, dtype=torch.float32).view(()),
    )
