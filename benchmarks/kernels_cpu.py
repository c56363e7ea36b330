"""The CPU part of benchmarks/kernels.py.

With `--threads 1` time is the thread's own processor time, so that a busy machine does not count as slowness of what
is measured; with more it is wall-clock time and the machine should be quiet.

Each product is timed over so many matrices in a row that no cache holds them, as a layer's are read from memory.  The
rivals get the same matrices: dequantized by torch for every product, or held in BF16, four times as large.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from m27quant.kernels import dispatch, nvfp4_gemm, nvfp4_moe
from m27quant.kernels.nvfp4_gemm import Activations
from m27quant.kernels.nvfp4_moe import ExpertWeights
from m27quant.kernels.nvfp4_pack import PackedNVFP4, unpack
from m27quant.kernels.nvfp4_pack.reference import E2M1_VALUES
from m27quant.kernels.nvfp4_quantize import fake_quantize

D, I, E, K = 3072, 1536, 256, 8
"""M2.7: hidden, intermediate, experts, experts per token."""
MODES: tuple[Activations, ...] = ("nvfp4", "bf16")
NAMES = {"nvfp4": "W4A4", "bf16": "W4A16"}
INPUT_SCALE = torch.tensor(0.002)
DISTINCT = 4
"""Experts that differ; the others repeat them in memory of their own."""
MATRICES = 48
"""Of one shape, 127 MB packed: more than caches hold."""
SLOW = 2
"""Matrices, or experts, that are dequantized in one round: it takes long and does not depend on which."""

Expert = tuple[PackedNVFP4, PackedNVFP4, PackedNVFP4]


def _pairs() -> Tensor:
    """Two BF16 numbers in an int32 for each byte of codes: the fastest way to dequantize that torch has."""
    byte = torch.arange(256)
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.bfloat16)
    return torch.stack((values[byte & 15], values[byte >> 4]), -1).view(torch.int32).flatten()


PAIRS = _pairs()


READ = "reading alone"
"""torch adds up the same codes, eight ninths of the packed bytes: the limit, under the same load as its neighbours."""


def random_packed(N: int, K: int) -> PackedNVFP4:
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    scale = (torch.rand(N, K // 16) * 400 + 16).to(torch.float8_e4m3fn)
    return PackedNVFP4(codes, scale, torch.tensor(1e-5))


def dequantize(packed: PackedNVFP4) -> Tensor:
    """BF16 [N, K] but for `weight_scale_2`, exact: E2M1 times E4M3 has six bits."""
    N, K2 = packed.weight.shape
    values = PAIRS.index_select(0, packed.weight.flatten().int()).view(torch.bfloat16).view(N, -1, 16)
    return (values * packed.weight_scale.bfloat16()[..., None]).view(N, K2 * 2)


def dequantize_and_multiply(x: Tensor, packed: PackedNVFP4) -> Tensor:
    return F.linear(x, dequantize(packed)) * packed.weight_scale_2.bfloat16()


def check(name: str, y: Tensor, expected: Tensor, db: float = 40.0) -> None:
    """Ends the run where a product is wrong."""
    noise = (y.double() - expected.double()).square().sum() / expected.double().square().sum()
    if not float(noise) < 10 ** (-db / 10):
        sys.exit(f"{name} is wrong, nothing is timed: noise is {float(noise):g} of the signal")


def interleaved(operations: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best seconds of each operation, which take turns; one thread counts by its own processor time."""
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


def product_rate() -> float:
    """FLOP/s of torch's BF16 product of 1024 rows."""
    x, w = torch.randn(1024, D).bfloat16(), torch.randn(D, D).bfloat16()
    return 2.0 * 1024 * D * D / interleaved({"product": lambda: F.linear(x, w)}, 7)["product"]


def measure(tokens: Sequence[int], experts: int | None, rounds: int) -> dict[str, Any]:
    """Everything, as plain data; seconds are of one product, or of one layer's experts."""
    gemm = {f"{N}x{K}": measure_gemm(N, K, tokens, rounds) for N, K in ((I, D), (D, I))}
    moe = measure_moe(tokens, experts or fitting_experts(), rounds)
    return {
        "backends": {op: dispatch.choose(op, "cpu").reason for op in ("nvfp4_gemm", "nvfp4_moe")},
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall-clock time",
        "limits": {
            "read_gb_per_s": round(read_rate() / 1e9, 2),
            "bf16_gflop_per_s": round(product_rate() / 1e9),
        },
        "gemm": gemm,
        "moe": moe,
    }


def measure_gemm(N: int, K: int, tokens: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    distinct = [random_packed(N, K) for _ in range(DISTINCT)]
    packed = [PackedNVFP4(*(t.clone() for t in distinct[i % DISTINCT])) for i in range(MATRICES)]
    weights = {mode: [nvfp4_gemm.prepare(p, activations=mode) for p in packed] for mode in MODES}
    plain = [dequantize(p) for p in distinct]
    bf16 = [plain[i % DISTINCT].clone() for i in range(MATRICES)]
    check("torch's dequantization", plain[0].double() * 1e-5, unpack(packed[0]), 120)
    found = []
    for x in (torch.randn(T, K).bfloat16() for T in tokens):
        for mode in MODES:
            value = fake_quantize(x.float(), INPUT_SCALE) if mode == "nvfp4" else x
            y = nvfp4_gemm.gemm(x, weights[mode][0], INPUT_SCALE)
            check(f"{NAMES[mode]} {N}x{K}", y, value.double() @ unpack(packed[0]).double().T)
        operations = {
            NAMES[mode]: partial(over, partial(nvfp4_gemm.gemm, x, input_scale=INPUT_SCALE), weights[mode])
            for mode in MODES
        }
        operations["torch BF16"] = partial(over, partial(F.linear, x), bf16)
        operations[READ] = partial(over, torch.sum, [w.tensors[0].view(torch.int64) for w in weights["bf16"]])
        seconds = {name: s / MATRICES for name, s in interleaved(operations, rounds).items()}
        slow = partial(over, partial(dequantize_and_multiply, x), packed[:SLOW])
        seconds["dequantize, then torch BF16"] = interleaved({"": slow}, 5)[""] / SLOW
        found.append(record(len(x), weights["bf16"][0].nbytes, 2.0 * len(x) * N * K, seconds))
    return found


def over(multiply: Callable[[Any], Tensor], weights: Sequence[Any]) -> None:
    """One product after the other."""
    for weight in weights:
        multiply(weight)


def fitting_experts() -> int:
    """As many experts as fit in half of what memory is free, packed for both modes and in BF16."""
    return min(E, int(psutil.virtual_memory().available / 2 / (D * I * 3 * (2 * 0.5625 + 2))))


def measure_moe(tokens: Sequence[int], experts: int, rounds: int) -> dict[str, Any]:
    distinct: list[Expert] = [
        (random_packed(I, D), random_packed(D, I), random_packed(I, D)) for _ in range(DISTINCT)
    ]
    held = {m: ExpertWeights.empty(experts, D, I, activations=m, device="cpu") for m in MODES}
    for weights in held.values():
        for e in range(experts):
            weights.set(e, *distinct[e % DISTINCT], INPUT_SCALE, INPUT_SCALE)
    w13 = torch.empty(experts, 2 * I, D, dtype=torch.bfloat16)
    w2 = torch.empty(experts, D, I, dtype=torch.bfloat16)
    for e in range(experts):
        one, two, three = distinct[e % DISTINCT]
        if e < DISTINCT:
            w13[e], w2[e] = torch.cat((dequantize(one), dequantize(three))), dequantize(two)
        else:
            w13[e], w2[e] = w13[e % DISTINCT], w2[e % DISTINCT]
    found = []
    for T in tokens:
        routed = (
            torch.randn(T, D).bfloat16(),
            torch.stack([torch.randperm(experts)[:K] for _ in range(T)]),
            torch.softmax(torch.randn(T, K), -1),
        )
        hit = routed[1].unique().tolist()
        _check_moe(*routed, held, distinct)
        operations = {NAMES[mode]: partial(_moe, *routed, held[mode]) for mode in MODES}
        operations["torch BF16"] = partial(torch_moe, *routed, hit, lambda e: (w13[e], w2[e]))
        operations["torch BF16, grouped_mm"] = partial(grouped_moe, *routed, w13, w2)
        codes = [held["bf16"].tensors[i][e].view(torch.int64) for e in hit for i in (0, 2, 4)]
        operations[READ] = partial(over, torch.sum, codes)
        seconds = interleaved(operations, rounds if T < 64 else max(rounds // 3, 2))
        some = hit[:SLOW]
        slow = partial(torch_moe, *routed, some, lambda e: _dequantized(distinct[e % DISTINCT]))
        seconds["dequantize, then torch BF16"] = interleaved({"": slow}, 3)[""] / len(some) * len(hit)
        nbytes = len(hit) * held["bf16"].nbytes // experts
        found.append({"experts_hit": len(hit), **record(T, nbytes, T * K * 6.0 * D * I, seconds)})
    return {"experts": experts, "tokens": found}


def _moe(x: Tensor, ids: Tensor, counts: Tensor, weights: ExpertWeights) -> Tensor:
    return nvfp4_moe.moe(x, weights, ids, counts)


def _dequantized(expert: Expert) -> tuple[Tensor, Tensor]:
    w1, w2, w3 = map(dequantize, expert)
    return torch.cat((w1, w3)), w2


def torch_moe(
    x: Tensor,
    ids: Tensor,
    counts: Tensor,
    hit: Sequence[int],
    weights: Callable[[int], tuple[Tensor, Tensor]],
) -> Tensor:
    """Expert by expert with torch's own products, the usual way."""
    y = torch.zeros(x.shape)
    for e in hit:
        rows, slots = (ids == e).nonzero(as_tuple=True)
        w13, w2 = weights(e)
        gate, up = F.linear(x[rows], w13).chunk(2, -1)
        y.index_add_(0, rows, F.linear(F.silu(gate) * up, w2) * counts[rows, slots, None])
    return y.to(x.dtype)


def grouped_moe(x: Tensor, ids: Tensor, counts: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """All experts at once by torch's grouped product."""
    order = ids.flatten().argsort()
    ends = ids.flatten().bincount(minlength=len(w13)).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // K], w13.transpose(1, 2), offs=ends).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    y = torch.zeros(x.shape)
    return y.index_add_(0, order // K, out * counts.flatten()[order, None]).to(x.dtype)


def _check_moe(
    x: Tensor, ids: Tensor, counts: Tensor, held: dict[Activations, ExpertWeights], distinct: Sequence[Expert]
) -> None:
    """Both modes against F64, for the first token."""
    for mode in MODES:
        expected = torch.zeros(D, dtype=torch.float64)
        for e, count in zip(ids[0].tolist(), counts[0].tolist(), strict=True):
            w1, w2, w3 = (unpack(p).double() for p in distinct[e % DISTINCT])
            h = x[:1].float()
            h = fake_quantize(h, INPUT_SCALE) if mode == "nvfp4" else h
            act = (F.silu(h.double() @ w1.T) * (h.double() @ w3.T)).bfloat16().float()
            act = fake_quantize(act, INPUT_SCALE) if mode == "nvfp4" else act
            expected += count * (act.double() @ w2.T)[0]
        check(f"{NAMES[mode]} experts", nvfp4_moe.moe(x, held[mode], ids, counts)[0], expected)


def record(T: int, nbytes: int, flops: float, seconds: dict[str, float]) -> dict[str, Any]:
    """One line of a table: seconds, and what follows from them."""
    limit = seconds.pop(READ) * 9 / 8
    return {
        "tokens": T,
        "packed_mb": round(nbytes / 1e6, 2),
        "limit_ms": round(limit * 1e3, 4),
        "ms": {name: round(s * 1e3, 4) for name, s in seconds.items()},
        "packed_gb_per_s": {name: round(nbytes / s / 1e9, 2) for name, s in seconds.items()},
        "gflop_per_s": {name: round(flops / s / 1e9, 1) for name, s in seconds.items()},
    }


def describe(results: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by title."""
    limits, clock = results["limits"], results["clock"]
    sections = {
        "Limits of this run": f"Reading {limits['read_gb_per_s']} GB/s, "
        f"BF16 product of 1024 rows {limits['bf16_gflop_per_s']} GFLOP/s. {results['backends']['nvfp4_gemm']}. "
        f"Milliseconds of {clock}; two figures in a cell are W4A4 / W4A16. "
        f"Dequantizing a layer's experts is measured on {SLOW} of them."
    }
    for shape, lines in results["gemm"].items():
        sections[f"Product {shape}"] = _table(lines)
    moe = results["moe"]
    sections[f"Experts of a layer: {moe['experts']} held, 8 of them for each token"] = _table(moe["tokens"])
    return sections


def _table(lines: Sequence[dict[str, Any]]) -> str:
    names = list(lines[0]["ms"])
    head = [
        "tokens",
        "packed MB",
        "reading alone ms",
        *(f"{name} ms" for name in names),
        "GB/s",
        "GFLOP/s",
        "times",
    ]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        ms = line["ms"]
        ratios = " / ".join(f"{ms['dequantize, then torch BF16'] / ms[NAMES[m]]:.1f}" for m in MODES)
        against = " / ".join(f"{ms['torch BF16'] / ms[NAMES[m]]:.1f}" for m in MODES)
        rows.append(
            [
                f"{line['tokens']}" + (f" ({line['experts_hit']} experts)" if "experts_hit" in line else ""),
                f"{line['packed_mb']:.1f}",
                f"{line['limit_ms']:.3f}",
                *(f"{ms[name]:.3f}" for name in names),
                " / ".join(f"{line['packed_gb_per_s'][NAMES[m]]:.1f}" for m in MODES),
                " / ".join(f"{line['gflop_per_s'][NAMES[m]]:.0f}" for m in MODES),
                f"{ratios} of dequantizing, {against} of BF16",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
