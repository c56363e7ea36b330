"""All matrices' outcomes together: what a difference means depends on how the others were made."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

from m27quant.verify.collect import Findings
from m27quant.verify.difference import Kind, Outcome

CODES: dict[Kind, str] = {
    "nibbles": "M27-W010",
    "swizzled": "M27-W011",
    "reciprocal": "M27-W012",
    "global scale": "M27-W013",
    "another matrix": "M27-W014",
    "far": "M27-W016",
    "better scales": "M27-W025",
    "not as measured": "M27-W028",
}
WORDS: dict[Kind, str] = {
    "nibbles": "has its nibbles swapped",
    "swizzled": "has swizzled block scales",
    "reciprocal": "has a reciprocal global scale",
    "global scale": "has the codes of another global scale",
    "another matrix": "is not the source's",
    "far": "is not the source's",
    "bytes": "differs from an exact re-quantization",
    "another amax": "was quantized under another maximum",
    "better scales": "has blocks with a better scale than theirs",
    "scales as stored": "is the nearest to the source under the block scales that it has",
    "as measured": "is as far from the source as its report says",
    "not as measured": "is not as far from the source as its report says",
}
SOUND: tuple[Kind, ...] = ("exact", "scales as stored", "as measured")
"""Nothing is wrong with these, as far as can be told."""
EXACT_SHARE = 0.5
"""Of matrices: above it the recipe is max-calibrated, and whatever differs was damaged."""


class Outcomes:
    """Of all matrices that were compared."""

    def __init__(self) -> None:
        self._kinds: Counter[Kind] = Counter()
        self._sqnr: defaultdict[int, list[float]] = defaultdict(list)
        self._different: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """One matrix."""
        self._kinds[outcome.kind] += 1
        if outcome.sqnr_db is not None:
            self._sqnr[outcome.layer].append(outcome.sqnr_db)
        if outcome.kind not in SOUND:
            self._different.append(outcome)

    def report(self, found: Findings) -> None:
        """A finding for every matrix that is not exact, the worst of a layer first."""
        stored, measured = self._kinds["scales as stored"], self._kinds["as measured"]
        exact = sum(self._kinds[kind] for kind in SOUND) > EXACT_SHARE * self._kinds.total()
        if measured:
            found.add(
                "M27-W027",
                f"{measured:,} of {self._kinds.total():,} matrices: weight_scale_2 is the source's, and the SQNR "
                "against the source is what the report says of each; that the rounding is the one of least output "
                "error was not checked: the Hessians are the calibration's, and no file of the checkpoint",
                found=measured,
            )
        if stored:
            found.add(
                "M27-W026",
                f"{stored:,} of {self._kinds.total():,} matrices: weight_scale_2 is the source's, and each code is the "
                "nearest to the source's value under the block scale that is stored; whether another block scale has "
                "less weighted error was not checked: the weights are the calibration's, and no file of the "
                "checkpoint",
                found=stored,
            )
        for outcome in sorted(self._different, key=lambda o: o.module):
            found.add(
                _code(outcome.kind, exact),
                f"'{outcome.module}.weight' {WORDS[outcome.kind]}: {outcome.detail}",
                tensor=f"{outcome.module}.weight",
                found=WORDS[outcome.kind],
                badness=-outcome.sqnr_db if outcome.sqnr_db is not None else 0.0,
            )

    def facts(self) -> dict[str, Any]:
        """Counts, and mean and least SQNR by layer."""
        return {
            "matrices": self._kinds.total(),
            "exact": self._kinds["exact"],
            **({"nearest_codes": stored} if (stored := self._kinds["scales as stored"]) else {}),
            **({"as_measured": measured} if (measured := self._kinds["as measured"]) else {}),
            "sqnr_db": _mean_min([v for values in self._sqnr.values() for v in values]),
            "layers": [{"layer": layer, **_mean_min(self._sqnr[layer])} for layer in sorted(self._sqnr)],
        }


def _code(kind: Kind, exact: bool) -> str:
    if kind in CODES:
        return CODES[kind]
    if kind == "bytes" and exact:
        return "M27-W015"
    return "M27-W023" if exact else "M27-W017"


def _mean_min(values: list[float]) -> dict[str, float | None]:
    """Rounded to 0.001 dB; None where there is no finite one."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return {"mean": None, "min": None}
    return {"mean": round(statistics.fmean(finite), 3), "min": round(min(finite), 3)}
