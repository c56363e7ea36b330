"""The compiled core under every compiler at hand, with all warnings, and by emulation: products, searches, feedback."""

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
    core = repository / "src/m27quant/kernels/_native"
    sources = [
        *sorted(core.glob("nvfp4_dot_*.c")),
        *(core / f"nvfp4_{name}.c" for name in ("gemm", "moe", "rows")),
    ]
    build_and_run(
        target, [*sources, repository / "tests/kernels/native/products.c"], [], tmp_path / "products"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_search(target: str, repository: Path, tmp_path: Path) -> None:
    core = repository / "src/m27quant/kernels/_native"
    sources = [core / "nvfp4_search_fp8.c", repository / "tests/kernels/native/search.c"]
    build_and_run(target, sources, ["-Wno-psabi", f"-I{core}"], tmp_path / "search")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "gcc"])
def test_gptq(target: str, repository: Path, tmp_path: Path) -> None:
    """What gcc makes of it is compared with torch, in test_nvfp4_gptq.py."""
    core = repository / "src/m27quant/kernels/_native"
    sources = [core / f"{name}.c" for name in ("nvfp4_gptq", "cholesky", "nvfp4_search", "nvfp4_search_fp8")]
    program = repository / "tests/kernels/native/gptq.c"
    build_and_run(target, [*sources, program], ["-Wno-psabi", f"-I{core}"], tmp_path / "gptq")


def build_and_run(target: str, sources: list[Path], options: list[str], program: Path) -> None:
    compiler, emulator = TARGETS[target]
    needed = [compiler[0], *emulator, *(["aarch64-linux-gnu-ld"] if "aarch64" in target else [])]
    if missing := [tool for tool in needed if not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)}")
    subprocess.run([*compiler, *FLAGS, *options, *sources, "-lm", "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
