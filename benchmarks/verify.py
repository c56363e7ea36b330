"""`m27quant verify --full` at full width: against plain reading and hashing, and against packing the same tensors.

    python -m benchmarks.verify [--save] [--layers 2] [--experts 32] [--rounds 5]

A synthetic checkpoint with M2.7's shapes and fewer experts is made and quantized in a temporary folder.  Then all
operations take turns on the same files, which the page cache holds; best of the rounds.  GB/s of `--full` and of
hashing are bytes of the checkpoint, those of `--full --source` and of packing bytes of FP8 experts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

from benchmarks import machine, packing
from benchmarks.synthetic import TINY, Size, require_room, write_model, write_rows
from benchmarks.table import Lines, table
from benchmarks.watch import watch
from m27quant import quantize_checkpoint, verify_checkpoint
from m27quant.checkpoint.source import Source
from m27quant.pack import read_expert, stream_experts
from m27quant.pack_stats import PackStats
from m27quant.verify.stream import usable_cores

RESULTS = Path(__file__).parent / "results"
AIMS = {"full": 0.5, "source": 0.6}
SHARD_BYTES = 2**28
READ_BYTES = 2**20
REPORT = "quantization_report.json"
PACKING = "packing: read, pack, measure"
MOST_MEMORY = 2 * 10**9


def xxh3(path: Path) -> str:
    """Of a whole file, read plainly."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def on_all_cores(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(xxh3, paths))


def measure(size: Size, rounds: int, folder: Path) -> dict[str, Any]:
    """Make the files, prove them, time everything in turns."""
    model = write_model(folder / "model", size)
    rows = write_rows(folder / "rows.jsonl", rows=2, length=64, vocab_size=size.vocab_size)
    out = folder / "out"
    quantize_checkpoint(str(model), out, dataset=str(rows), max_shard_size=SHARD_BYTES)
    proven = verify_checkpoint(out, level="full", source=str(model)).facts
    facts = proven["source"]
    if facts["exact"] != facts["matrices"] or facts["other_tensors_different"]:
        sys.exit(f"the checkpoint is not the source's: {facts}")
    shards = sorted(out.glob("*.safetensors"))
    report, hidden = out / REPORT, folder / REPORT

    def without_report(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            report.rename(hidden)
            try:
                call()
            finally:
                hidden.rename(report)

        return run

    with packing.open_source(model) as source, torch.inference_mode():
        cpu = torch.device("cpu")
        stored = [
            read_expert(source, layer, expert, cpu)
            for layer in range(size.num_hidden_layers)
            for expert in range(size.num_local_experts)
        ]
        best = machine.interleaved(
            {
                "read and xxh3, one core": lambda: [xxh3(path) for path in shards],
                "read and xxh3, all cores": lambda: on_all_cores(shards),
                "full": without_report(lambda: verify_checkpoint(out, level="full")),
                "full and hashes against the report": lambda: verify_checkpoint(out, level="full"),
                "full and source": without_report(
                    lambda: verify_checkpoint(out, level="full", source=str(model))
                ),
                "packing: amax and pack, tensors in memory": lambda: packing._kernel(stored),
                PACKING: lambda: _pack_layers(source, size.num_hidden_layers),
            },
            rounds,
        )
    fp8 = sum(weight.numel() for s in stored for weight, _ in s.values())
    nbytes = sum(path.stat().st_size for path in shards)
    of_fp8 = ("full and source", "packing")
    rates = {name: (fp8 if name.startswith(of_fp8) else nbytes) / s / 1e9 for name, s in best.items()}
    return {
        "checkpoint_bytes": nbytes,
        "fp8_expert_bytes": fp8,
        "shards": len(shards),
        "matrices_proven": facts["exact"],
        "rounds": rounds,
        "cores": usable_cores(),
        "gb_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "shares": shares(rates),
        "peak_rss_bytes": peak(model, out),
        "disk": machine.disk_read_rate(shards[0]),
    }


class _Nowhere:
    """In the place of shards: takes tensors and writes nothing, so that only packing is timed."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        pass


def _pack_layers(source: Source, layers: int) -> None:
    """All experts as `m27quant quantize` reads, packs and measures them."""
    nowhere: Any = _Nowhere()
    for layer in range(layers):
        for _ in stream_experts(source, layer, 1, torch.device("cpu"), nowhere, PackStats(), lambda: None):
            pass


def shares(rates: dict[str, float]) -> dict[str, float]:
    """What the aims are about, and the stricter comparisons beside them."""
    pairs = {
        "full of read and xxh3, one core": ("full", "read and xxh3, one core"),
        "full of read and xxh3, all cores": ("full", "read and xxh3, all cores"),
        "full with hashes of read and xxh3, one core": (
            "full and hashes against the report", "read and xxh3, one core",
        ),
        "full and source of packing as quantize does": (
            "full and source", PACKING,
        ),
        "full and source of amax and pack alone": (
            "full and source", "packing: amax and pack, tensors in memory",
        ),
    }  # fmt: skip
    return {name: round(rates[a] / rates[b], 3) for name, (a, b) in pairs.items()}


def peak(model: Path, out: Path) -> int:
    """Of the command with a source, seen from outside."""
    arguments = [
        "verify",
        str(out),
        "--full",
        "--source",
        str(model),
        "--exit-zero",
        "--json",
        "--no-progress",
    ]
    found = watch([sys.executable, "-m", "m27quant", *arguments])
    if found.returncode:
        sys.exit(f"the command failed with {found.returncode}:\n{found.stderr}")
    return found.peak_rss_bytes


def describe(found: dict[str, Any]) -> Lines:
    """Rates, shares with their aims, limits."""
    s, peak_bytes = found["shares"], found["peak_rss_bytes"]
    rate, how = found["disk"]
    verdict = "kept" if peak_bytes < MOST_MEMORY else "BROKEN"
    return [
        ("checkpoint", f"{found['checkpoint_bytes'] / 1e9:.2f} GB in {found['shards']} shards, {found['cores']} cores"),
        ("proven exact", f"{found['matrices_proven']} matrices, {found['fp8_expert_bytes'] / 1e9:.2f} GB of FP8"),
        *((name, f"{value:.2f} GB/s") for name, value in found["gb_per_s"].items()),
        *((name, f"{value:.0%}{_aim(name)}") for name, value in s.items()),
        ("peak memory with a source", f"{peak_bytes / 1e9:.2f} GB, less than 2 GB: {verdict}"),
        ("limit: copy in memory", f"{found['copy_gb_per_s']:.1f} GB/s"),
        ("limit: read from disk", f"{rate / 1e9:.2f} GB/s ({how})"),
    ]  # fmt: skip


def _aim(name: str) -> str:
    if name == "full of read and xxh3, one core":
        return f" (aim {AIMS['full']:.0%})"
    return f" (aim {AIMS['source']:.0%})" if name.endswith("as quantize does") else ""


def save(results: dict[str, Any]) -> list[Path]:
    """JSON and markdown, dated, under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"verify-{results['date']}"
    paths = [RESULTS / f"{stem}.json", RESULTS / f"{stem}.md"]
    paths[0].write_text(json.dumps(results, indent=2) + "\n")
    m, model = results["machine"], results["model"]
    page = [
        f"# Verifying at full width, {results['date']}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {m['memory_bytes'] / 2**30:.0f} GiB; {m['system']}, "
        f"{m['python']}. Load before: {m['load_before']}.",
        "",
        f"Synthetic model of M2.7's widths: {model['layers']} layers of {model['experts']} experts (M2.7: 62 of 256).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in describe(results["verify"])),
    ]
    paths[1].write_text("\n".join(page) + "\n")
    return paths


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32, help="of a layer; M2.7 has 256")
    parser.add_argument("--rounds", type=int, default=5, help="best of so many")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to try the benchmark itself")
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    size = TINY if args.tiny else Size(num_hidden_layers=args.layers, num_local_experts=args.experts)
    results: dict[str, Any] = {
        "schema_version": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.facts(),
        "model": {"layers": size.num_hidden_layers, "experts": size.num_local_experts},
    }
    copy = round(machine.copy_rate(torch.device("cpu"), 2**28) / 1e9, 2)
    with tempfile.TemporaryDirectory(prefix="m27quant-benchmark-") as name:
        fp8 = 3 * size.hidden_size * size.intermediate_size * size.num_local_experts * size.num_hidden_layers
        require_room(Path(name), fp8 * 3 + 10**9)
        results["verify"] = measure(size, args.rounds, Path(name)) | {"copy_gb_per_s": copy}
    print(table("m27quant verify --full", describe(results["verify"])), flush=True)
    if args.save:
        print("written:", *(path.name for path in save(results)))
    return results


if __name__ == "__main__":
    main()
