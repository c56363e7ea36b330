"""Values of all scales: global, input and KV scales one by one, block scales by their codes.

Shapes: L layers, E experts, P the projections w1, w2, w3; NaN stands for a scale that is not there to be read.
E4M3 has no numpy type; its codes are compared as bytes: 0x7F and 0xFF are NaN, 0x7E is 448, 0x80 the sign.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from m27quant.checkpoint import names
from m27quant.checkpoint.config import GROUP_SIZE, M2Config
from m27quant.checkpoint.header import TensorInfo
from m27quant.progress import ProgressCallback, ignore
from m27quant.verify.collect import Findings
from m27quant.verify.plausible import check_kv_outliers, check_largest_weight, check_reciprocals
from m27quant.verify.reading import Room, read_tensors
from m27quant.verify.scale_order import check_scale_order
from m27quant.verify.stream import Meter
from m27quant.verify.view import View

W1, W2, W3 = range(3)
FALLBACK = np.float32(0.5) / np.float32(2688)
"""input_scale of an expert that modelopt never calibrated: amax 0.5."""
RAW_CODES = np.float32(448) / np.float32(2688)
"""weight_scale_2 of raw FP8 codes taken for weights."""
LOW_INPUT, LOW_WEIGHT, HIGH = 1 / 16, 1 / 64, 64.0
"""Times the median of the layer's experts."""
SILENT_S = 3.0
"""Seconds without a word: most small checkpoints are done by then."""
SATURATED_SHARE, SATURATED_COUNT = 0.1, 32
NAN, LARGEST, SIGN = 0x7F, 0x7E, 0x80
CODE_BITS = np.uint64(0x7777777777777777)
"""Of sixteen E2M1 codes all but the signs."""

Table = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def check_scales(view: View, found: Findings, progress: ProgressCallback = ignore) -> None:
    """Read every scale that has the type and shape it should have, and check its value."""
    if view.config is None:
        return
    scalars = _read_scalars(view)
    _check_values(scalars, found)
    c = view.config
    for part in ("weight_scale_2", "input_scale"):
        table_LEP = _table(scalars, c, part)
        _check_table(table_LEP, part, found)
        check_reciprocals(table_LEP, part, found)
    check_kv_outliers(scalars, c, found)
    _check_kv(scalars, c, found)
    _check_block_scales(view, scalars, found, progress)


def _right(view: View, endings: tuple[str, ...]) -> Iterable[TensorInfo]:
    """Tensors with one of these endings that are of the expected type and size, and whole in their file."""
    for name, spec in view.expected.items():
        if not name.endswith(endings) or (info := view.tensors.get(name)) is None:
            continue
        numel_is_right = info.shape == spec.shape or (not spec.shape and info.nbytes == 4)
        if (
            info.dtype == spec.dtype
            and numel_is_right
            and info.end <= view.shard_sizes.get(info.path.name, 0)
        ):
            yield info


# -- numbers ---------------------------------------------------------------------------------------


def _read_scalars(view: View) -> dict[str, np.float32]:
    infos = _right(view, (".weight_scale_2", ".input_scale", ".k_scale", ".v_scale"))
    return {info.name: np.frombuffer(data, np.dtype("<f4"))[0] for info, data in read_tensors(infos)}


def _check_values(scalars: dict[str, np.float32], found: Findings) -> None:
    values = np.fromiter(scalars.values(), np.float32, len(scalars))
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    known = list(scalars) if wrong.size else []
    for at in wrong:
        name, value = known[at], values[at]
        code = "M27-S001" if not np.isfinite(value) else "M27-S002" if value == 0 else "M27-S003"
        found.add(
            code, f"'{name}' is {value:g}", tensor=name, expected="a positive number", found=f"{value:g}"
        )


def _table(scalars: dict[str, np.float32], c: M2Config, part: str) -> Table:
    """F32 [L, E, P]; NaN for what is absent or no positive number (reported already)."""
    shape = (c.num_hidden_layers, c.num_local_experts, 3)
    missing = np.float32("nan")
    flat = (
        scalars.get(f"{names.expert(layer, expert, projection)}.{part}", missing)
        for layer in range(shape[0])
        for expert in range(shape[1])
        for projection in names.EXPERT_PROJECTIONS
    )
    table_LEP = np.fromiter(flat, np.float32, shape[0] * shape[1] * 3).reshape(shape)
    table_LEP[~(np.isfinite(table_LEP) & (table_LEP > 0))] = np.nan
    return table_LEP


def _check_table(table_LEP: Table, part: str, found: Findings) -> None:
    _check_twins(table_LEP, part, found)
    special = np.zeros(table_LEP.shape, bool)
    for value, code, what in (
        (np.float32(1.0), "M27-S007", "exactly 1.0, a default"),
        (FALLBACK, "M27-S006", "modelopt's fallback for an expert that saw no token"),
        (RAW_CODES, "M27-S008", "448/2688: the maximum of raw FP8 codes"),
    ):
        if (code == "M27-S006") != (part == "input_scale") and code != "M27-S007":
            continue
        equal = np.isclose(table_LEP, value, rtol=1e-6, atol=0)
        special |= equal
        for layer, expert, p in np.argwhere(equal):
            name = f"{names.expert(int(layer), int(expert), names.EXPERT_PROJECTIONS[p])}.{part}"
            found.add(code, f"'{name}' is {value:.7g}: {what}", tensor=name, found=f"{value:.7g}")
    _check_outliers(np.where(special, np.float32("nan"), table_LEP), part, found)


def _check_twins(table_LEP: Table, part: str, found: Findings) -> None:
    """w1 and w3 are one matrix in engines and see one input."""
    code = "M27-S004" if part == "weight_scale_2" else "M27-S005"
    a_LE, b_LE = table_LEP[..., W1], table_LEP[..., W3]
    differ_LE = (a_LE != b_LE) & ~np.isnan(a_LE) & ~np.isnan(b_LE)
    for layer, expert in np.argwhere(differ_LE):
        w3 = f"{names.expert(int(layer), int(expert), 'w3')}.{part}"
        a, b = a_LE[layer, expert], b_LE[layer, expert]
        found.add(
            code, f"'{w3}' is {b:.7g}, w1's is {a:.7g}",
            tensor=w3, expected=f"{a:.7g}", found=f"{b:.7g}", badness=float(abs(np.log(b / a))),
        )  # fmt: skip


def _check_outliers(table_LEP: Table, part: str, found: Findings) -> None:
    """Against the median of the layer's experts, projection by projection."""
    low, low_code = (LOW_INPUT, "M27-S009") if part == "input_scale" else (LOW_WEIGHT, "M27-S011")
    for layer, of_layer_EP in enumerate(table_LEP):
        for p, projection in enumerate(names.EXPERT_PROJECTIONS):
            of_experts_E = of_layer_EP[:, p]
            there_E = ~np.isnan(of_experts_E)
            if there_E.sum() < 3:
                continue
            median = np.median(of_experts_E[there_E])
            ratio_E = np.where(there_E, of_experts_E / median, 1)
            for expert in np.flatnonzero((ratio_E < low) | (ratio_E > HIGH)):
                ratio = float(ratio_E[expert])
                name = f"{names.expert(layer, int(expert), projection)}.{part}"
                found.add(
                    low_code if ratio < low else "M27-S010",
                    f"'{name}' is {of_experts_E[expert]:.4g}, {ratio:.3g} times the layer's median {median:.4g}",
                    tensor=name, expected=f"about {median:.4g}", found=f"{of_experts_E[expert]:.4g}",
                    badness=abs(float(np.log(ratio))),
                )  # fmt: skip


def _check_kv(scalars: dict[str, np.float32], c: M2Config, found: Findings) -> None:
    kv = [n for layer in range(c.num_hidden_layers) for n in (names.k_scale(layer), names.v_scale(layer))]
    values = [scalars[name] for name in kv if name in scalars]
    if values and all(value == 1 for value in values):
        found.add(
            "M27-S016", f"all {len(values):,} KV scales are 1.0 ('{kv[0]}' ...)", tensor=kv[0], found="1.0"
        )


# -- block scales ----------------------------------------------------------------------------------


def _check_block_scales(
    view: View, scalars: dict[str, np.float32], found: Findings, progress: ProgressCallback
) -> None:
    infos = list(_right(view, (".weight_scale",)))
    meter = Meter(sum(info.nbytes for info in infos), progress, silent_s=SILENT_S)
    room = Room()
    for info, data in read_tensors(infos):
        meter.add(info.nbytes)
        codes = np.frombuffer(data, np.uint8)
        if not codes.size:
            continue
        check_scale_order(view, info, codes.reshape(info.shape), found)
        largest = codes.max()
        check_largest_weight(info.name, int(largest), scalars.get(f"{info.name}_2"), found)
        if largest > LARGEST:
            _report_bad_codes(info, codes, found)
        if codes.min() == 0 or largest >= SIGN:
            _check_zeros(info, codes, view, found, room)
        if largest >= LARGEST:
            count = int(np.count_nonzero(codes == LARGEST))
            share = count / codes.size
            if count >= SATURATED_COUNT and share > SATURATED_SHARE:
                found.add(
                    "M27-S015", f"'{info.name}': {count:,} of {codes.size:,} block scales are 448",
                    tensor=info.name, found=f"{share:.1%}", badness=share,
                )  # fmt: skip


def _report_bad_codes(info: TensorInfo, codes: Bytes, found: Findings) -> None:
    magnitude = codes & NAN
    is_nan = magnitude == NAN
    negative = (codes >= SIGN) & ~is_nan & (magnitude != 0)
    for code, places, what in (("M27-S012", is_nan, "NaN"), ("M27-S013", negative, "negative")):
        if count := int(np.count_nonzero(places)):
            row, group = divmod(int(places.argmax()), info.shape[1])
            found.add(
                code, f"'{info.name}': {count:,} of {codes.size:,} block scales are {what}, first at [{row}, {group}]",
                tensor=info.name, found=f"{count:,} {what}", badness=count,
            )  # fmt: skip


def _check_zeros(info: TensorInfo, codes: Bytes, view: View, found: Findings, room: Room) -> None:
    """Zero block scales are wrong where the block's own codes are not all zero."""
    zeros = np.flatnonzero((codes & NAN) == 0)
    weight = view.tensors.get(info.name.removesuffix("_scale"))
    per_block = GROUP_SIZE // 2
    if weight is None or weight.dtype != "U8" or weight.nbytes != codes.size * per_block:
        return
    if weight.end > view.shard_sizes.get(weight.path.name, 0):
        return
    for _, data in read_tensors([weight], room):
        words = np.frombuffer(data, "<u8")  # a block each
        lost = zeros[(words[zeros] & CODE_BITS) != 0] if words.any() else zeros[:0]
        if lost.size:
            row, group = divmod(int(lost[0]), info.shape[1])
            found.add(
                "M27-S014",
                f"'{info.name}': {lost.size:,} block scales are zero under non-zero codes, first at [{row}, {group}]",
                tensor=info.name, found=f"{lost.size:,} zero", badness=lost.size,
            )  # fmt: skip
