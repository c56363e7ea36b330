"""NVFP4 products and mixtures of experts at M2.7's widths, beside their rivals and the machine's limit.

    python -m benchmarks.kernels [--device cpu] [--save] [--threads 2] [--experts 256] [--tokens 1,8,64]
    python -m benchmarks.kernels --device cuda --save      everything on one GPU, meant for under 8 minutes

Every operation is compared with its reference first; a wrong one is not timed.  Timed operations take turns, so that
what else the machine does falls on all of them, and the best of the rounds counts.  `--save` writes JSON and markdown
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels_cpu, kernels_gpu, kernels_gpu_ops, machine

RESULTS = Path(__file__).parent / "results"


def markdown(results: dict[str, Any], sections: dict[str, str]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    head = [
        f"# NVFP4 kernels, {results['date']}, on {results['device']}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {m['threads']} threads, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB; {m['system']}, {m['python']}; {versions}. "
        f"Load before: {m['load_before']}.",
    ]
    return "\n".join([*head, *(f"\n## {title}\n\n{body}" for title, body in sections.items())]) + "\n"


def save(results: dict[str, Any], sections: dict[str, str]) -> list[Path]:
    """JSON and markdown, dated, under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"kernels-{results['device'].partition(':')[0]}-{results['date']}"
    if results["device"] == "cpu":
        stem += f"-{results['machine']['threads']}t"
    paths = [RESULTS / f"{stem}.json", RESULTS / f"{stem}.md"]
    paths[0].write_text(json.dumps(results, indent=2) + "\n")
    paths[1].write_text(markdown(results, sections))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experts", type=int, help="by default all 256, or as many as the memory holds")
    parser.add_argument("--tokens", help="by default 1,8,64, on CUDA 1,8,32,256,1024,4096")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--sweep", action="store_true", help="on CUDA: also time tiles that the table does not take"
    )
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokens = [int(number) for number in (args.tokens or "1,8,64").split(",")]
    results: dict[str, Any] = {
        "schema_version": 1,
        "date": datetime.date.today().isoformat(),
        "device": args.device,
        "machine": machine.facts(),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        results |= kernels_gpu.measure(
            device,
            tokens if args.tokens else kernels_gpu.TOKENS,
            rounds=args.rounds,
            tiles_too=args.sweep,
        )
        copy = results["limits"]["copy_bytes_per_s"]
        results["ops"] = kernels_gpu_ops.measure(device, copy, args.rounds)
        sections = kernels_gpu.describe(results) | kernels_gpu_ops.describe(results["ops"])
    else:
        results |= kernels_cpu.measure(tokens, args.experts, args.rounds)
        sections = kernels_cpu.describe(results)
    for title, body in sections.items():
        print(f"\n{title}\n\n{body}")
    if args.save:
        print("written:", *(path.name for path in save(results, sections)))


if __name__ == "__main__":
    main()
