"""A checkpoint against the model that it was made from: expert matrices quantized again, all else byte for byte.

An expert arrives tensor by tensor from `stream` and is compared once it is complete, so that every byte is read once
where an expert's tensors lie together, as m27quant and modelopt write them.  Experts that a file boundary cuts in
two, or whose tensors lie far apart, are read again at the end.
"""

from __future__ import annotations

import threading
from typing import Any

from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.source import Source
from m27quant.errors import escape
from m27quant.progress import ignore
from m27quant.verify.collect import Findings
from m27quant.verify.experts import ExpertComparison, Held, Place, whole_experts
from m27quant.verify.plain import PlainComparison
from m27quant.verify.reading import read_tensors
from m27quant.verify.stream import Meter, Visitor, in_threads
from m27quant.verify.verdicts import Outcomes
from m27quant.verify.view import View

SIZES = (
    "num_hidden_layers",
    "num_local_experts",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
)
ROUTER = (".gate.weight", ".e_score_correction_bias")


class Comparison:
    """What all threads share: the source and the outcomes."""

    def __init__(self, view: View, source: Source, found: Findings) -> None:
        self.view, self.source, self.found = view, source, found
        self.outcomes = Outcomes()
        self.lock = threading.Lock()
        self.plain_equal = self.plain_different = 0
        self.late: list[Place] = []
        self.experts = whole_experts(view)
        self.place_of = {name: at for at, tensors in self.experts.items() for name in tensors}
        self.plain = {name for name in view.tensors if self._is_plain(name)}
        self._compare = ExpertComparison(view, source)

    def _is_plain(self, name: str) -> bool:
        """Whether a tensor should be the source's."""
        info, spec = self.view.tensors[name], self.view.expected.get(name)
        return (
            spec is not None
            and spec.shape == info.shape
            and bool(spec.shape)
            and info.dtype in ("BF16", "F16", "F32")
            and ".experts." not in name
        )

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
        for outcome in self._compare.compare(at, tensors):
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
        self._held = Held(comparison.experts)
        self._plain = PlainComparison(comparison.source)

    def wants(self, info: TensorInfo) -> bool:
        """Tensors of whole experts, and whatever else should be the source's."""
        return info.name in self._all.place_of or info.name in self._all.plain

    def visit(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Take the bytes in."""
        if (at := self._all.place_of.get(info.name)) is not None:
            if self._held.is_full:
                self.end_of_shard()
            if self._held.add(at, info, offset, data):
                self._all.compare_expert(at, self._held[at])
                self._held.release(at)
        elif info.name in self._all.plain and self._plain.add(info, offset, data):
            self._all.add_plain(info, self._plain.difference(info))

    def end_of_shard(self) -> None:
        """What is incomplete goes on in another file."""
        with self._all.lock:
            self._all.late += self._held.give_up()


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


def _plain_code(name: str) -> str:
    if name.endswith(ROUTER):
        return "M27-W020"
    if name.endswith("norm.weight"):
        return "M27-W021"
    if ".self_attn." in name:
        return "M27-W018"
    return "M27-W019"
