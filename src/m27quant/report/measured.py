"""What a checkpoint's own scale tensors say, as tables to be drawn.

Shapes: L layers, E experts, P the projections w1, w2, w3; NaN stands for what is absent or no positive number.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m27quant.checkpoint.names import EXPERT_PROJECTIONS
from m27quant.checkpoint.overview import FAMILIES
from m27quant.report.recorded import Recorded
from m27quant.verify.collect import Findings
from m27quant.verify.configs import read_configs
from m27quant.verify.container import read_container
from m27quant.verify.inventory import check_inventory
from m27quant.verify.reading import read_tensors
from m27quant.verify.view import View

Table = npt.NDArray[np.float64]
MAX_CELLS = 262_144
"""Layers times experts that a page has room for; M2.7 has 15,872."""

_EXPERT = re.compile(
    r"model\.layers\.(\d{1,6})\.block_sparse_moe\.experts\.(\d{1,6})\.(w[123])\.(weight_scale_2|input_scale)",
    re.ASCII,
)
_CACHE = re.compile(r"model\.layers\.(\d{1,6})\.self_attn\.([kv])_proj\.[kv]_scale", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was read of a checkpoint for its page."""

    weight_scale_2: Table
    """F64 [L, E, P]."""
    input_scale: Table
    """F64 [L, E, P]."""
    kv_scale: Table
    """F64 [L, 2]: keys, values."""
    bytes_by_family: dict[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts)."""
        layers, experts, _ = self.weight_scale_2.shape
        return layers, experts


def blank(layers: int = 0, experts: int = 0) -> Measured:
    """Tables in which nothing is known."""
    experts_LEP = np.full((layers, experts, len(EXPERT_PROJECTIONS)), np.nan)
    return Measured(
        weight_scale_2=experts_LEP, input_scale=experts_LEP.copy(), kv_scale=np.full((layers, 2), np.nan)
    )


def measure(folder: Path) -> Measured:
    """Read every scale that is a single F32, and how many bytes each family of tensors has.

    Raises:
        CheckpointError, EnvironmentFault: as `verify_checkpoint` does.
    """
    view = _open(folder)
    c = view.config
    fits = c is not None and c.num_hidden_layers * c.num_local_experts <= MAX_CELLS
    tables = blank(c.num_hidden_layers, c.num_local_experts) if c is not None and fits else blank()
    _fill(view, tables)
    sizes: Counter[str] = Counter()
    for name, info in view.tensors.items():
        sizes[next(kind for kind, pattern in FAMILIES.items() if pattern.search(name))] += info.nbytes
    return Measured(
        weight_scale_2=tables.weight_scale_2,
        input_scale=tables.input_scale,
        kv_scale=tables.kv_scale,
        bytes_by_family={name: sizes[name] for name in FAMILIES if sizes[name]},
    )


def _open(folder: Path) -> View:
    ignored = Findings()  # the verification beside it reports them
    view = read_container(folder, ignored)
    read_configs(view, ignored)
    check_inventory(view, ignored)
    return view


def _fill(view: View, tables: Measured) -> None:
    layers, experts = tables.shape
    infos = [
        info
        for info in view.tensors.values()
        if info.dtype == "F32"
        and info.nbytes == 4
        and info.end <= view.shard_sizes.get(info.path.name, 0)
        and info.name.endswith(("_scale", "_scale_2"))
    ]
    for info, data in read_tensors(infos):
        value = float(np.frombuffer(data, np.dtype("<f4"))[0])
        if not (np.isfinite(value) and value > 0):
            continue
        if match := _EXPERT.fullmatch(info.name):
            layer, expert = int(match[1]), int(match[2])
            if layer < layers and expert < experts:
                table = tables.weight_scale_2 if match[4] == "weight_scale_2" else tables.input_scale
                table[layer, expert, EXPERT_PROJECTIONS.index(match[3])] = value
        elif (match := _CACHE.fullmatch(info.name)) and int(match[1]) < layers:
            tables.kv_scale[int(match[1]), "kv".index(match[2])] = value


def contradictions(recorded: Recorded, measured: Measured) -> int:
    """How many scales in the report are not those in the tensors (compared as F32)."""
    count = 0
    for part in ("weight_scale_2", "input_scale"):
        told = np.array([[getattr(getattr(r, part), p) for p in EXPERT_PROJECTIONS] for r in recorded.layers])
        stored_LEP = getattr(measured, part)
        differ = told.transpose(0, 2, 1).astype(np.float32) != stored_LEP.astype(np.float32)
        count += int(np.count_nonzero(differ & ~np.isnan(stored_LEP)))
    return count
