"""calibration.json: what a calibration found in every layer, for others to pack layers by, without tokens.

Everything in it is checked when it is read: it may have come a long way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m27quant.calib.layer_ranges import LayerRanges
from m27quant.checkpoint.durable import sha256_of, write_durably
from m27quant.checkpoint.strict_json import read_object
from m27quant.errors import CheckpointError, UsageError, escape

NAME = "calibration.json"
KIND = "m27quant calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A finished calibration."""

    fingerprint: dict[str, Any]
    """Of the run that a single process would have made."""
    settings: dict[str, Any]
    """The recipe's `calibration` section, data sets by name."""
    lengths: tuple[int, ...]
    """Tokens of every row."""
    dropped: tuple[int, ...]
    notices: tuple[str, ...]
    """What was noteworthy about the data."""
    layers: tuple[LayerRanges, ...]
    sha256: str = ""
    """Of the file."""


def write_calibrated(path: Path, found: Calibrated) -> None:
    """Write `found` durably; the same content gives the same bytes."""
    content = {"kind": KIND, "version": 1, **asdict(found)}
    del content["sha256"]
    write_durably(path, (json.dumps(content, sort_keys=True) + "\n").encode())


def read_calibrated(path: Path) -> Calibrated:
    """Read what `write_calibrated` wrote.

    Raises:
        UsageError: no such file, or another kind of file.
        CheckpointError: damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"--ranges {escape(path)}: no such file",
            hint="make it with `m27quant quantize ... --calibrate-only`",
        )
    content = read_object(path)
    if content.get("kind") != KIND or content.get("version") != 1:
        raise UsageError(
            f"--ranges {escape(path)}: not a calibration of this version of m27quant",
            hint="make it with `m27quant quantize ... --calibrate-only`",
        )
    try:
        _require(isinstance(content["fingerprint"], dict) and isinstance(content["settings"], dict))
        _require(len(content["lengths"]) > 0)
        return Calibrated(
            fingerprint=content["fingerprint"],
            settings=content["settings"],
            lengths=tuple(_counts(content["lengths"])),
            dropped=tuple(_counts(content["dropped"])),
            notices=tuple(str(notice) for notice in content["notices"]),
            layers=tuple(_layer(entry) for entry in content["layers"]),
            sha256=sha256_of(path),
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise CheckpointError(
            f"{escape(path)}: damaged ({escape(fault)})", hint="copy it again, or calibrate again"
        ) from None


def _layer(entry: Mapping[str, Any]) -> LayerRanges:
    scalars = ("k_amax", "v_amax", "w13_input_amax")
    return LayerRanges(
        **dict(zip(scalars, _ranges([entry[name] for name in scalars]), strict=True)),
        w2_input_amax=_ranges(entry["w2_input_amax"]),
        routed_tokens=_counts(entry["routed_tokens"]),
        seen_tokens=_counts(entry["seen_tokens"]),
        non_finite_values=_counts([entry["non_finite_values"]])[0],
    )


def _ranges(values: Sequence[Any]) -> list[float]:
    _require(isinstance(values, list) and all(type(v) in (int, float) for v in values))
    _require(all(math.isfinite(v) and v >= 0 for v in values))
    return [float(v) for v in values]


def _counts(values: Sequence[Any]) -> list[int]:
    _require(isinstance(values, list) and all(type(v) is int and v >= 0 for v in values))
    return list(values)


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("a value of another type, or out of range")
