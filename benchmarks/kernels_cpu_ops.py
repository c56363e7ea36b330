"""Dense products and paged attention on a CPU at M2.7's widths, and what batch invariance costs.

    python -m benchmarks.kernels_cpu_ops [--threads 1] [--rounds 7] [--save]

Everything is compared with F64 or with its reference first; what is wrong is not timed.  Operations take turns, and
the best of the rounds counts.  With one thread the time is that thread's processor time, which other work on the
machine lengthens less than the wall's; with more it is the wall's.  `--save` writes JSON and markdown to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels, kernels_cpu, machine
from m27quant.kernels import dispatch, fp8_kv_attention
from m27quant.kernels.fp8_kv_attention import attention, write_kv
from m27quant.kernels.linear import linear

PRODUCTS = {"q_proj": (6144, 3072), "k_proj": (1024, 3072), "o_proj": (3072, 6144)}
TOKENS = (1, 8, 64, 512)
H, J, C, BLOCK = 48, 8, 128, 16
CACHES = {"FP8": torch.float8_e4m3fn, "BF16": torch.bfloat16}
CASES = {
    # name: rows of each sequence, their contexts before these rows
    "decode": [(1, [1024]), (1, [8192]), (1, [32768]), (1, [4096] * 16)],
    "16 drafts": [(16, [8192])],
    "prefill": [(512, [0]), (512, [2048])],
}
HELD = 150e6
"""Bytes of weights that are gone through in turn: more than caches hold."""


def interleaved(operations: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best seconds of each operation; see the module about the clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(operations, float("inf"))
    for _ in range(rounds):
        for name, operation in operations.items():
            started = clock()
            operation()
            best[name] = min(best[name], clock() - started)
    return best


def read_rate() -> float:
    """Bytes per second that torch's threads read from memory: the largest of several runs over 512 MiB."""
    x = torch.ones(2**26, dtype=torch.int64)
    return x.nbytes / interleaved({"read": lambda: x.sum()}, 15)["read"]


def measure_products(rounds: int, rate: float) -> list[dict[str, Any]]:
    found = []
    for name, (N, K) in PRODUCTS.items():
        weights = [torch.randn(N, K).bfloat16() for _ in range(max(int(HELD / (2 * N * K)), 1))]
        for T in TOKENS:
            x = torch.randn(T, K).bfloat16()
            y = linear(x, weights[0], invariant=True)
            kernels_cpu.check(name, y, x.double() @ weights[0].double().T)
            if not torch.equal(linear(x[T // 2 : T // 2 + 1], weights[0], invariant=True)[0], y[T // 2]):
                sys.exit(f"{name} is not batch-invariant, nothing is timed")
            some = weights if T < 64 else weights[:2]
            operations = {
                "invariant": partial(kernels_cpu.over, partial(linear, x, invariant=True), some),
                "torch": partial(kernels_cpu.over, partial(linear, x), some),
            }
            seconds = {
                key: s / len(some) for key, s in interleaved(operations, rounds if T < 64 else 4).items()
            }
            found.append({"name": f"{name} {N}x{K}", **record(T, 2 * N * K, 2.0 * T * N * K, seconds, rate)})
    return found


def measure_attention(rounds: int, rate: float) -> list[dict[str, Any]]:
    found = []
    for case, settings in CASES.items():
        for rows, contexts in settings:
            lengths = [n + rows for n in contexts]
            T, total = rows * len(lengths), sum(lengths)
            q = torch.randn(T, H, C).bfloat16()
            k, v = (torch.randn(total, J, C).bfloat16() for _ in range(2))
            operations: dict[str, Callable[[], object]] = {}
            for cache in CACHES:
                operations[f"{cache} cache"] = paged(q, k, v, lengths, rows, CACHES[cache])
            operations["torch SDPA, BF16"] = sdpa(q, k, v, lengths, rows)
            seconds = interleaved(operations, rounds if T < 64 else 3)
            pairs = sum(rows * n - rows * (rows - 1) // 2 for n in lengths)
            line = record(T, total * J * C * 2, 4.0 * pairs * H * C, seconds, rate)
            what = f"{len(lengths)} x {contexts[0]}" if len(lengths) > 1 else f"{contexts[0]}"
            found.append({"name": f"{case}, context {what}", **line})
    return found


def paged(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rows: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Attention of the last rows of each sequence over a cache of scattered blocks."""
    blocks = [-(-n // BLOCK) for n in lengths]
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    free, first = torch.randperm(sum(blocks)).int(), 0
    k_cache, v_cache = (torch.zeros(sum(blocks), BLOCK, J, C).to(dtype) for _ in range(2))
    scale = torch.tensor(0.01)
    for s, n in enumerate(lengths):
        table[s, : blocks[s]] = free[sum(blocks[:s]) : sum(blocks[: s + 1])]
        positions = torch.arange(n)
        slots = table[s].long()[positions // BLOCK] * BLOCK + positions % BLOCK
        write_kv(k[first : first + n], v[first : first + n], k_cache, v_cache, slots, scale, scale)
        first += n
    sequence = torch.arange(len(lengths)).repeat_interleave(rows).int()
    context = torch.cat([torch.arange(n - rows, n) + 1 for n in lengths]).int()
    given = (k_cache, v_cache, table)
    call = partial(attention, q, *given, sequence, context, None, scale, scale, softmax_scale=C**-0.5)
    y, some = call(), [0, len(q) - 1]
    arguments = (q[some], *given, sequence[some], context[some], None, scale, scale, C**-0.5)
    kernels_cpu.check("attention", y[some], fp8_kv_attention.reference.attention(*arguments), 50)
    if not torch.equal(
        attention(*arguments[:-1], softmax_scale=C**-0.5, invariant=True), call(invariant=True)[some]
    ):
        sys.exit("attention is not batch-invariant, nothing is timed")
    return call


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rows: int) -> Callable[[], None]:
    """torch's attention on keys that lie together as it likes them best, one sequence after the other."""
    inputs = []
    for s, (ks, vs) in enumerate(zip(k.split(list(lengths)), v.split(list(lengths)), strict=True)):
        qs = q[s * rows : (s + 1) * rows]
        heads = [t.transpose(0, 1)[None].contiguous() for t in (qs, ks, vs)]
        causal, mask = rows == lengths[s], None
        if rows > 1 and not causal:
            mask = torch.ones(rows, lengths[s], dtype=torch.bool).tril(lengths[s] - rows)
        inputs.append((*heads, mask, causal))

    def run() -> None:
        for qs, ks, vs, mask, causal in inputs:
            F.scaled_dot_product_attention(qs, ks, vs, mask, is_causal=causal, enable_gqa=True)

    return run


def record(T: int, nbytes: int, flops: float, seconds: Mapping[str, float], rate: float) -> dict[str, Any]:
    return {
        "rows": T,
        "limit_ms": round(nbytes / rate * 1e3, 4),
        "ms": {name: round(s * 1e3, 4) for name, s in seconds.items()},
        "gflop_per_s": {name: round(flops / s / 1e9, 1) for name, s in seconds.items()},
    }


def table(lines: Sequence[dict[str, Any]], limit: str) -> str:
    names = list(lines[0]["ms"])
    head = [
        "",
        "rows",
        limit,
        *(f"{n} ms" for n in names),
        *(f"{n} GFLOP/s" for n in names),
        "torch takes, times",
    ]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        ms = line["ms"]
        values = [line["name"], line["rows"], line["limit_ms"], *ms.values(), *line["gflop_per_s"].values()]
        rows.append([*map(str, values), f"{ms[names[-1]] / ms[names[0]]:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write JSON and markdown to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rate = read_rate()
    ops = ("linear", "fp8_kv_attention")
    results: dict[str, Any] = {
        "schema_version": 1,
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "machine": machine.facts(),
        "backends": {op: dispatch.choose(op, "cpu").reason for op in ops},
        "clock": "processor time" if args.threads == 1 else "wall",
        "read_gb_per_s": round(rate / 1e9, 2),
        "products": measure_products(args.rounds, rate),
        "attention": measure_attention(args.rounds, rate),
    }
    sections = {
        "Limit of this run": f"Reading {results['read_gb_per_s']} GB/s; times are {results['clock']}. "
        f"Products: {results['backends']['linear']}; attention: {results['backends']['fp8_kv_attention']}.",
        "What batch invariance costs: BF16 products": table(results["products"], "reading w ms"),
        f"Attention, {H} heads over {J} of {C}": table(results["attention"], "reading an FP8 cache ms"),
    }
    for title, body in sections.items():
        print(f"\n{title}\n\n{body}")
    if args.save:
        stem = f"kernels-cpu-ops-{results['date']}-{args.threads}t"
        kernels.RESULTS.mkdir(exist_ok=True)
        (kernels.RESULTS / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
        (kernels.RESULTS / f"{stem}.md").write_text(kernels.markdown(results, sections))


if __name__ == "__main__":
    main()
