"""How fast FP8 experts are packed to NVFP4, against nvidia-modelopt's own quantizer and against memcpy.

    python benchmarks/nvfp4_pack.py [--save] [--threads 1] [--device cuda] [--rounds 30]

The bytes are compared with modelopt's first; a run whose bytes differ prints no time.  The timed operations take
turns, so that whatever else the machine does falls on all of them, and the best of the rounds counts.  On a busy
machine compare one thread with one thread.  GB/s are bytes of FP8 input.  `--save` writes
benchmarks/results/nvfp4_pack-DATE-THREADSt.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from m27quant.kernels import fp8_dequant, nvfp4_pack
from m27quant.kernels.dispatch import choose

SHAPES = {"w1": (1536, 3072), "w2": (3072, 1536)}  # of one MiniMax-M2.7 expert


def fp8_weight(N: int, K: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian matrix in FP8 128x128 blocks, each filling the range of E4M3."""
    blocks = (torch.randn(N, K) * 0.02).view(N // 128, 128, K // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    weight = (blocks / scale[:, None, :, None]).view(N, K).to(torch.float8_e4m3fn)
    return weight.to(device), scale.to(device)


def modelopt_pack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """modelopt's export of a BF16 weight: global amax, block scales, codes."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(x, 16)
    return packed._quantized_data, scale, scale_2


def same_bytes(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8))
        for a, e in zip(actual, expected, strict=True)
    )


def interleaved(operations: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, float]:
    """Best seconds of each operation; slow ones take part in fewer rounds."""
    best = dict.fromkeys(operations, float("inf"))
    for turn in range(rounds):
        for name, operation in operations.items():
            if turn >= 5 and best[name] > 0.1:
                continue
            start = time.perf_counter()
            operation()
            if cuda:
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(shape: tuple[int, int], rounds: int, device: str) -> dict[str, float]:
    """Best seconds of each operation on one matrix, after its bytes have been compared."""
    weight, scale = fp8_weight(*shape, device)
    x = fp8_dequant.dequantize(weight, scale)
    amax = nvfp4_pack.amax(weight, scale)
    packed = nvfp4_pack.pack(weight, scale, amax=amax)
    if not same_bytes(packed, modelopt_pack(x)) or not same_bytes(nvfp4_pack.pack(x, amax=amax), packed):
        sys.exit("the bytes differ from modelopt's: nothing to time")
    out, copy, x_out = packed[:2], torch.empty_like(weight), torch.empty_like(x)
    operations = {
        "amax": lambda: nvfp4_pack.amax(weight, scale),
        "pack": lambda: nvfp4_pack.pack(weight, scale, amax=amax, out=out),
        "amax + pack": lambda: nvfp4_pack.pack(weight, scale, amax=nvfp4_pack.amax(weight, scale), out=out),
        "pack from BF16": lambda: nvfp4_pack.pack(x, amax=amax, out=out),
        "squared error": lambda: nvfp4_pack.squared_error(weight, scale, packed),
        "group counts": lambda: nvfp4_pack.count_groups(weight, scale, packed.weight_scale_2),
        "dequantize to BF16": lambda: fp8_dequant.dequantize(weight, scale, out=x_out),
        "memcpy": lambda: copy.copy_(weight),
        "torch: fp8 * scale": lambda: fp8_dequant.reference.dequantize(
            weight, scale, torch.bfloat16, fp8_dequant.BLOCK, x_out
        ),
        "modelopt (BF16 given)": lambda: modelopt_pack(x),
    }
    return interleaved(operations, rounds, device != "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write a dated JSON file to benchmarks/results/")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    backend = choose("nvfp4_pack", arguments.device)
    hardware = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
    }
    versions = {name: version(name) for name in ("torch", "nvidia-modelopt", "m27quant")}
    print(f"{hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_before']}")
    print(f"{backend.backend}: {backend.reason}; {versions}; bytes equal modelopt's on every matrix below\n")

    results = {}
    for name, shape in SHAPES.items():
        seconds = measure(shape, arguments.rounds, arguments.device)
        size = shape[0] * shape[1]
        ratio = seconds["modelopt (BF16 given)"] / seconds["amax + pack"]
        print(f"{name} {shape[0]}x{shape[1]}, {size / 1e6:.1f} MB of FP8")
        print(f"  {'operation':<24}{'ms':>9}{'GB/s':>9}")
        for operation, best in seconds.items():
            print(f"  {operation:<24}{best * 1e3:>9.3f}{size / best / 1e9:>9.3f}")
        print(f"  amax + pack is {ratio:.0f} times as fast as modelopt, which starts from BF16\n")
        gb_per_s = {operation: round(size / best / 1e9, 4) for operation, best in seconds.items()}
        results[name] = {"shape": shape, "fp8_gb_per_s": gb_per_s, "times_modelopt": round(ratio, 1)}

    if arguments.save:
        today = datetime.date.today().isoformat()
        path = Path(__file__).parent / "results" / f"nvfp4_pack-{today}-{arguments.threads}t.json"
        path.parent.mkdir(exist_ok=True)
        record = {
            "schema_version": 1,
            "date": today,
            "hardware": hardware,
            "python": platform.python_version(),
            "versions": versions,
            "threads": arguments.threads,
            "backend": backend._asdict(),
            "rounds": arguments.rounds,
            "matrices": results,
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written: {path}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
