"""Nibbles that look swapped, seen without the source: `order` has the statistics, this asks them.

* In w2: neuron j is row j of w3 and column j of w2.  Scaling one and shrinking the other changes
  nothing, so training leaves both large or both small; where even and odd columns are exchanged, the differences of
  neighbours are opposed.  Not asked after AWQ, which scales one against the other on purpose.
* In one w1 or w3: against the columns of all others of the layer, which read the same input.

Shapes: J pairs of columns.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from m27quant.checkpoint.header import TensorInfo
from m27quant.errors import escape
from m27quant.kernels.nvfp4_stats import column_energy
from m27quant.verify import order
from m27quant.verify.collect import Findings, place
from m27quant.verify.view import View

_SWAPPED = "nibbles look swapped"


class Nibbles:
    """Collects columns while the weights stream by; threads add to it."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._lock = threading.Lock()
        self._w2: dict[str, float] = {}
        self._inputs: defaultdict[int, dict[str, np.ndarray]] = defaultdict(dict)
        self._whole_layer = 0 if view.config is None else 2 * view.config.num_local_experts
        self._opposed: dict[str, float] = {}
        algorithm = (view.section or view.hf_quant or {}).get("quant_algo")
        self._balanced = "AWQ" not in str(algorithm)

    def add(self, info: TensorInfo, codes: order.Bytes) -> None:
        """The first bytes of a packed matrix [N, J]."""
        layer, expert, role = place(info.name)
        rows = min(order.SAMPLE_ROWS, info.shape[0])
        if layer is None or expert is None or codes.size < rows * info.shape[1]:
            return
        energy_2J = column_energy(codes[: rows * info.shape[1]].reshape(rows, -1)).astype(np.uint32)
        if role != "experts.w2.weight":
            with self._lock:
                self._inputs[layer][info.name] = energy_2J
                whole = len(self._inputs[layer]) == self._whole_layer
                of_layer = self._inputs.pop(layer) if whole else {}
            self._compare_inputs(of_layer)
            return
        w3 = self._view.row_pairs.get(info.name.removesuffix(".w2.weight"))
        if w3 is not None and self._balanced and len(w3) == info.shape[1]:
            deviations = order.deviations(order.pairs(energy_2J), w3)
            with self._lock:
                self._w2[info.name] = deviations

    def report(self, found: Findings) -> None:
        """Matrices that are beyond chance alone, or all w2 together."""
        wrong = {name: z for name, z in self._w2.items() if z < -order.Z}
        for name, z in wrong.items():
            _report(found, name, z, "its columns and the rows of w3")
        pooled = sum(self._w2.values()) / max(1, len(self._w2)) ** 0.5
        if not wrong and pooled < -order.Z:
            _report(
                found, min(self._w2), pooled, f"the columns of {len(self._w2):,} w2 and the rows of their w3"
            )
        for of_layer in self._inputs.values():
            self._compare_inputs(of_layer)
        for name, z in self._opposed.items():
            _report(found, name, z, "its columns and those of the layer's other w1 and w3")

    def _compare_inputs(self, of_layer: dict[str, np.ndarray]) -> None:
        """w1 and w3 of one layer, each against the sum of the others."""
        if len({energy.shape for energy in of_layer.values()}) != 1 or len(of_layer) < 3:
            return
        total_2J = np.sum(list(of_layer.values()), axis=0)
        for name, energy_2J in of_layer.items():
            z = order.deviations(order.pairs(energy_2J), order.pairs(total_2J - energy_2J))
            if z < -order.Z:
                with self._lock:
                    self._opposed[name] = z


def _report(found: Findings, name: str, z: float, what: str) -> None:
    found.add(
        "M27-W008", f"'{escape(name)}': {_SWAPPED}: {what} are opposed, {-z:.1f} standard deviations from chance",
        tensor=name, found=f"{z:.1f} standard deviations", expected="no less than -6", badness=-z,
    )  # fmt: skip
