"""One packed matrix against its source: equal to a re-quantization, or how it differs and by which mistake.

Shapes: N out features, K in features, G = K/16 groups, R rows of a sample, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.source import Source
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.nvfp4_pack import Exact, PackedNVFP4, SquaredError
from m27quant.kernels.nvfp4_pack.reference import bf16_rows, encode, global_scale, groups
from m27quant.pack import Naming
from m27quant.recipes.algorithm import Method

Kind = Literal[
    "exact",
    "nibbles",
    "swizzled",
    "reciprocal",
    "global scale",
    "another matrix",
    "far",
    "bytes",
    "another amax",
    "better scales",
    "scales as stored",
    "as measured",
    "not as measured",
]
FAR_DB = 10.0
"""Below it the values are not the source's: NVFP4 has about 20 dB."""
AS_MEASURED_DB = 0.002
"""The report rounds to 0.001 dB."""
BETTER_DB = 6.0
"""What undoing a mistake must gain."""
SAME_COSINE = 0.9
SAMPLE_ROWS = 4
TILE_ROWS, TILE_COLUMNS = 128, 4
"""Of the layout in which kernels want block scales."""


@dataclass(slots=True)
class Matrix:
    """A packed matrix and what it was made from."""

    module: str
    layer: int
    expert: int
    projection: str
    weight: torch.Tensor
    """The source's, FP8 or BF16 [N, K]."""
    scale_inv: torch.Tensor | None
    block: tuple[int, int]
    packed: PackedNVFP4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comparing one matrix gave."""

    module: str
    layer: int
    kind: Kind
    sqnr_db: float | None
    """None where the source is all zero and nothing was lost."""
    detail: str = ""
    """Figures of the difference, for people."""
    figures: dict[str, float | int] = field(default_factory=dict)


def diagnose(
    source: Source,
    m: Matrix,
    amax: torch.Tensor,
    scales: Method = "max",
    recorded_db: float | None = None,
) -> Outcome:
    """Quantize a matrix that is not exact again.

    `amax` is the largest magnitude of the matrices that share a global scale, `scales` how block scales are chosen.
    Where weights from a calibration chose them (awmse), which no checkpoint holds, they are taken as they are.  Codes
    that a calibration's Hessians chose (gptq) are not repeated: their SQNR must be `recorded_db`, the report's.
    """
    if scales == "gptq":
        return _fed_back(source, m, amax, recorded_db)
    with Naming(m.module):
        if scales == "awmse":
            again = _under_its_scales(m, amax)
        else:
            again = nvfp4_pack.pack(m.weight, m.scale_inv, amax=amax, block=m.block, scales=scales)
    same_codes = same_bytes(m.packed.weight, again.weight)
    same_scales = same_bytes(m.packed.weight_scale, again.weight_scale)
    same_global = bool(m.packed.weight_scale_2 == again.weight_scale_2)
    sqnr_db = _sqnr_db(m, m.packed)
    here, there = float(m.packed.weight_scale_2), float(again.weight_scale_2)
    of_globals = f"weight_scale_2 is {here:.7g}, the source gives {there:.7g}"
    if scales == "awmse" and same_codes and same_global:
        near = sqnr_db is None or sqnr_db >= FAR_DB
        return Outcome(
            m.module, m.layer, "scales as stored" if near else "far", sqnr_db, f"SQNR {sqnr_db} dB"
        )
    if same_codes and same_scales:
        kind: Kind = "reciprocal" if math.isclose(here, 1 / there, rel_tol=1e-3) else "global scale"
        return Outcome(m.module, m.layer, kind, sqnr_db, of_globals)
    if scales == "mse" and same_global and _is_consistent(m):
        return _least_errors(m, again, sqnr_db)
    kind, detail = _mistake(source, m, again, sqnr_db)
    if kind == "another amax" and same_global:
        kind = "bytes"
    elif kind == "another amax":
        detail = f"{of_globals}; {detail}"
    return Outcome(m.module, m.layer, kind, sqnr_db, detail)


def _fed_back(source: Source, m: Matrix, amax: torch.Tensor, recorded_db: float | None) -> Outcome:
    """What can be said whatever the Hessians were: the global scale, and how far the values are from the source's."""
    with Naming(m.module):
        again = nvfp4_pack.pack(m.weight, m.scale_inv, amax=amax, block=m.block)
    sqnr_db = _sqnr_db(m, m.packed)
    here, there = float(m.packed.weight_scale_2), float(again.weight_scale_2)
    is_far = sqnr_db is not None and sqnr_db < FAR_DB
    if is_far or here != there:
        kind, detail = _mistake(source, m, again, sqnr_db)
        if kind == "another amax":
            detail = f"weight_scale_2 is {here:.7g}, the source gives {there:.7g}; {detail}"
        return Outcome(m.module, m.layer, kind, sqnr_db, detail)
    off = None if sqnr_db is None or recorded_db is None else abs(sqnr_db - recorded_db)
    if (off is not None and off <= AS_MEASURED_DB) or sqnr_db is None:
        return Outcome(m.module, m.layer, "as measured", sqnr_db)
    said = "nothing" if recorded_db is None else f"{recorded_db:.3f} dB"
    return Outcome(
        m.module, m.layer, "not as measured", sqnr_db, f"SQNR {sqnr_db:.3f} dB, the report says {said}"
    )


def _is_consistent(m: Matrix) -> bool:
    """Whether the codes are what the source's values become under the scales that are there."""
    return same_bytes(m.packed.weight, _codes(m, m.packed.weight_scale_2))


def _under_its_scales(m: Matrix, amax: torch.Tensor) -> PackedNVFP4:
    """The source's values under the block scales that are there and the global scale that `amax` gives."""
    scale_2 = global_scale(amax)
    return PackedNVFP4(_codes(m, scale_2), m.packed.weight_scale, scale_2)


def _codes(m: Matrix, scale_2: torch.Tensor) -> torch.Tensor:
    x_NK = bf16_rows(m.weight, m.scale_inv, slice(0, m.weight.shape[0]), m.block).float()
    return encode(groups(x_NK), m.packed.weight_scale, scale_2).contiguous()


def _least_errors(m: Matrix, again: PackedNVFP4, sqnr_db: float | None) -> Outcome:
    """Sound codes under other block scales than the best ones: how many blocks would lose less under another."""
    mine_NG, best_NG = (
        nvfp4_pack.group_errors(m.weight, m.scale_inv, packed, block=m.block) for packed in (m.packed, again)
    )
    worse_NG = mine_NG > best_NG
    count = int(worse_NG.sum())
    if not count:  # equal errors, and the other one of two scales
        return Outcome(m.module, m.layer, "exact", sqnr_db)
    row, group = divmod(int(worse_NG.flatten().int().argmax()), worse_NG.shape[1])
    best_db = _sqnr_db(m, again)
    return Outcome(
        m.module, m.layer, "better scales", sqnr_db,
        f"{count:,} of {worse_NG.numel():,} blocks, first at [{row}, {group}]; SQNR "
        f"{-math.inf if sqnr_db is None else sqnr_db:.3f} dB, {-math.inf if best_db is None else best_db:.3f} dB "
        "with the best scales",
    )  # fmt: skip


def proven(module: str, layer: int, exact: Exact) -> Outcome:
    """Of a matrix that is exact."""
    return Outcome(module, layer, "exact", _decibels(exact.error))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit; both contiguous on the CPU."""
    return bool(np.array_equal(_words(a), _words(b)))


def _words(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.view(torch.uint8).view(-1).numpy()
    return array.view(np.uint64) if array.size % 8 == 0 else array


def _mistake(source: Source, m: Matrix, again: PackedNVFP4, sqnr_db: float | None) -> tuple[Kind, str]:
    """The mistake that explains a matrix whose codes or block scales are not the expected ones."""
    now = -math.inf if sqnr_db is None else sqnr_db
    undone = {kind: _sqnr_db(m, packed) for kind, packed in _without_mistake(m.packed).items()}
    kind, best = max(undone.items(), key=lambda item: -math.inf if item[1] is None else item[1])
    if best is not None and best >= max(FAR_DB, now + BETTER_DB):
        return kind, f"SQNR {now:.1f} dB as it is, {best:.1f} dB with the mistake undone"
    detail = _figures(m, again, now)
    if now >= FAR_DB:
        return "another amax", detail
    other = _belongs_to(source, m)
    if other is not None:
        return "another matrix", f"holds the weights of '{other}'; {detail}"
    return "far", detail


def _without_mistake(packed: PackedNVFP4) -> dict[Kind, PackedNVFP4]:
    """The matrix with one mistake undone, for each that is known."""
    codes, scale, scale_2 = packed
    found: dict[Kind, PackedNVFP4] = {
        "nibbles": packed._replace(weight=(codes << 4) | (codes >> 4)),
        "reciprocal": packed._replace(weight_scale_2=1 / scale_2),
    }
    n, g = scale.shape
    if n % TILE_ROWS == 0 and g % TILE_COLUMNS == 0:
        found["swizzled"] = packed._replace(weight_scale=unswizzle(scale))
    return found


def swizzle(scale_NG: torch.Tensor) -> torch.Tensor:
    """Block scales in the 128x4 tiles of Blackwell's kernels, in the same shape (CUTLASS' layout SFA)."""
    n, g = scale_NG.shape
    tiles = scale_NG.view(torch.uint8).view(n // TILE_ROWS, 4, 32, g // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(n, g).view(scale_NG.dtype)


def unswizzle(scale_NG: torch.Tensor) -> torch.Tensor:
    """The inverse of `swizzle`."""
    n, g = scale_NG.shape
    tiles = scale_NG.view(torch.uint8).view(n // TILE_ROWS, g // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(n, g).view(scale_NG.dtype)


def _sqnr_db(m: Matrix, packed: PackedNVFP4) -> float | None:
    return _decibels(nvfp4_pack.squared_error(m.weight, m.scale_inv, packed, block=m.block))


def _decibels(error: SquaredError) -> float | None:
    if not error.signal and not error.noise:
        return None
    if not error.signal or not math.isfinite(error.noise):
        return -math.inf
    return error.sqnr_db


def _figures(m: Matrix, again: PackedNVFP4, sqnr_db: float) -> str:
    """Bytes that differ and where, SQNR, cosine, the worst block of 16."""
    codes_N = (m.packed.weight != again.weight).sum(1)
    scales_NG = m.packed.weight_scale.view(torch.uint8) != again.weight_scale.view(torch.uint8)
    rows = torch.nonzero((codes_N > 0) | scales_NG.any(1)).flatten()
    x_NK = bf16_rows(m.weight, m.scale_inv, slice(0, m.weight.shape[0]), m.block).float()
    y_NK = nvfp4_pack.unpack(m.packed)
    cosine = float(torch.nn.functional.cosine_similarity(x_NK.flatten(), y_NK.flatten(), dim=0))
    worst_NG = (x_NK - y_NK).square_().view(x_NK.shape[0], -1, nvfp4_pack.GROUP).sum(-1).nan_to_num(torch.inf)
    row, group = divmod(int(worst_NG.argmax()), worst_NG.shape[1])
    return (
        f"{int(codes_N.sum()):,} bytes of codes and {int(scales_NG.sum()):,} block scales differ, from row "
        f"{int(rows[0])} on; SQNR {sqnr_db:.1f} dB, cosine {cosine:.4f}, worst block [{row}, {group}]"
    )


# -- whose weights are these -----------------------------------------------------------------------


def _belongs_to(source: Source, m: Matrix) -> str | None:
    """The module whose weights these are, by a sample of rows: another of the layer, or the same of another layer."""
    rows = min(SAMPLE_ROWS, m.block[0], m.weight.shape[0])
    codes, scale, scale_2 = m.packed
    mine_R = nvfp4_pack.unpack(PackedNVFP4(codes[:rows], scale[:rows], scale_2)).flatten().nan_to_num()
    for module in _candidates(source, m):
        theirs_R = _sample(source, module, rows, m.block).flatten()
        if torch.nn.functional.cosine_similarity(mine_R, theirs_R, dim=0) > SAME_COSINE:
            return module
    return None


def _candidates(source: Source, m: Matrix) -> Iterator[str]:
    """Of the same shape, the likeliest first; `m` itself is left out."""
    alike = ("w2",) if m.projection == "w2" else ("w1", "w3")
    experts, layers = source.config.num_local_experts, source.config.num_hidden_layers
    yield from (names.expert(m.layer, m.expert, p) for p in alike if p != m.projection)
    yield from (names.expert(m.layer, e, p) for p in alike for e in range(experts) if e != m.expert)
    yield from (names.expert(n, m.expert, m.projection) for n in range(layers) if n != m.layer)


def _sample(source: Source, module: str, rows: int, block: tuple[int, int]) -> torch.Tensor:
    """The first rows of a source matrix, F32 [R, K]."""
    weight = source.read_rows(f"{module}.weight", 0, rows)
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    scale = source.read_rows(f"{module}.weight_scale_inv", 0, 1)
    return fp8_dequant.dequantize(weight, scale, torch.float32, block)
