"""`m27quant quantize` at full width: peak memory, speed of packing, share of the machine's limits.

    python -m benchmarks.quantize [--save] [--max-memory 6GiB --max-memory 3GiB] [--part run] [--device cuda]

A synthetic checkpoint with M2.7's shapes and two layers is made in a temporary folder (12 GB of disk; TMPDIR says
where), quantized by the command line in a process of its own whose memory is watched from outside, and compared byte
for byte with nvidia-modelopt on a sample.  Then packing is timed on the same tensors as modelopt's quantizer, in
turns, best of the rounds.  A run whose bytes differ prints no times.  GB/s are bytes of FP8 input.

Parts: `layer` (the calibration pass on one layer, as a share of the BF16 peak), `run` (the command), `pack`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import layer, machine, packing
from benchmarks.synthetic import TINY, Size, model_bytes, require_room, write_model, write_rows
from benchmarks.table import markdown, table
from benchmarks.watch import Watched, watch
from m27quant.cli.units import parse_size

PARTS = ("layer", "run", "pack")
LAYERS = 62
"""Of M2.7, for extrapolation."""
DEFAULT_TOKENS = 1024 * 512
"""Of the recipes' calibration."""
RESULTS = Path(__file__).parent / "results"


def run_command(model: Path, out: Path, rows: Path, budget: str, device: str) -> Watched:
    """`m27quant quantize`, as a user runs it."""
    arguments = ["quantize", str(model), str(out), "--dataset", str(rows), "--max-memory", budget]
    found = watch(
        [sys.executable, "-m", "m27quant", *arguments, "--device", device, "--json", "--no-progress"]
    )
    if found.returncode:
        sys.exit(f"the command failed with {found.returncode}:\n{found.stderr}")
    return found


def units(out: Path) -> dict[str, float]:
    """Seconds of each unit, from the run's log."""
    lines = (out / ".m27quant" / "run.log").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {e["name"]: e["seconds"] for e in entries if e["event"] == "unit"}


def planned_peak(out: Path) -> int:
    """What the memory plan expected."""
    text = (out / ".m27quant" / "run.log").read_text()
    return int(text.partition("peak_bytes=")[2].partition(",")[0])


def measure_run(
    model: Path, folder: Path, size: Size, args: argparse.Namespace
) -> tuple[dict[str, Any], Path]:
    """Quantize under each budget; the bytes must be modelopt's, and the same for all budgets."""
    rows = write_rows(folder / "rows.jsonl", rows=args.rows, length=args.length, vocab_size=size.vocab_size)
    runs, hashes, out = [], set(), folder / "out-0"
    for number, budget in enumerate(args.max_memory):
        out = folder / f"out-{number}"
        watched = run_command(model, out, rows, budget, args.device)
        shards = json.loads(watched.stdout)["shards"]
        hashes.add(json.dumps({name: s["sha256"] for name, s in shards.items()}, sort_keys=True))
        promise = parse_size(budget)
        runs.append({
            "budget": budget,
            "budget_bytes": promise,
            "peak_rss_bytes": watched.peak_rss_bytes,
            "peak_with_children_bytes": watched.peak_tree_bytes,
            "planned_peak_bytes": planned_peak(out),
            "kept": watched.peak_tree_bytes <= promise,
            "seconds": round(watched.seconds, 2),
            "cpu_seconds": round(watched.cpu_s, 2),
            "layer_seconds": [round(s, 2) for name, s in units(out).items() if name.startswith("layer")],
        })  # fmt: skip
        if number + 1 < len(args.max_memory):
            for file in out.glob("*.safetensors"):
                file.unlink()
    if len(hashes) != 1:
        sys.exit("two budgets gave different bytes")
    compared = packing.compare_with_modelopt(model, out)
    tokens = args.rows * args.length
    flops = layer.flops(size, tokens, args.length) * size.num_hidden_layers
    return {
        "rows": args.rows,
        "tokens": tokens,
        "calibration_tflop": round(flops / 1e12, 3),
        "budgets": runs,
        "tensors_equal_to_modelopt": compared,
    }, out


def extrapolate(size: Size, results: dict[str, Any]) -> dict[str, Any]:
    """M2.7's 62 layers and the recipes' 1024 x 512 tokens, from what was measured here on other numbers."""
    fp8 = 3 * size.hidden_size * size.intermediate_size * size.num_local_experts * LAYERS
    found: dict[str, Any] = {
        "what": f"arithmetic from the rates above, not a measurement: {LAYERS} layers, {fp8 / 1e9:.0f} GB of FP8 "
        f"experts, {DEFAULT_TOKENS:,} calibration tokens in rows of 512"
    }
    if "pack" in results:
        rates = results["pack"]["fp8_gb_per_s"]
        durable = rates["read, pack, write, made durable"]
        found["packing_seconds"] = round(fp8 / 1e9 / durable, 1)
        found["modelopt_packing_seconds"] = round(fp8 / 1e9 / rates["modelopt (BF16 given)"], 1)
        found["reading_the_source_seconds"] = round(fp8 / 1e9 / results["limits"]["disk_read_gb_per_s"], 1)
    if "layer" in results:
        flops = layer.flops(size, DEFAULT_TOKENS, 512) * LAYERS
        found["calibration_pflop"] = round(flops / 1e15, 1)
        found["calibration_seconds"] = round(flops / results["layer"]["flop_per_s"], 1)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts that were asked for."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = TINY if args.tiny else Size()
    results: dict[str, Any] = {
        "schema_version": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.facts(),
        "device": args.device,
        "model": {
            "layers": size.num_hidden_layers,
            "experts": size.num_local_experts,
            "bytes": model_bytes(size),
        },
    }
    results["limits"] = {
        "copy_gb_per_s": round(machine.copy_rate(device, 2**22 if args.tiny else 2**28) / 1e9, 2)
    }
    if "layer" in args.part:
        results["layer"] = layer.measure(size, device, tokens=args.layer_tokens)
        print(table("calibration pass, one layer", layer.describe(results["layer"])), flush=True)
    if {"run", "pack"} & set(args.part):
        with tempfile.TemporaryDirectory(prefix="m27quant-benchmark-") as name:
            folder = Path(name)
            require_room(folder, int(model_bytes(size) * 1.65))
            started = time.monotonic()
            model = write_model(folder / "model", size)
            results["model"]["seconds_to_make"] = round(time.monotonic() - started, 1)
            if "run" in args.part:
                results["run"], _ = measure_run(model, folder, size, args)
                print(table("m27quant quantize", describe_run(results["run"])), flush=True)
            if "pack" in args.part:
                rate, how = machine.disk_read_rate(min(model.glob("*.safetensors")))
                results["limits"] |= {"disk_read_gb_per_s": round(rate / 1e9, 2), "disk_read_how": how}
                results["pack"] = packing.measure(model, folder, device, args.experts, args.rounds)
                print(table("packing", packing.describe(results["pack"], results["limits"])), flush=True)
    if not args.tiny:
        results["extrapolated"] = extrapolate(size, results)
        print(table("extrapolated", describe_extrapolation(results["extrapolated"])), flush=True)
    return results


def describe_run(run: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("tensors compared with modelopt", f"{run['tensors_equal_to_modelopt']}, all equal")]
    for r in run["budgets"]:
        verdict = "kept" if r["kept"] else "BROKEN"
        lines.append((
            f"--max-memory {r['budget']}",
            f"{verdict}: peak {r['peak_rss_bytes'] / 2**30:.2f} GiB ({r['peak_with_children_bytes'] / 2**30:.2f} with "
            f"children), planned {r['planned_peak_bytes'] / 2**30:.2f}; {r['seconds']:.0f} s for "
            f"{run['tokens']:,} tokens",
        ))  # fmt: skip
    return lines


def describe_extrapolation(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("extrapolated, not measured", found["what"])]
    for key, value in found.items():
        if key.endswith("_seconds"):
            lines.append((key.removesuffix("_seconds").replace("_", " "), duration(value)))
        elif key == "calibration_pflop":
            lines.append(("calibration", f"{value:,.1f} PFLOP"))
    return lines


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def save(results: dict[str, Any]) -> list[Path]:
    """JSON and markdown, dated, under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"quantize-{results['device'].partition(':')[0]}-{results['date']}"
    paths = [RESULTS / f"{stem}.json", RESULTS / f"{stem}.md"]
    paths[0].write_text(json.dumps(results, indent=2) + "\n")
    parts = {
        "`m27quant quantize`, watched from outside": ("run", describe_run),
        "Calibration pass on one full-width layer": ("layer", layer.describe),
        "Packing": ("pack", lambda pack: packing.describe(pack, results["limits"])),
        "Extrapolated to M2.7": ("extrapolated", describe_extrapolation),
    }
    sections = {title: tell(results[key]) for title, (key, tell) in parts.items() if key in results}
    paths[1].write_text(markdown(results, sections))
    return paths


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--max-memory", action="append", metavar="SIZE", help="may be repeated; default 6GiB")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows of the run")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument(
        "--layer-tokens", type=int, help="tokens of the layer's pass; default 4096, CUDA 131072"
    )
    parser.add_argument("--experts", type=int, default=64, help="experts that packing is timed on")
    parser.add_argument("--rounds", type=int, default=5, help="best of so many")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to try the benchmark itself")
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    args = parser.parse_args(argv)
    args.part = args.part or list(PARTS)
    args.max_memory = args.max_memory or ["6GiB"]
    args.layer_tokens = args.layer_tokens or (131072 if args.device.startswith("cuda") else 4096)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    warnings.simplefilter("ignore")
    results = measure(args)
    if args.save:
        print("written:", *(path.name for path in save(results)))
    return results


if __name__ == "__main__":
    main()
