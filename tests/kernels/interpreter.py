"""Running Triton kernels on a CPU: in a process of its own, as Triton reads TRITON_INTERPRET when it is imported.

A test module `tests.kernels.test_OP_gpu` has a function `check(case)` and names its cases; `run` calls it for each in
a fresh interpreter.  `products_of(arch)` makes the package take, there, what it would take on that chip.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch

from m27quant.kernels import chip as chips
from m27quant.kernels import nvfp4_gemm, nvfp4_moe
from m27quant.kernels.dispatch import Choice
from tests.kernels.poison import poison


def run(module: str, cases: Sequence[str], *, timeout: int = 240) -> None:
    """Call `module.check(case)` for each case in one process with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = (
        f"import sys, warnings, torch; warnings.simplefilter('ignore'); from {module} import check\n"
        "for case in sys.argv[1:]: torch.manual_seed(0); check(case)"
    )
    command = [sys.executable, "-c", script, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


@contextlib.contextmanager
def products_of(arch: int) -> Iterator[None]:
    """Inside, NVFP4 products on CPU tensors run in Triton as on a chip, in poisoned memory."""
    triton = Choice("triton", "interpreter")
    with (
        pytest.MonkeyPatch.context() as patches,
        mock.patch.object(chips, "of", return_value=chips.chip(arch)),
        mock.patch.object(nvfp4_gemm, "choose", return_value=triton),
        mock.patch.object(nvfp4_moe, "choose", return_value=triton),
    ):
        poison(patches)
        yield


@contextlib.contextmanager
def hardware() -> Iterator[torch.device]:
    """The CUDA device, with poisoned memory."""
    with pytest.MonkeyPatch.context() as patches:
        poison(patches)
        yield torch.device("cuda")
