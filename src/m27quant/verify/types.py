"""Types and shapes of all tensors that should be there."""

from __future__ import annotations

import math

from m27quant.checkpoint.header import TensorInfo
from m27quant.checkpoint.names import TensorSpec
from m27quant.errors import escape
from m27quant.verify.collect import Findings
from m27quant.verify.view import View

SCALARS = (".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
ROUTER = (".gate.weight", ".e_score_correction_bias")
NORMS = ("norm.weight",)


def check_types(view: View, found: Findings) -> None:
    """Compare dtype and shape of every expected tensor with what its header says."""
    for name, spec in view.expected.items():
        info = view.tensors.get(name)
        if info is None or (info.dtype == spec.dtype and info.shape == spec.shape):
            continue
        if view.excused and ".experts." in name and name[name.rindex(".") :] in view.excused:
            continue
        if info.dtype == "F8_E4M3" and view.is_fp8_attention(name):
            continue
        if info.shape != spec.shape:
            _report_shape(info, spec, found)
        if info.dtype != spec.dtype:
            _report_dtype(info, spec, found)


def _report_shape(info: TensorInfo, spec: TensorSpec, found: Findings) -> None:
    code = "M27-D002"
    if spec.name.endswith(SCALARS):
        code = "M27-D006" if math.prod(info.shape) == 1 else "M27-D005"
    elif spec.name.endswith(".weight_scale") and math.prod(info.shape) == _padded(spec.shape):
        code = "M27-D007"
    expected, actual = str(list(spec.shape)), escape(list(info.shape))
    found.add(
        code, f"'{spec.name}' has shape {actual}, expected {expected}",
        tensor=spec.name, file=info.path.name, expected=expected, found=actual,
    )  # fmt: skip


def _padded(shape: tuple[int, ...]) -> int:
    """Numbers in kernels' layout of block scales: rows to a multiple of 128, columns to one of 4."""
    rows, columns = shape
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def _report_dtype(info: TensorInfo, spec: TensorSpec, found: Findings) -> None:
    name, code = spec.name, "M27-D001"
    if name.endswith(ROUTER):
        code = "M27-D003" if info.dtype in ("BF16", "F16") else code
    elif name.endswith(NORMS) and info.dtype == "F32":
        return  # exact, and a few kilobytes
    elif ".self_attn." in name and name.endswith("_proj.weight") and info.dtype == "F32":
        code = "M27-D004"
    elif name.endswith((".k_scale", ".v_scale")):
        code = "M27-D008"
    found.add(
        code, f"'{name}' is {info.dtype}, expected {spec.dtype}",
        tensor=name, file=info.path.name, expected=spec.dtype, found=info.dtype,
    )  # fmt: skip
