"""What a CUDA chip can do, and what the installed Triton can compile for it.

The kernels' pickers ask here; nothing here touches a device except `of`.  Sources: CUDA programming guide (shared
memory of a block), PTX ISA (`kind::mxf4nvf4`), and what Triton 3.6 to 3.9 were seen to compile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

TMEM_COLUMNS = 512
"""Columns of tensor memory that a multiprocessor of sm_100 to sm_110 has."""


class Chip(NamedTuple):
    """One compute capability, as `major * 10 + minor`."""

    arch: int
    shared: int
    """Bytes of shared memory that one block may use."""
    fp4: bool
    """Has tensor cores for NVFP4."""
    tmem: bool
    """Accumulates in tensor memory (tcgen05): the M side of a product must be 128 or 256."""

    @property
    def name(self) -> str:
        """The target as ptxas calls it; the architecture-specific one where there is one."""
        return f"sm_{self.arch}" + ("a" if self.arch >= 90 else "")


_SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory for one block."""

_DOT_SCALED_SINCE = {100: (3, 6), 103: (3, 6), 110: (3, 7), 120: (3, 6), 121: (3, 8)}
"""The first Triton that compiles `tl.dot_scaled` on NVFP4 to FP4 tensor cores.  Before it, Triton aborts: its
decomposition took E4M3 scales for integers (triton#9772).  sm_100 and sm_103 worked earlier, in versions that
this package does not use."""

OLDEST_TRITON = (3, 6)
OLDEST_ARCH = 80
"""Before Ampere there is no BF16 matrix product."""


@functools.cache
def chip(arch: int) -> Chip:
    """The chip of a compute capability; an unknown one counts as the nearest older one with its own number."""
    known = max((a for a in _SHARED if a <= arch), default=75)
    family = arch // 10
    fp4 = family >= 10
    return Chip(arch, _SHARED[known] * 1024, fp4, tmem=family in (10, 11))


def of(device: torch.device) -> Chip:
    """The chip of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return chip(major * 10 + minor)


def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton.

    Raises:
        ImportError: there is none.
    """
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def why_not_triton(chip: Chip, version: tuple[int, int]) -> str | None:
    """Why the products cannot run in Triton at all; None where they can."""
    if version < OLDEST_TRITON:
        return f"Triton {version[0]}.{version[1]} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if chip.arch < OLDEST_ARCH:
        return f"{chip.name} has no BF16 matrix product"
    return None


def why_not_fp4(chip: Chip, version: tuple[int, int]) -> str | None:
    """Why FP4 tensor cores cannot be used from Triton; None where they can."""
    if not chip.fp4:
        return f"{chip.name} has no FP4 tensor cores"
    since = _DOT_SCALED_SINCE.get(chip.arch)
    if since is None:
        return f"{chip.name} is not known to this version"
    if version < since:
        return f"Triton {version[0]}.{version[1]} cannot compile NVFP4 for {chip.name}, {since[0]}.{since[1]} can"
    return None
