"""What a server counts over all its requests: Prometheus' counters of drafts, and SGLang's average."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m27quant.drafters.metrics import AcceptanceStats
from m27quant.errors import EnvironmentFault, UsageError

PREFIXES = ("m27quant:", "vllm:")
"""Servers whose counters have vLLM's names behind these."""
MAX_POSITIONS = 4096
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", re.ASCII)
_POSITION = re.compile(r'(?:^|,)position="(\d{1,4})"', re.ASCII)


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over all series of a name; what only grows."""

    prefix: str
    num_drafts: float
    num_draft_tokens: float
    num_accepted_tokens: float
    per_position: Mapping[int, float] = field(default_factory=dict)
    generation_tokens: float | None = None

    def since(self, before: Counters | None) -> AcceptanceStats:
        """What was counted in between.

        Raises:
            EnvironmentFault: counters went back, or do not fit each other.
        """
        b = before or Counters(self.prefix, 0, 0, 0)
        drafts = _grown(self.num_drafts - b.num_drafts)
        drafted = _grown(self.num_draft_tokens - b.num_draft_tokens)
        accepted = _grown(self.num_accepted_tokens - b.num_accepted_tokens)
        most = max(self.per_position, default=-1) + 1
        positions = [_grown(self.per_position.get(k, 0) - b.per_position.get(k, 0)) for k in range(most)]
        if sum(positions) != accepted:
            raise EnvironmentFault(
                f"the server accepted {accepted} drafts, by position {sum(positions)}: its counters do not agree",
                hint="measure a server that has no other requests",
            )
        try:
            return AcceptanceStats.of_positions(drafts, positions, drafted)
        except UsageError as fault:
            raise EnvironmentFault(f"the server's counters do not agree: {fault.message}") from None


def _grown(difference: float) -> int:
    if difference < 0 or difference != int(difference):
        raise EnvironmentFault(
            "the server's counters went back while it was measured",
            hint="did it start anew?  run the benchmark again",
        )
    return int(difference)


def parse_counters(text: str) -> Counters | None:
    """The spec_decode counters in Prometheus' text format; None where there are none."""
    sums: dict[str, float] = {}
    positions: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.match(line)
        if match is None:
            continue
        name, labels, number = match.groups()
        value = _float(number)
        if value is None or not name.startswith(PREFIXES):
            continue
        sums[name] = sums.get(name, 0.0) + value
        place = _POSITION.search(labels or "")
        if place is not None and int(place[1]) < MAX_POSITIONS:
            of_name = positions.setdefault(name, {})
            of_name[int(place[1])] = of_name.get(int(place[1]), 0.0) + value
    for prefix in PREFIXES:
        drafts = f"{prefix}spec_decode_num_drafts_total"
        if drafts in sums:
            name = f"{prefix}spec_decode_num_accepted_tokens"
            return Counters(
                prefix,
                sums[drafts],
                sums.get(f"{prefix}spec_decode_num_draft_tokens_total", 0.0),
                sums.get(f"{name}_total", 0.0),
                positions.get(f"{name}_per_pos_total", {}),
                sums.get(f"{prefix}generation_tokens_total"),
            )
    return None


def sglang_gauge(text: str) -> float | None:
    """The mean of `sglang:spec_accept_length` over series: of the last log interval, a last resort."""
    values = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match and match[1] == "sglang:spec_accept_length" and (value := _float(match[3])):
            values.append(value)
    return sum(values) / len(values) if values else None


def sglang_average(document: bytes) -> float | None:
    """`avg_spec_accept_length` of GET /get_server_info, the mean over its schedulers; None where it has none."""
    try:
        found: Any = json.loads(document)
    except (ValueError, RecursionError):
        return None
    states = found.get("internal_states") if isinstance(found, dict) else None
    values = [s.get("avg_spec_accept_length") for s in states or () if isinstance(s, dict)]
    good = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v >= 1]
    return sum(good) / len(good) if good else None


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
