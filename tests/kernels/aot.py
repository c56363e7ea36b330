"""Compiling Triton kernels for a GPU that is not there, and reading what came out.

`launches(arch)` runs a launcher as it is, on tensors of the device "meta": every kernel that it would start on that
chip is compiled exactly so (dtypes, alignment, constants, options), and recorded instead of started.

    with aot.launches(90) as compiled:
        gpu.gemm(torch.empty(8, 3072, dtype=torch.bfloat16, device="meta"), weight)
    compiled[0].check()

Triton's own ptxas, nvdisasm and cuobjdump do the rest; no driver is needed.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

from m27quant.kernels import chip as chips

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"


class Compiled:
    """One kernel, compiled for one chip."""

    def __init__(self, name: str, kernel: Any, constants: dict[str, Any], arch: int) -> None:
        self.name = name
        self.chip = chips.chip(arch)
        self.constants = constants
        """Named constants and options of the launch: tile sizes, num_warps, ..."""
        self.ptx: str = kernel.asm["ptx"]
        self.ttgir = str(kernel.asm["ttgir"])
        self.cubin: bytes = kernel.asm["cubin"]
        self.shared: int = kernel.metadata.shared
        self.tmem: int = kernel.metadata.tmem_size or 0
        self.threads: int = kernel.metadata.num_warps * 32

    def __repr__(self) -> str:
        scalars = {k: v for k, v in self.constants.items() if isinstance(v, int)}
        return f"{self.name} on {self.chip.name} {scalars}"

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, ... of the kernel, as the assembler counted them."""
        text = self._tool("cuobjdump", "--dump-resource-usage")
        line = text[text.index("Function ") :].splitlines()[1]
        return {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[0\])?:(\d+)", line)}

    @property
    def registers(self) -> int:
        return self.resources["REG"]

    @property
    def spills(self) -> int:
        """Bytes of stack of a thread: these kernels have no arrays, so all of it is spilled registers."""
        return self.resources["STACK"] + self.resources["LOCAL"]

    @functools.cached_property
    def sass(self) -> str:
        """The machine code (about a second)."""
        return self._tool("nvdisasm")

    def count(self, pattern: str) -> int:
        """How many instructions of the PTX match."""
        return len(re.findall(pattern, self.ptx))

    @property
    def has_fp4(self) -> bool:
        """Multiplies on FP4 tensor cores."""
        return "kind::mxf4nvf4" in self.ptx

    @property
    def has_wgmma(self) -> bool:
        """Multiplies on Hopper's tensor cores as a warp group."""
        return "wgmma.mma_async" in self.ptx

    @property
    def wgmma_from_registers(self) -> bool:
        """Every warp-group product takes its left operand from registers: two lists in braces, not one."""
        lines = [line for line in self.ptx.splitlines() if "wgmma.mma_async" in line]
        return bool(lines) and all(line.count("{") >= 2 for line in lines)

    def faults(self) -> list[str]:
        """What keeps this kernel from running well on its chip, in words; empty if nothing does."""
        found = []
        if re.search(r"\btrap;", self.ptx):
            found.append("its body is a trap: Triton gave up silently")
        if self.shared > self.chip.shared:
            found.append(f"{self.shared} bytes of shared memory, the chip has {self.chip.shared}")
        if self.tmem > chips.TMEM_COLUMNS:
            found.append(f"{self.tmem} columns of tensor memory, the chip has {chips.TMEM_COLUMNS}")
        if self.spills:
            found.append(f"{self.spills} bytes of a thread's registers are spilled")
        if f".target {self.chip.name}" not in self.ptx:
            found.append(f"compiled for another target than {self.chip.name}")
        return found

    def check(self) -> None:
        """Fail with all faults."""
        assert not self.faults(), f"{self!r}: {'; '.join(self.faults())}"

    def inner_loop(self, opcode: str = "MMA") -> list[str]:
        """The opcodes of the shortest loop of the machine code that holds `opcode` (HGMMA, HMMA, ...)."""
        labels: dict[str, int] = {}
        instructions: list[tuple[int, str, str]] = []
        waiting: list[str] = []
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                waiting.append(label.group(1))
            found = re.search(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*)", line)
            if found:
                address = int(found.group(1), 16)
                labels.update(dict.fromkeys(waiting, address))
                waiting.clear()
                instructions.append((address, found.group(2).rstrip(";"), found.group(3)))
        bodies = []
        for address, code, rest in instructions:
            target = re.search(r"\.L_x_\d+", rest)
            if code.startswith("BRA") and target and labels.get(target.group(), address + 1) <= address:
                start = labels[target.group()]
                bodies.append([c for a, c, _ in instructions if start <= a <= address])
        return min((body for body in bodies if any(opcode in c for c in body)), key=len, default=[])

    def instructions_per_weight(self, weights: int) -> float:
        """Instructions that the inner loop issues for a weight, where one pass handles `weights` in a block."""
        body = self.inner_loop()
        assert body, f"{self!r}: no loop with a matrix product"
        return len(body) * self.threads / weights

    def opcodes(self) -> dict[str, int]:
        """The inner loop's instructions by kind, the most frequent first: to see where they go."""
        return dict(collections.Counter(c.split(".")[0] for c in self.inner_loop()).most_common())

    def _tool(self, name: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            run = subprocess.run(
                [BIN / name, *options, file.name], capture_output=True, text=True, check=True
            )
        return run.stdout


class _Driver:
    """As much of a CUDA driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches(arch: int, only: str = "") -> Iterator[list[Compiled]]:
    """Inside, every launch of a Triton kernel compiles it for `arch` and is listed; nothing runs.

    `only`: kernels whose name holds this; launches of others are passed over.
    """
    compiled: list[Compiled] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        if only not in self.fn.__name__:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        compiled.append(Compiled(self.fn.__name__, kernel, constants, arch))
        return kernel

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(chips, "of", return_value=chips.chip(arch)),
    ):
        yield compiled


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of that shape with no memory behind it."""
    return torch.empty(shape, dtype=dtype, device="meta")
