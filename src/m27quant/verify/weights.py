"""Values of all weights: packed codes counted, plain tensors searched for NaN, shards hashed against the report.

Shapes: N out features, G groups of 16 along the in features.  A packed matrix is U8 [N, 8 G].
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, escape
from m27quant.kernels.nvfp4_stats import CodeCounts, any_nonfinite, count_codes, zero_blocks
from m27quant.verify.collect import Findings
from m27quant.verify.nibbles import Nibbles
from m27quant.verify.reading import read_tensors
from m27quant.verify.stream import ALGORITHMS, Hash
from m27quant.verify.view import View

REPORT = "quantization_report.json"
MAX_SATURATED = 0.5
"""Share of codes at 6: a twentieth to a fifth where block scales come from block maxima."""
EMPTY_SCALES = (0x00, 0x01, 0x38, 0x80)
"""E4M3 of a block of zeros: 0, the smallest one, 1 (modelopt's), -0."""
EXPONENT = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""All ones in NaN and infinity."""


class Values:
    """What streaming found; threads add to it."""

    def __init__(self, view: View, found: Findings) -> None:
        self.view, self.found = view, found
        self.lock = threading.Lock()
        self.total = CodeCounts(0, 0, 0, 0)
        self.matrices = self.zero_matrices = 0
        self.nibbles = Nibbles(view)

    def facts(self) -> dict[str, Any]:
        """Of all packed matrices together."""
        t = self.total
        live = t.blocks - t.zero
        return {
            "matrices": self.matrices,
            "zero_matrices": self.zero_matrices,
            "zero_blocks": t.zero,
            "largest_code_share": round(t.largest / (16 * t.blocks), 4) if t.blocks else None,
            "blocks_with_largest_code": round(t.reached / live, 4) if live else None,
        }

    def report(self, code: str, message: str, **where: Any) -> None:
        """`Findings.add` for threads."""
        with self.lock:
            self.found.add(code, message, **where)


class ValueVisitor:
    """One thread's view of the weights."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._counts = CodeCounts(0, 0, 0, 0)
        self._zeros: list[np.ndarray] = []
        self._bad = 0
        self._first_bad: int | None = None

    def wants(self, info: TensorInfo) -> bool:
        """Packed matrices in their place, and tensors of 16 and 32 bits that have more than one number."""
        if info.dtype == "U8":
            spec = self._values.view.expected.get(info.name)
            return (
                spec is not None and spec.dtype == "U8" and spec.shape == info.shape and info.nbytes % 8 == 0
            )
        return info.dtype in EXPONENT and bool(info.shape)

    def visit(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        """Count; the last bytes of a tensor close it."""
        if not self.wants(info):
            return
        if offset == 0:
            self._counts, self._zeros, self._bad, self._first_bad = CodeCounts(0, 0, 0, 0), [], 0, None
        if info.dtype == "U8":
            codes = np.frombuffer(data, np.uint8)
            if offset == 0:
                self._values.nibbles.add(info, codes)
            self._count(offset, codes)
        else:
            self._search(info, offset, data)
        if offset + len(data) == info.nbytes:
            self._close(info)

    def end_of_shard(self) -> None:
        """Nothing is left over."""

    def _count(self, offset: int, codes: np.ndarray) -> None:
        counts = count_codes(codes)
        if counts.zero:
            self._zeros.append(zero_blocks(codes) + offset // 8)
        self._counts = _sum(self._counts, counts)

    def _search(self, info: TensorInfo, offset: int, data: memoryview) -> None:
        dtype, ones = EXPONENT[info.dtype]
        numbers = np.frombuffer(data, dtype)
        if any_nonfinite(numbers, ones):
            bad = np.flatnonzero((numbers & ones) == ones)
            if self._first_bad is None:
                self._first_bad = offset // numbers.itemsize + int(bad[0])
            self._bad += bad.size

    def _close(self, info: TensorInfo) -> None:
        values = self._values
        if self._bad:
            at = np.unravel_index(self._first_bad or 0, info.shape)
            values.report(
                "M27-W005", f"'{escape(info.name)}' holds {self._bad:,} NaN or infinite values, the first at "
                f"{[int(i) for i in at]}", tensor=info.name, found=f"{self._bad:,}", badness=self._bad,
            )  # fmt: skip
        if info.dtype != "U8":
            return
        c = self._counts
        with values.lock:
            values.total = _sum(values.total, c)
            values.matrices += 1
            values.zero_matrices += c.zero == c.blocks
        share = c.largest / max(1, 16 * c.blocks)
        if c.zero == c.blocks:
            values.report("M27-W002", f"'{info.name}': all codes are zero", tensor=info.name)
        elif c.zero:
            self._compare_empty(info, np.concatenate(self._zeros))
        if share > MAX_SATURATED:
            values.report(
                "M27-W004", f"'{info.name}': {share:.0%} of its codes are 6, the largest",
                tensor=info.name, found=f"{share:.1%}", badness=share,
            )  # fmt: skip

    def _compare_empty(self, info: TensorInfo, zeros: np.ndarray) -> None:
        """Blocks of zeros under a scale that says that there was something."""
        scale = self._values.view.tensors.get(f"{info.name}_scale")
        if scale is None or scale.dtype != "F8_E4M3" or scale.nbytes * 8 != info.nbytes:
            return
        if scale.end > self._values.view.shard_sizes.get(scale.path.name, 0):
            return
        for _, data in read_tensors([scale]):
            lost = zeros[~np.isin(np.frombuffer(data, np.uint8)[zeros], EMPTY_SCALES)]
            if lost.size:
                row, group = divmod(int(lost[0]), scale.shape[1])
                self._values.report(
                    "M27-W003",
                    f"'{info.name}': {lost.size:,} blocks are all zero under a scale of their own, first at "
                    f"[{row}, {group}]", tensor=info.name, found=f"{lost.size:,} blocks", badness=lost.size,
                )  # fmt: skip


def _sum(a: CodeCounts, b: CodeCounts) -> CodeCounts:
    return CodeCounts(*(x + y for x, y in zip(a, b, strict=True)))


# -- hashes ----------------------------------------------------------------------------------------


def reported_hashes(view: View, found: Findings) -> dict[str, Hash]:
    """Shard name -> what quantization_report.json says of its content, for the shards that are there.

    XXH3 where it is there, which is ten times as fast: the report guards against damage, not against whoever could
    change it too.  Empty without a report.
    """
    path = view.folder / REPORT
    if not path.is_file():
        return {}
    try:
        shards = read_object(path).get("shards")
    except CheckpointError:
        return {}  # reported with the other documents
    if not isinstance(shards, dict):
        found.add("M27-W006", f"{REPORT} lists no shards", file=REPORT)
        return {}
    entries = {n: entry for n, entry in shards.items() if n in view.shard_sizes and isinstance(entry, dict)}
    hashes = {
        name: Hash(algorithm, entry[algorithm].lower())
        for name, entry in entries.items()
        for algorithm in reversed(ALGORITHMS)  # the last one stays
        if isinstance(entry.get(algorithm), str)
    }
    for name in sorted(set(view.shard_sizes) - set(hashes)):
        found.add("M27-W006", f"{REPORT} has no hash of {escape(name)}", file=name)
    return hashes


def compare_hashes(expected: dict[str, Hash], actual: dict[str, str], found: Findings) -> None:
    """Report every file whose content is not the one that was written."""
    for name, digest in actual.items():
        if digest != expected[name].digest:
            found.add(
                "M27-W001", f"{escape(name)} is not the file that {REPORT} describes",
                file=name, expected=expected[name].digest, found=digest,
            )  # fmt: skip
