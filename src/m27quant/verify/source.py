"""A checkpoint against the model that it was made from: expert matrices quantized again, all else byte for byte.

An expert arrives tensor by tensor from `stream` and is compared once it is complete, so that every byte is read once
where an expert's tensors lie together, as m27quant and modelopt write them.  Experts that a file boundary cuts in
two, or whose tensors lie far apart, are read again at the end.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import Source, torch_dtype
from m27quant.errors import escape
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.nvfp4_pack.reference import global_scale
from m27quant.pack import Naming
from m27quant.progress import ignore
from m27quant.runtime.loader import dequantize_linear, read_linear
from m27quant.verify.collect import Findings, place
from m27quant.verify.difference import Matrix, Outcome, diagnose
from m27quant.verify.reading import read_tensors
from m27quant.verify.stream import Meter, Visitor, in_threads
from m27quant.verify.verdicts import Outcomes
from m27quant.verify.view import View

CPU = torch.device("cpu")
PARTS = ("weight", "weight_scale", "weight_scale_2")
MOST_HELD = 2**28
"""Bytes of incomplete experts that one thread keeps."""
SIZES = (
    "num_hidden_layers",
    "num_local_experts",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
)
ROUTER = (".gate.weight", ".e_score_correction_bias")

Place = tuple[int, int]
"""Layer and expert."""


class Comparison:
    """What all threads share: the source and the outcomes."""

    def __init__(self, view: View, source: Source, found: Findings) -> None:
        self.view, self.source, self.found = view, source, found
        self.outcomes = Outcomes()
        self.lock = threading.Lock()
        self.plain_equal = self.plain_different = 0
        self.late: list[Place] = []
        self.experts = _whole_experts(view)

    def same_model(self) -> bool:
        """Reports where the source has other sizes: there is nothing to compare then."""
        ours, theirs = self.view.config, self.source.config
        if ours is None:
            return False
        for field in SIZES:
            a, b = getattr(ours, field), getattr(theirs, field)
            if a != b:
                self.found.add(
                    "M27-W022", f"{field} is {a:,} here and {b:,} in the source",
                    file="config.json", expected=b, found=a,
                )  # fmt: skip
                return False
        return True

    def compare_late(self) -> None:
        """Experts that did not arrive in one piece."""

        def one(at: Place) -> None:
            tensors = {info.name: bytearray(data) for info, data in read_tensors(self.experts[at].values())}
            self.compare_expert(at, tensors)

        late, self.late = sorted(set(self.late)), []
        in_threads(one, late, Meter(0, ignore))

    def compare_expert(self, at: Place, tensors: dict[str, bytearray]) -> None:
        """All three matrices of one expert, whose nine tensors are given as bytes."""
        config = self.source.config
        block = config.weight_block_size or fp8_dequant.BLOCK
        modules = {p: names.expert(*at, p) for p in names.EXPERT_PROJECTIONS}
        stored = {p: read_linear(self.source, module, CPU) for p, module in modules.items()}
        amax = {}
        for p, (weight, scale) in stored.items():
            with Naming(modules[p]):
                amax[p] = nvfp4_pack.amax(weight, scale, block=block)
        shared = torch.maximum(amax["w1"], amax["w3"])
        for p, module in modules.items():
            matrix = Matrix(module, *at, p, *stored[p], block, _packed(self.view, module, tensors))
            # w1 and w3 with a scale each are reported from the scales; their bytes may be right all the same
            own = matrix.packed.weight_scale_2 == global_scale(amax[p])
            outcome = diagnose(self.source, matrix, amax[p] if p == "w2" or own else shared)
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        """Keep one matrix's outcome."""
        with self.lock:
            self.outcomes.add(outcome)

    def add_plain(self, info: TensorInfo, what: str | None) -> None:
        """Keep whether a tensor that is no expert's is the source's; `what` says how it differs."""
        with self.lock:
            if what is None:
                self.plain_equal += 1
                return
            self.plain_different += 1
            self.found.add(
                _plain_code(info.name), f"'{escape(info.name)}' {what}", tensor=info.name, found=what
            )

    def finish(self) -> dict[str, Any]:
        """Report the matrices; what `facts["source"]` says."""
        self.outcomes.report(self.found)
        facts = self.outcomes.facts()
        return facts | {
            "other_tensors_equal": self.plain_equal,
            "other_tensors_different": self.plain_different,
        }


class SourceVisitor:
    """One thread's comparison: collects experts, compares everything else as it comes."""

    def __init__(self, comparison: Comparison) -> None:
        self._all = comparison
        self._held: dict[Place, dict[str, bytearray]] = defaultdict(dict)
        self._held_bytes = 0
        self._expected: np.ndarray | None = None
        self._different = 0
        self._first: int | None = None

    def wants(self, info: TensorInfo) -> bool:
        """Tensors of whole experts, and whatever else should be the source's."""
        layer, expert, role = place(info.name)
        if layer is not None and expert is not None:
            return info.name in self._all.experts.get((layer, expert), ())
        spec = self._all.view.expected.get(info.name)
        return (
            spec is not None
            and spec.shape == info.shape
            and bool(spec.shape)
            and info.dtype in ("BF16", "F16", "F32")
            and role != "k_scale"
        )

    def visit(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Take the bytes in."""
        if not self.wants(info):
            return
        layer, expert, _ = place(info.name)
        if layer is None or expert is None:
            self._compare_plain(info, offset, data)
        else:
            self._hold((layer, expert), info, offset, data)

    def end_of_shard(self) -> None:
        """What is incomplete goes on in another file."""
        with self._all.lock:
            self._all.late += self._held
        self._held.clear()
        self._held_bytes = 0

    # -- experts -----------------------------------------------------------------------------------

    def _hold(self, at: Place, info: TensorInfo, offset: int, data: memoryview) -> None:
        if self._held_bytes + len(data) > MOST_HELD:
            self.end_of_shard()
        if offset and info.name not in self._held[at]:  # its beginning was let go
            return
        held = self._held[at]
        if offset == 0:
            held[info.name] = bytearray()
        held[info.name] += data
        self._held_bytes += len(data)
        wanted = self._all.experts[at]
        if len(held) == len(wanted) and all(len(held[name]) == i.nbytes for name, i in wanted.items()):
            tensors = self._held.pop(at)
            self._held_bytes -= sum(map(len, tensors.values()))
            self._all.compare_expert(at, tensors)

    # -- everything else ---------------------------------------------------------------------------

    def _compare_plain(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        if offset == 0:
            self._different, self._first, self._expected = 0, None, self._dequantized(info)
        bytes_ = np.frombuffer(data, np.uint8)
        if self._expected is not None and info.dtype == "F32":
            value = torch.from_numpy(bytes_.copy()).view(torch.float32).bfloat16()
            bytes_, offset_there = byte_array(value), offset // 2
        else:
            offset_there = offset
        if self._expected is None:
            there = self._from_source(info, offset, len(data))
        else:
            there = self._expected[offset_there : offset_there + bytes_.size]
        if not np.array_equal(bytes_, there):
            wrong = np.flatnonzero(bytes_ != there)
            width = 2 if self._expected is not None else torch_dtype(info).itemsize
            elements = np.unique(wrong // width)
            if self._first is None:
                self._first = offset_there // width + int(elements[0])
            self._different += elements.size
        if offset + len(data) == info.nbytes:
            self._close_plain(info)

    def _close_plain(self, info: TensorInfo) -> None:
        what = None
        if self._different:
            at = [int(i) for i in np.unravel_index(self._first or 0, info.shape)]
            of = "the source's BF16 dequantization" if self._expected is not None else "the source"
            what = f"differs from {of} in {self._different:,} values, the first at {at}"
        self._expected = None
        self._all.add_plain(info, what)

    def _dequantized(self, info: TensorInfo) -> np.ndarray | None:
        """BF16 bytes of an attention weight; None for a tensor that the source holds as it is."""
        source, name = self._all.source, info.name
        if ".self_attn." not in name or not name.endswith("_proj.weight"):
            return None
        return byte_array(dequantize_linear(source, name.removesuffix(".weight"), CPU))

    def _from_source(self, info: TensorInfo, offset: int, count: int) -> np.ndarray:
        """The source's bytes of this part of a tensor, converted where it is stored in another type."""
        source = self._all.source
        there = source.info(info.name)
        if there.shape != info.shape:
            return np.empty(0, np.uint8)
        if there.dtype == info.dtype:
            return byte_array(source.read_raw(there, offset, count))
        theirs, ours = torch_dtype(there), torch_dtype(info)
        begin, numel = offset // ours.itemsize, count // ours.itemsize
        raw = source.read_raw(there, begin * theirs.itemsize, numel * theirs.itemsize)
        return byte_array(raw.view(theirs).to(ours))


class Both:
    """Two visitors of one stream."""

    def __init__(self, *visitors: Visitor) -> None:
        self._visitors = visitors

    def wants(self, info: TensorInfo) -> bool:
        """Either does."""
        return any(v.wants(info) for v in self._visitors)

    def visit(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Each takes what it wants."""
        for visitor in self._visitors:
            visitor.visit(info, offset, data)

    def end_of_shard(self) -> None:
        """Both end."""
        for visitor in self._visitors:
            visitor.end_of_shard()


def byte_array(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, U8 [n]."""
    return np.frombuffer(byte_view(tensor.contiguous()), np.uint8)


def _whole_experts(view: View) -> dict[Place, dict[str, TensorInfo]]:
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


def _packed(view: View, module: str, tensors: dict[str, bytearray]) -> nvfp4_pack.PackedNVFP4:
    codes, scale, scale_2 = (tensors[f"{module}.{part}"] for part in PARTS)

    def typed(data: bytearray, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(data, dtype=dtype).view(view.expected[name].shape)

    return nvfp4_pack.PackedNVFP4(
        typed(codes, f"{module}.weight", torch.uint8),
        typed(scale, f"{module}.weight_scale", torch.float8_e4m3fn),
        torch.frombuffer(scale_2, dtype=torch.float32).view(()),
    )


def _plain_code(name: str) -> str:
    if name.endswith(ROUTER):
        return "M27-W020"
    if name.endswith("norm.weight"):
        return "M27-W021"
    if ".self_attn." in name:
        return "M27-W018"
    return "M27-W019"
