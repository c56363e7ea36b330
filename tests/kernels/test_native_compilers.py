"""The compiled products under every compiler at hand, with all warnings, and run, on another processor by emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = ["-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
TARGETS = {
    "gcc": (["gcc", "-O3"], []),
    "gcc-sanitized": (["gcc", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    "clang": (["clang", "-O3"], []),
    "gcc-aarch64": (["aarch64-linux-gnu-gcc", "-O3", "-static"], ["qemu-aarch64"]),
    "clang-aarch64": (["clang", "-O3", "--target=aarch64-linux-gnu", "-static"], ["qemu-aarch64"]),
}


@pytest.mark.parametrize("target", TARGETS)
def test_products(target: str, repository: Path, tmp_path: Path) -> None:
    compiler, emulator = TARGETS[target]
    needed = [compiler[0], *emulator, *(["aarch64-linux-gnu-ld"] if "aarch64" in target else [])]
    if missing := [tool for tool in needed if not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)}")
    core = repository / "src/m27quant/kernels/_native"
    sources = [
        *sorted(core.glob("nvfp4_dot_*.c")),
        *(core / f"nvfp4_{name}.c" for name in ("gemm", "moe", "rows")),
    ]
    main = repository / "tests/kernels/native/products.c"
    program = tmp_path / "products"
    subprocess.run([*compiler, *FLAGS, *sources, main, "-lm", "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
