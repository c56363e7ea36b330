"""Throughput of the builtin server beside that of its own engine without one, in turns, on the same requests.

    python -m benchmarks.serving [--threads 1] [--concurrency 1,8,32] [--save]

tiny-m27 is quantized on the fly.  Greedy answers are compared first: a server that says something else is not timed.
The engine answers in this process, the server in its own, the load comes from a third; only one of them works at a
time but for server and load, which share the machine as they do in life.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

import m27quant
from benchmarks import machine
from m27quant import LLM, SamplingParams

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples/tiny-m27"
PROMPT = 16
WAYS = ("stream", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of the engine, in either process")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--answers", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="take this one instead of quantizing tiny-m27")
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    parser.add_argument("--serve", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        sys.exit(_serve(args.serve))
    before = machine.facts()
    with tempfile.TemporaryDirectory(prefix="m27quant-") as folder:
        checkpoint = args.checkpoint or Path(folder) / "model"
        if args.checkpoint is None:
            rows = str(TINY / "calibration.jsonl")
            m27quant.quantize_checkpoint(str(TINY), checkpoint, dataset=rows, num_samples=64, seq_len=256)
        results = _measure(checkpoint, args)
    results = {"machine": before, "date": datetime.date.today().isoformat(), **results}
    page = markdown(results)
    print(page)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"serving-tiny-{results['date']}-{args.threads}t"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        stem.with_suffix(".md").write_text(page)


def _serve(checkpoint: str) -> int:
    """The other process; without reuse, as what was computed before is no measurement."""
    from m27quant.serve.server import ServerOptions, serve

    options = m27quant.RunOptions(prefix_caching=False)
    server = ServerOptions(port=0, served_model_name="model")
    return serve(checkpoint, options, None, server, say=lambda line: print(line, flush=True), check=False)


@contextmanager
def _server(checkpoint: Path, threads: int) -> Iterator[tuple[int, psutil.Process]]:
    """The port, and the process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--serve",
        str(checkpoint),
        "--threads",
        str(threads),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("listening"))
        try:
            yield int(line.rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.terminate()


def _measure(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    llm = m27quant.load(checkpoint, check=False, prefix_caching=False)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.text((TINY / "heldout.txt").read_text())
    rows = []
    with _server(checkpoint, args.threads) as (port, process):
        for concurrency in map(int, args.concurrency.split(",")):
            count = concurrency * args.answers * (4 if concurrency == 1 else 1)
            prompts = [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(count)]
            _compare(llm, port, prompts, args.tokens)
            rows += _rates(llm, port, process, prompts, concurrency, args)
            for row in rows[-len(WAYS) :]:  # what is measured is not lost where time runs out
                print(
                    f"{concurrency} clients, {row['way']}: {row['ratio']:.2f} {row['ratios']}",
                    file=sys.stderr,
                )
    return {"threads": args.threads, "tokens": args.tokens, "rounds": args.rounds, "rows": rows}


def _body(prompt: list[int], tokens: int, way: str) -> dict[str, Any]:
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    return asked | ({"stream": True, "stream_options": {"include_usage": True}} if way == "stream" else {})


def _compare(llm: LLM, port: int, prompts: list[list[int]], tokens: int) -> None:
    """Ends the program where the server's answers are others than the engine's."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for prompt, result in zip(prompts[:8], llm.generate(prompts[:8], params), strict=True):
        body = json.dumps(_body(prompt, tokens, "whole") | {"return_token_ids": True}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as answer:
            found = json.load(answer)["choices"][0]
        if found["token_ids"] != result.token_ids or found["text"] != result.text:
            sys.exit(f"the server answers {found['text']!r}, the engine {result.text!r}: nothing is timed")


def _rates(
    llm: LLM,
    port: int,
    process: psutil.Process,
    prompts: list[list[int]],
    concurrency: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Tokens per second of engine and server in turns; the median round of each, and of their ratios."""
    own: list[float] = []
    own_cpu: list[float] = []
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        before = sum(psutil.Process().cpu_times()[:2])
        seconds = machine.interleaved(
            {"engine": lambda: _closed_loop(llm, prompts, concurrency, args.tokens)}, 1
        )
        tokens = len(prompts) * args.tokens
        own.append(tokens / seconds["engine"])
        own_cpu.append((sum(psutil.Process().cpu_times()[:2]) - before) / tokens)
        for way in WAYS:
            found[way].append(
                _load(port, process, [_body(p, args.tokens, way) for p in prompts], concurrency)
            )
    return [
        {
            "concurrency": concurrency, "way": way, "engine_tokens_per_s": statistics.median(own),
            "server_tokens_per_s": statistics.median(r["tokens_per_s"] for r in rounds),
            "ratio": statistics.median(r["tokens_per_s"] / e for r, e in zip(rounds, own, strict=True)),
            "ratios": [r["tokens_per_s"] / e for r, e in zip(rounds, own, strict=True)],
            "engine_cpu_ms_per_token": 1e3 * statistics.median(own_cpu),
            "server_cpu_ms_per_token": 1e3 * statistics.median(r["cpu_s_per_token"] for r in rounds),
            "first_token_ms": 1e3 * statistics.median(r["first_token_s"] for r in rounds),
        }
        for way, rounds in found.items()
    ]  # fmt: skip


def _closed_loop(llm: LLM, prompts: list[list[int]], concurrency: int, tokens: int) -> None:
    """As the load does: so many requests at a time, the next one where one is finished."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    waiting, running = deque(prompts), 0
    while waiting or running:
        while waiting and running < concurrency:
            llm.submit(waiting.popleft(), params)
            running += 1
        running -= sum(sequence.finish_reason is not None for sequence in llm.step())


def _load(
    port: int, process: psutil.Process, bodies: list[dict[str, Any]], concurrency: int
) -> dict[str, float]:
    asked = {"path": "/v1/completions", "bodies": bodies, "clients": concurrency}
    before = sum(process.cpu_times()[:2])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.http_load", str(port)],
        input=json.dumps(asked), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout)
    cpu = sum(process.cpu_times()[:2]) - before
    return {
        "tokens_per_s": found["tokens"] / found["seconds"],
        "cpu_s_per_token": cpu / found["tokens"],
        "first_token_s": found["first_token_s"],
    }


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    page = [
        f"# Serving, tiny-m27, {results['date']}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {results['threads']} threads of the engine, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB; {m['system']}, {m['python']}; {versions}. "
        f"Load before: {m['load_before']}.",
        "",
        f"NVFP4 weights. Greedy, prompts of {PROMPT} tokens, answers of {results['tokens']}; the server's answers are "
        f"the engine's, token for token. Medians of {results['rounds']} rounds in turns; the ratio is of rounds beside "
        "each other. The load comes from another process on the same cores.",
        "",
        "| clients | answers | engine, tokens/s | server, tokens/s | server / engine | lowest, highest round | "
        "CPU ms a token, engine | server | first token, ms |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['concurrency']} | {r['way']} | {r['engine_tokens_per_s']:.0f} | {r['server_tokens_per_s']:.0f} | "
            f"{r['ratio']:.2f} | {min(r['ratios']):.2f}, {max(r['ratios']):.2f} | "
            f"{r['engine_cpu_ms_per_token']:.2f} | {r['server_cpu_ms_per_token']:.2f} | {r['first_token_ms']:.0f} |"
            for r in results["rows"]
        ),
    ]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main()
