"""What block scales and error feedback cost in time, and what they leave as error: every method in one run.

    python benchmarks/quality.py [--save] [--blocks 10000000] [--threads 1] [--rounds 9]

First every block's scale by `mse` is compared with all 126 in F64 (quality_blocks.py), `--blocks` blocks in all; a run
with an exception prints no figures.  Then error and time of each method on tiny-m27's experts and on rows of a matrix
of M2.7's width (quality_inputs.py), in turns, and the time of whole matrices.  Times are the processor's, of all
threads, which other work on the machine hardly changes.  Four-over-Six (arXiv 2512.02010) is plain torch and its time
no measure of it.  `--save` writes results/quality-DATE-THREADSt.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from machine import facts  # noqa: E402
from quality_blocks import count_exceptions, exceptions_bf16, packed_errors  # noqa: E402
from quality_inputs import WIDE, Sample, tiny, wide  # noqa: E402

from m27quant.kernels import fp8_dequant, nvfp4_gptq, nvfp4_pack  # noqa: E402
from m27quant.kernels.nvfp4_pack import PackedNVFP4, reference, scale_search  # noqa: E402
from tests.kernels.scale_cases import DISTRIBUTIONS, as_fp8  # noqa: E402
from tests.oracles import modelopt_sweep  # noqa: E402

SAMPLE_ROWS = 256
Figures = dict[str, dict[str, float]]


def four_over_six(x: Tensor, amax: Tensor) -> PackedNVFP4:
    """Of a scale that makes a block's largest weight 6 and one that makes it 4 the better one; torch.

    The largest block scale is 256, so that one half as large again still fits (arXiv 2512.02010; modelopt alike).
    """
    scale_2 = amax / (6.0 * 256.0)
    x_RG16 = reference.groups(x.float())
    of_six = reference.unclamped_scale(x_RG16, scale_2)
    scales = [s.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn) for s in (of_six, of_six * 1.5)]
    errors = [scale_search.group_errors(x_RG16, s.float() * scale_2, None) for s in scales]
    bits = [s.view(torch.uint8) for s in scales]
    best = torch.where(errors[1] < errors[0], bits[1], bits[0]).view(torch.float8_e4m3fn)
    return PackedNVFP4(reference.encode(x_RG16, best, scale_2), best, scale_2)


def measure(sample: Sample, rounds: int) -> Figures:
    """Errors and best seconds of every method on one matrix; errors are counted on the BF16 values."""
    w, scale, seen, unseen = sample
    x, amax = sample.x, nvfp4_pack.amax(w, scale)
    hessian = seen.T @ seen / len(seen)
    moments = hessian.diagonal().contiguous()
    factor = nvfp4_gptq.factorize(hessian)
    methods: dict[str, Callable[[], PackedNVFP4]] = {
        "max": lambda: nvfp4_pack.pack(w, scale, amax=amax),
        "four over six": lambda: four_over_six(x, amax),
        "mse": lambda: nvfp4_pack.pack(w, scale, amax=amax, scales="mse"),
        "modelopt mse": lambda: PackedNVFP4(*modelopt_sweep.pack(x, amax)),
        "awmse": lambda: nvfp4_pack.pack(w, scale, amax=amax, scales="mse", channel_weight=moments),
        "gptq": lambda: nvfp4_gptq.pack(w, scale, amax=amax, factor=factor),
    }
    packed = {name: method() for name, method in methods.items()}
    if wrong := exceptions_bf16(x, packed["mse"]):
        sys.exit(f"{wrong} blocks have a better scale: nothing to time")
    noise = {name: float(packed_errors(x, p).sum()) for name, p in packed.items()}
    if noise["mse"] > noise["modelopt mse"]:
        sys.exit("modelopt's sweep has less error: nothing to time")
    slow = {"modelopt mse": methods["modelopt mse"]}
    seconds = interleaved({n: m for n, m in methods.items() if n not in slow}, rounds) | interleaved(slow, 1)
    signal, of_outputs = float(x.double().square().sum()), float(_square(unseen, x))
    result = {}
    for name, p in packed.items():
        error = _square(unseen, x.float() - nvfp4_pack.unpack(p))
        result[name] = {
            "weight_sqnr_db": _db(signal, noise[name]),
            "output_sqnr_db": _db(of_outputs, error),
            "noise": noise[name],
            "output_noise": error,
            "ns_per_block": seconds[name] / p.weight_scale.numel() * 1e9,
        }
    return result


def interleaved(operations: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of the processor for each operation; they take turns."""
    best = dict.fromkeys(operations, float("inf"))
    for _ in range(rounds):
        for name, operation in operations.items():
            started = time.process_time()
            operation()
            best[name] = min(best[name], time.process_time() - started)
    return best


def _square(inputs_TK: Tensor, x_NK: Tensor) -> float:
    """Sum of squares of the products."""
    return float((inputs_TK @ x_NK.float().T).double().square().sum())


def _db(signal: float, noise: float) -> float:
    return float(10 * torch.tensor(signal / noise, dtype=torch.float64).log10())


def whole_matrices(rounds: int) -> dict[str, float]:
    """Seconds of one of M2.7's matrices: an expert's w1, and what GPTQ takes once for all that read an input."""
    weight, scale = as_fp8(DISTRIBUTIONS["normal"](torch.Generator().manual_seed(1), *WIDE))
    x, amax = fp8_dequant.dequantize(weight, scale), nvfp4_pack.amax(weight, scale)
    inputs = wide("normal", 128).seen
    hessian = inputs.T @ inputs
    factor = nvfp4_gptq.factorize(hessian)
    packed = nvfp4_pack.pack(weight, scale, amax=amax)
    out, channel, plain = (packed.weight, packed.weight_scale), hessian.diagonal().contiguous(), x.float()
    operations: dict[str, Callable[[], object]] = {
        "max": lambda: nvfp4_pack.pack(weight, scale, amax=amax, out=out),
        "mse": lambda: nvfp4_pack.pack(weight, scale, amax=amax, out=out, scales="mse"),
        "max of BF16": lambda: nvfp4_pack.pack(x, amax=amax, out=out),
        "mse of BF16": lambda: nvfp4_pack.pack(x, amax=amax, out=out, scales="mse"),
        "awmse of BF16": lambda: nvfp4_pack.pack(x, amax=amax, out=out, scales="mse", channel_weight=channel),
        "gptq": lambda: nvfp4_gptq.pack(weight, scale, amax=amax, factor=factor, out=out),
        "gptq: factor of 3072 channels": lambda: nvfp4_gptq.factorize(hessian),
        "gptq: factor of 1536 channels": lambda: nvfp4_gptq.factorize(hessian[:1536, :1536].contiguous()),
        "F32 product [1536, 3072] x [3072, 3072]": lambda: plain @ hessian,
    }
    return interleaved(operations, rounds)


def lines(result: Figures) -> list[str]:
    rows = [
        "| method | weights | outputs | noise / max's | outputs' noise / max's | ns a block | times max |",
        "|---|---|---|---|---|---|---|",
    ]
    base = result["max"]
    for name, r in result.items():
        rows.append(
            f"| {name} | {r['weight_sqnr_db']:.2f} dB | {r['output_sqnr_db']:.2f} dB "
            f"| {r['noise'] / base['noise']:.4f} | {r['output_noise'] / base['output_noise']:.4f} "
            f"| {r['ns_per_block']:,.1f} | {r['ns_per_block'] / base['ns_per_block']:,.1f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)

    results: dict[str, Any] = {"schema_version": 2, "date": datetime.date.today().isoformat()}
    results["machine"] = facts()
    results["backend"] = nvfp4_pack.choose("nvfp4_pack", "cpu")._asdict()
    print("every block against all 126 scales", flush=True)
    results["exhaustive"] = count_exceptions(options.blocks)
    if any(r["exceptions"] for r in results["exhaustive"].values()):
        sys.exit("blocks with a better scale: nothing to time")
    samples: dict[str, Callable[[], Sample]] = {
        "tiny-m27, layer 0, every w1, BF16": tiny,
        f"{SAMPLE_ROWS} x {WIDE[1]}, Gaussian, FP8, inputs made up": lambda: wide("normal", SAMPLE_ROWS),
        f"{SAMPLE_ROWS} x {WIDE[1]}, Student-t, FP8, inputs made up": lambda: wide("student", SAMPLE_ROWS),
    }
    page = [f"# Block scales and error feedback, {results['date']}, {options.threads} threads", ""]
    m = results["machine"]
    page += [f"{m['cpu']['model']}; load before {m['load_before']}; {results['backend']['reason']}."]
    page += ["Times are the processor's.", ""]
    total = sum(r["blocks"] for r in results["exhaustive"].values())
    page += [f"{total:,} blocks compared with all 126 scales in F64: 0 have a better one.", ""]
    results["samples"] = {}
    for name, sample in samples.items():
        results["samples"][name] = measure(sample(), options.rounds)
        page += [f"## {name}", "", *lines(results["samples"][name]), ""]
    results["whole_matrix_seconds"] = found = whole_matrices(options.rounds)
    page += [
        f"## {WIDE[0]} x {WIDE[1]}, Gaussian, FP8 unless said otherwise, whole",
        "",
        "| | ms |",
        "|---|---|",
    ]
    page += [f"| {name} | {seconds * 1e3:.1f} |" for name, seconds in found.items()]
    print("\n".join(page))
    if options.save:
        path = Path(__file__).parent / "results" / f"quality-{results['date']}-{options.threads}t"
        path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        path.with_suffix(".md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
