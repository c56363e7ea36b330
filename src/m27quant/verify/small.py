"""Values of the small tensors: norms, router and its bias.  A few bytes each, and the whole layer hangs on them."""

from __future__ import annotations

import numpy as np

from m27quant.checkpoint.header import TensorInfo
from m27quant.verify.collect import Findings
from m27quant.verify.reading import read_tensors
from m27quant.verify.view import View

MAX_BYTES = 8 * 2**20
"""M2.7's largest router has 3 MiB."""
EXPONENT = np.uint16(0x7F80)
"""All ones in the last two bytes of a BF16 or F32: infinite, or no number."""
BIAS = ".e_score_correction_bias"


def check_small(view: View, found: Findings, *, finite: bool) -> None:
    """Read what is no matrix of experts, attention, embedding or head.

    `finite`: also whether there are NaN and infinities, which level full finds in its own pass.
    """
    for info, data in read_tensors(_small(view)):
        numbers = np.frombuffer(data, np.uint8).reshape(-1, 4 if info.dtype == "F32" else 2)
        if not numbers.size:
            continue
        # sign, exponent and the first bits of the mantissa are in the last two bytes, whatever the type
        top = numbers[:, -2:].copy().view("<u2")[:, 0]
        exponent = top & EXPONENT
        zero = ((numbers[:, :-1] == 0).all(axis=1)) & (numbers[:, -1] & 0x7F == 0)
        if finite and (bad := exponent == EXPONENT).any():
            where = [int(n) for n in np.unravel_index(int(bad.argmax()), info.shape)]
            found.add(
                "M27-W005",
                f"'{info.name}' holds {int(bad.sum()):,} NaN or infinite values, the first at {where}",
                tensor=info.name, found=f"{int(bad.sum()):,} of {bad.size:,}", badness=float(bad.sum()),
            )  # fmt: skip
        if zero.all() and not info.name.endswith(BIAS):
            found.add("M27-W007", f"'{info.name}' is all zero", tensor=info.name, found="zeros")


def _small(view: View) -> list[TensorInfo]:
    return [
        info
        for name, spec in view.expected.items()
        if name.endswith(("norm.weight", ".gate.weight", BIAS))
        and (info := view.tensors.get(name)) is not None
        and info.dtype in ("BF16", "F32")
        and info.shape == spec.shape
        and info.nbytes <= MAX_BYTES
        and info.end <= view.shard_sizes.get(info.path.name, 0)
    ]
