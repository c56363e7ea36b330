"""NVFP4 matrices for tests of products, and every implementation that a CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m27quant.kernels import cpu_level, native
from m27quant.kernels.nvfp4_pack import PackedNVFP4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
IMPLEMENTATIONS = ("reference", *cpu_level.LEVELS)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one implementation; those that this machine does not have are skipped."""
    name: str = request.param
    if name == "reference":
        monkeypatch.setenv("M27QUANT_KERNELS", "reference")
        return name
    if error := native.load().error:
        pytest.skip(error)
    if name not in cpu_level.available():
        pytest.skip(f"needs a processor with {name}")
    monkeypatch.setenv(cpu_level.ENVIRONMENT_VARIABLE, name)
    return name


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def finite_scales() -> Tensor:
    """All 254 finite E4M3 numbers, both zeros, subnormal and negative ones among them."""
    codes = torch.arange(256)
    return codes[(codes & 0x7F) != 0x7F].to(torch.uint8).view(torch.float8_e4m3fn)


def random_packed(
    N: int, K: int, *, seed: int = 0, scale_2: float = 2.0**-10, usual: bool = False
) -> PackedNVFP4:
    """Any codes under any finite block scales; `usual`: positive scales of one magnitude, as in checkpoints."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
    among = finite_scales()[64:120] if usual else finite_scales()
    index = torch.randint(0, len(among), (N, K // 16), generator=g)
    return PackedNVFP4(codes, among.view(torch.uint8)[index].view(torch.float8_e4m3fn), torch.tensor(scale_2))


def values(packed: PackedNVFP4) -> Tensor:
    """What a matrix stands for, F64 [N, K], from the definition of the format and without any rounding."""
    codes_NK = torch.stack((packed.weight & 15, packed.weight >> 4), -1).flatten(1).long()
    scale_NK = packed.weight_scale.double().repeat_interleave(16, 1)
    return torch.tensor(E2M1, dtype=torch.float64)[codes_NK] * scale_NK * packed.weight_scale_2.double()
