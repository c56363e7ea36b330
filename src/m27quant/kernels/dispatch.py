"""Which implementation of an operation runs on a device, and why.

All implementations of an operation give the same bytes, so the choice is one of speed alone.
`M27QUANT_KERNELS=reference` forces plain torch everywhere.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch

from m27quant.kernels import chip as chips
from m27quant.kernels import cpu_level, native

Backend = Literal["reference", "cpu-native", "triton"]

ENVIRONMENT_VARIABLE = "M27QUANT_KERNELS"

_COMPILED = frozenset(
    {
        *("nvfp4_pack", "nvfp4_gptq", "nvfp4_stats", "fp8_dequant", "nvfp4_quantize"),
        *("fp8_kv_attention", "rms_norm", "rotary", "router"),
    }
)
"""Operations with a compiled CPU implementation."""

_COMPILED_BY_LEVEL = frozenset({"nvfp4_gemm", "nvfp4_moe", "linear"})
"""Those whose inner loops are written for one instruction set each."""

_TRITON = frozenset({"nvfp4_pack", "nvfp4_gptq", "nvfp4_quantize", "rms_norm", "rotary"})
"""Operations with a Triton implementation for CUDA."""

_SUMS = frozenset({"linear", "router", "fp8_kv_attention"})
"""Those in Triton that multiply in BF16 or F32, which takes a chip with BF16 tensor cores."""

_PRODUCTS = frozenset({"nvfp4_gemm", "nvfp4_moe"})
"""Those in Triton that multiply on tensor cores, on chips that have the right ones."""


class Choice(NamedTuple):
    """The implementation taken and the reason, in words for `m27quant env`."""

    backend: Backend
    reason: str


def choose(op: str, device: torch.device | str) -> Choice:
    """The backend that `op` (a folder of `m27quant.kernels`) takes on `device`."""
    wish = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if wish == "reference":
        return Choice("reference", f"{ENVIRONMENT_VARIABLE}=reference")
    if wish:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} may be 'reference' or unset")
    kind = torch.device(device).type
    if kind == "cpu" and op in _COMPILED | _COMPILED_BY_LEVEL:
        library = native.load()
        if library.error is None:
            isa = cpu_level.name() if op in _COMPILED_BY_LEVEL else library.isa
            return Choice("cpu-native", f"compiled core, {isa}, {torch.get_num_threads()} threads")
        return Choice("reference", library.error)
    if kind == "cuda" and op in _PRODUCTS:
        return _tensor_cores(torch.device(device))
    if kind == "cuda" and op in _SUMS:
        return _sums(torch.device(device))
    if kind == "cuda" and op in _TRITON:
        return _triton()
    return Choice("reference", f"plain torch on {kind}")


def _triton() -> Choice:
    try:
        import triton
    except ImportError as error:
        return Choice("reference", f"Triton cannot be imported: {error}")
    return Choice("triton", f"Triton {triton.__version__}")


def _sums(device: torch.device) -> Choice:
    choice = _triton()
    if choice.backend != "triton":
        return choice
    missing = chips.why_not_triton(chips.of(device), chips.triton_version())
    return Choice("reference", missing) if missing else choice


def _tensor_cores(device: torch.device) -> Choice:
    choice = _triton()
    if choice.backend != "triton":
        return choice
    if torch.version.hip:
        return Choice("reference", "the kernels hold PTX, which AMD's chips do not run")
    chip, version = chips.of(device), chips.triton_version()
    if missing := chips.why_not_triton(chip, version):
        return Choice("reference", missing)
    missing = chips.why_not_fp4(chip, version)
    w4a4 = f"W4A4 in BF16, {missing}" if missing else f"W4A4 on FP4 tensor cores of {chip.name}"
    return Choice("triton", f"{choice.reason}: {w4a4}")
