"""Packing of experts, as `m27quant quantize` does it, against nvidia-modelopt's own quantizer on the same tensors."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import machine
from m27quant.checkpoint import names
from m27quant.checkpoint.hub import locate
from m27quant.checkpoint.source import Source
from m27quant.checkpoint.writer import open_shards, plan_shard
from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.dispatch import choose
from m27quant.pack import Stored, bf16_buffers, read_expert, stream_experts
from m27quant.pack_stats import PackStats

Expert = dict[str, Stored]
Plain = dict[str, torch.Tensor]

GROUP_OF_EXPERTS = 4
"""At once, of 64: as many of all as 16 are of a whole layer's 256."""
FEW = 8
"""Experts that a slow operation takes."""


def open_source(model: Path) -> Source:
    return Source(locate(str(model), revision=None, offline=True, token=None))


# -- the same bytes ------------------------------------------------------------------------------


def compare_with_modelopt(model: Path, out: Path) -> int:
    """Compare every layer's first, middle and last expert in OUT with modelopt's; how many tensors were equal.

    OUT is read by the safetensors library, and the source dequantized by plain torch.
    """
    compared = 0
    files = _Checkpoint(out)
    with open_source(model) as source:
        experts = source.config.num_local_experts
        for layer in range(source.config.num_hidden_layers):
            for expert in sorted({0, experts // 2, experts - 1}):
                plain = plain_torch(read_expert(source, layer, expert, torch.device("cpu")))
                for projection, expected in modelopt_expert(plain).items():
                    for suffix, tensor in expected.items():
                        name = f"{names.expert(layer, expert, projection)}.{suffix}"
                        if not same_bytes(files.read(name), tensor):
                            sys.exit(f"{name} differs from modelopt's: nothing to time")
                        compared += 1
    return compared


class _Checkpoint:
    """Tensors of a finished checkpoint by name."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and torch.equal(left, right)


def plain_torch(stored: Expert) -> Plain:
    """BF16 weights by the plain torch formula."""
    plain = {}
    for projection, (weight, scale) in stored.items():
        assert scale is not None
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
        plain[projection] = fp8_dequant.reference.dequantize(
            weight, scale, torch.bfloat16, fp8_dequant.BLOCK, out
        )
    return plain


def modelopt_expert(plain: Plain) -> dict[str, dict[str, torch.Tensor]]:
    """What modelopt's export makes of one expert's BF16 weights: scales from amax, w1's and w3's shared."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shared = {p: NVFP4QTensor.get_weights_scaling_factor_2(w) for p, w in plain.items()}
    shared["w1"] = shared["w3"] = torch.maximum(shared["w1"], shared["w3"])
    result = {}
    for projection, weight in plain.items():
        packed, scale, scale_2 = NVFP4QTensor.quantize(
            weight, nvfp4_pack.GROUP, weights_scaling_factor_2=shared[projection]
        )
        result[projection] = {
            "weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2,
        }  # fmt: skip
    return result


# -- how fast ------------------------------------------------------------------------------------


def measure(model: Path, folder: Path, device: torch.device, experts: int, rounds: int) -> dict[str, Any]:
    """GB of FP8 per second of our packing and of modelopt's, in turns; source files are in the page cache.

    Slow operations take the first few of the experts.
    """
    with open_source(model) as source, torch.inference_mode():
        experts = min(experts, source.config.num_local_experts)
        source.config = replace(source.config, num_local_experts=experts)
        stored = [read_expert(source, 0, e, device) for e in range(min(FEW, experts))]
        plain = [plain_torch(s) for s in stored]
        buffers = bf16_buffers(source.config, device)
        paths: list[tuple[float, float]] = []
        operations: dict[str, Callable[[], object]] = {
            "whole path": lambda: paths.append(_whole_path(source, device, folder)),
            "kernel: amax and pack": lambda: _kernel(stored),
            "dequantize to BF16": lambda: _dequantize(stored, buffers),
            "dequantize in plain torch": lambda: [plain_torch(s) for s in stored],
            "modelopt (BF16 given)": lambda: [modelopt_expert(p) for p in plain],
        }
        best = machine.interleaved(operations, rounds)
    size = sum(weight.numel() for s in stored for weight, _ in s.values())
    all_bytes = size // len(stored) * experts
    rates = {
        "read, pack, write": all_bytes / min(written for written, _ in paths),
        "read, pack, write, made durable": all_bytes / min(durable for _, durable in paths),
        **{name: size / seconds for name, seconds in best.items() if name != "whole path"},
    }
    modelopt = rates["modelopt (BF16 given)"]
    return {
        "experts": experts,
        "fp8_bytes": all_bytes,
        "few_experts": len(stored),
        "rounds": rounds,
        "backend": choose("nvfp4_pack", device)._asdict(),
        "fp8_gb_per_s": {name: round(rate / 1e9, 4) for name, rate in rates.items()},
        "times_modelopt": {
            name: round(rates[name] / modelopt, 1) for name in ("kernel: amax and pack", "read, pack, write")
        },
    }


def describe(found: dict[str, Any], limits: dict[str, Any]) -> list[tuple[str, str]]:
    """Rates, as multiples of modelopt's and as shares of the machine's limits."""
    rates, times = found["fp8_gb_per_s"], found["times_modelopt"]
    lines = [
        (
            "on",
            f"{found['experts']} experts, {found['fp8_bytes'] / 1e6:.0f} MB of FP8 "
            f"(but for the path: {found['few_experts']}), {found['backend']['reason']}",
        )
    ]
    for name, rate in rates.items():
        many = f", {times[name]:.0f} times modelopt" if name in times else ""
        lines.append((name, f"{rate:.3f} GB/s{many}"))
    lines += [
        ("limit: copy in memory", f"{limits['copy_gb_per_s']:.1f} GB/s"),
        ("limit: read from disk", f"{limits['disk_read_gb_per_s']:.2f} GB/s ({limits['disk_read_how']})"),
    ]
    return lines


def _whole_path(source: Source, device: torch.device, folder: Path) -> tuple[float, float]:
    """Seconds until the product has read, packed and written the experts, and until they are durable and hashed."""
    c = source.config
    modules = [
        (names.expert(0, e, projection), shape)
        for e in range(c.num_local_experts)
        for projection, shape in names.expert_shapes(c).items()
    ]
    plan = plan_shard([spec for module, shape in modules for spec in names.nvfp4_specs(module, shape)])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        with open_shards(Path(out), "experts", [plan], []) as shards:
            for _ in stream_experts(source, 0, GROUP_OF_EXPERTS, device, shards, PackStats(), lambda: None):
                pass
            for module, _ in modules:
                shards.write(f"{module}.input_scale", torch.tensor(1.0))
            written = time.perf_counter()
        durable = time.perf_counter()
    return written - started, durable - started


def _kernel(experts: list[Expert]) -> None:
    for stored in experts:
        amax = {p: nvfp4_pack.amax(weight, scale) for p, (weight, scale) in stored.items()}
        amax["w1"] = amax["w3"] = torch.maximum(amax["w1"], amax["w3"])
        for projection, (weight, scale) in stored.items():
            nvfp4_pack.pack(weight, scale, amax=amax[projection])


def _dequantize(experts: list[Expert], buffers: Plain) -> None:
    for stored in experts:
        for projection, (weight, scale) in stored.items():
            assert scale is not None
            fp8_dequant.dequantize(weight, scale, out=buffers[projection])
