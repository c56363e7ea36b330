"""What this machine and this installation offer, as facts that can be pasted into a public report.

No host name, no user name, no token, no device serial: paths are given relative to `~`.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import pkgutil
import platform
import re
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import m27quant

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "nvidia-modelopt",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "tokenizers",
    "numpy",
    "typer",
    "rich",
    "pydantic",
)
SIMD = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)
"""Instruction sets that the kernels care about, as Linux names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator."""

    device: str
    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The facts; `document()` is the same as plain data."""

    m27quant: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: dict[str, Any]
    memory: dict[str, int]
    limits: dict[str, float | None]
    devices: list[Device]
    kernels: list[dict[str, str]]
    hub: dict[str, Any]
    advice: list[str]
    """What the user should change, one sentence each."""

    def document(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def describe_environment() -> Environment:
    """Look at the installation and the machine; what is missing or broken is reported, not raised."""
    devices, advice = _devices()
    virtual = psutil.virtual_memory()
    return Environment(
        m27quant=m27quant.__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=" ".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        packages={name: _version(name) for name in PACKAGES},
        cpu={
            "model": _cpu_model(),
            "logical": psutil.cpu_count() or 1,
            "physical": psutil.cpu_count(logical=False),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "simd": _simd(),
        },
        memory={"total_bytes": virtual.total, "available_bytes": virtual.available},
        limits=_limits(),
        devices=devices,
        kernels=_kernels(devices),
        hub=_hub(),
        advice=advice,
    )


def anonymous(path: str | os.PathLike[str]) -> str:
    """A path without the user's name: the home folder as `~`, the name elsewhere as `<user>`."""
    text = str(path)
    home = str(Path.home())
    if home != "/" and (text == home or text.startswith(home + os.sep)):
        text = "~" + text[len(home) :]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A container's user without an entry in the password file.
        return text
    return re.sub(rf"(?<![^/]){re.escape(user)}(?![^/])", "<user>", text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in lines}


def _cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _simd() -> list[str]:
    info = _cpuinfo()
    have = set((info.get("flags") or info.get("features") or "").split())
    return [name for name in SIMD if name in have]


def _limits() -> dict[str, float | None]:
    """What the process may use, where that is less than the machine: None means no limit."""
    return {
        "memory_bytes": _cgroup_memory_bytes(),
        "address_space_bytes": _rlimit(resource.RLIMIT_AS),
        "file_size_bytes": _rlimit(resource.RLIMIT_FSIZE),
        "open_files": _rlimit(resource.RLIMIT_NOFILE),
        "cpus": _cgroup_cpus(),
    }


def _rlimit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_memory_bytes() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limit = int(text) if text.isdigit() else None
        return (
            limit if limit is not None and limit < 1 << 60 else None
        )  # v1 writes "no limit" as a huge number.
    return None


def _cgroup_cpus() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return round(int(quota) / int(period), 2) if quota.isdigit() else None


def _devices() -> tuple[list[Device], list[str]]:
    """The accelerators that torch sees, and advice where it sees fewer than the driver."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], [f"torch cannot be imported: {error}"]
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists() and torch.version.cuda is None:
            return [], ["an NVIDIA driver is here, but this torch is a CPU build: install one with CUDA"]
        return [], []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            Device(
                device=f"cuda:{index}",
                name=properties.name,
                memory_bytes=properties.total_memory,
                compute_capability=f"{properties.major}.{properties.minor}",
            )
        )
    return devices, []


def _kernels(devices: list[Device]) -> list[dict[str, str]]:
    """The backend that each operation takes on the CPU and on the first accelerator."""
    try:
        from m27quant import kernels
        from m27quant.kernels.dispatch import choose
    except (ImportError, OSError):
        return []  # No torch: said above.
    found = []
    operations = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)
    for operation in operations:
        for device in ("cpu", *(device.device for device in devices[:1])):
            choice = choose(operation, device)
            found.append(
                {"op": operation, "device": device, "backend": choice.backend, "reason": choice.reason}
            )
    return found


def _hub() -> dict[str, Any]:
    """Where the Hub's files lie and whether it may be asked; of a token only whether there is one."""
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    return {
        "HF_HOME": anonymous(home),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
        "HF_DATASETS_OFFLINE": os.environ.get("HF_DATASETS_OFFLINE"),
        "token": "set" if _has_token() else "not set",
    }


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
