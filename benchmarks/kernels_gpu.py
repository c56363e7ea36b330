"""The CUDA part of benchmarks/kernels.py: products and M2.7's experts against the chip, torch and other packages.

The first thing that runs is exhaustive: all codes under all finite scales, exact or nothing is timed (it also shows
that the chip keeps subnormal BF16 factors).  Every timed call is compared with the reference on some of its tokens
before.  Time is that of a CUDA graph of several calls, each with a routing of its own, so that weights come from
memory and not from the cache; the median of the rounds counts.

Not run on a GPU yet: its logic is tested in Triton's interpreter, at small sizes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels_peers
from m27quant.kernels import dispatch, nvfp4_gemm, nvfp4_moe
from m27quant.kernels.nvfp4_gemm import Activations, tiles
from m27quant.kernels.nvfp4_moe import ExpertWeights, reference
from m27quant.kernels.nvfp4_pack import PackedNVFP4, unpack
from m27quant.kernels.nvfp4_quantize import fake_quantize

TOKENS = (1, 8, 32, 256, 1024, 4096)
MODES: tuple[Activations, ...] = ("nvfp4", "bf16")
NAMES = {"nvfp4": "W4A4", "bf16": "W4A16"}
CHECKED = 16
"""Tokens of a batch that are compared with the reference."""
CLOSE_DB = 40.0


CANDIDATES = [
    tiles.Tile(*tile)
    for tile in (
        (64, 16, 256, 4, 4), (64, 16, 256, 4, 3), (64, 16, 128, 4, 5), (128, 16, 128, 4, 4), (128, 16, 256, 8, 3),
        (128, 32, 128, 4, 4), (64, 32, 256, 4, 3), (128, 32, 256, 8, 3), (128, 64, 128, 4, 3), (128, 64, 128, 8, 3),
        (64, 64, 128, 4, 4), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3),
    )
]  # fmt: skip
"""Rows of weights, tokens, columns, warps, stages."""


class Sizes(NamedTuple):
    """A layer's experts; M2.7's by default."""

    D: int = 3072
    I: int = 1536
    E: int = 256
    K: int = 8

    @property
    def weight_bytes(self) -> float:
        """Of one expert in NVFP4."""
        return 3 * self.D * self.I * 9 / 16


class Batch(NamedTuple):
    """Tokens and where they go."""

    x: Tensor
    """BF16 [T, D]."""
    experts: Tensor
    """I64 [T, K]."""
    weights: Tensor
    """F32 [T, K]."""


def measure(
    device: torch.device,
    tokens: Sequence[int] = TOKENS,
    sizes: Sizes | None = None,
    rounds: int = 20,
    *,
    tiles_too: bool = False,
) -> dict[str, Any]:
    """Everything, as plain data; microseconds are of one layer's experts, or of one product."""
    sizes = sizes or Sizes()
    started = time.perf_counter()
    exact(device)
    layer = Layer(sizes, device)
    limits = ceilings(device, small=device.type == "cpu")
    found = {
        "backends": {op: dispatch.choose(op, device).reason for op in ("nvfp4_gemm", "nvfp4_moe")},
        "sizes": sizes._asdict(),
        "limits": limits,
        "moe": [measure_moe(layer, T, rounds, limits) for T in tokens],
        "gemm": [measure_gemm(layer, T, rounds) for T in tokens],
        "sweep": sweep(layer, tokens, rounds) if tiles_too else [],
    }
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def exact(device: torch.device) -> None:
    """All 16 codes under all 254 finite block scales, each alone in a sum: equal in every bit."""
    codes = torch.arange(256, device=device)
    scale_N1 = codes[(codes & 0x7F) != 0x7F].to(torch.uint8)[:, None].view(torch.float8_e4m3fn)
    nibbles = (torch.arange(16, device=device) + torch.arange(254, device=device)[:, None]) % 16
    packed = PackedNVFP4(
        (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8), scale_N1, torch.ones((), device=device)
    )
    for dtype in (torch.bfloat16, torch.float32):
        weight = nvfp4_gemm.prepare(packed, activations="bf16")
        y = nvfp4_gemm.gemm(torch.eye(16, dtype=dtype, device=device), weight)
        wrong = int((y.float() != unpack(packed).T).sum())
        if wrong:
            sys.exit(
                f"{wrong} of {y.numel()} products of a code and a scale are wrong with {dtype}: nothing is timed"
            )


class Layer:
    """All experts of a layer: ours in both modes, as the reference takes them, and in BF16."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        D, I, E, _ = sizes
        self.input_scales = torch.tensor(0.0018, device=device), torch.tensor(0.02, device=device)
        self.ours = {m: ExpertWeights.empty(E, D, I, activations=m, device=device) for m in MODES}
        self.plain = reference.empty(E, D, I, "nvfp4", device)
        self.w13_bf16 = torch.empty(E, 2 * I, D, dtype=torch.bfloat16, device=device)
        self.w2_bf16 = torch.empty(E, D, I, dtype=torch.bfloat16, device=device)
        for e in range(E):
            w1, w2, w3 = (random_packed(N, K, device) for N, K in ((I, D), (D, I), (I, D)))
            reference.fill(self.plain, e, w1, w2, w3, *self.input_scales)
            for weights in self.ours.values():
                weights.set(e, w1, w2, w3, *self.input_scales)
            self.w13_bf16[e, :I], self.w13_bf16[e, I:], self.w2_bf16[e] = unpack(w1), unpack(w3), unpack(w2)

    def batch(self, T: int, seed: int) -> Batch:
        """Uniform routing, another one for each seed."""
        D, _, E, K = self.sizes
        g = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(T, D, generator=g, device=self.device).bfloat16()
        scores, experts = torch.rand(T, E, generator=g, device=self.device).topk(K)
        return Batch(x, experts, scores / scores.sum(1, keepdim=True))


def random_packed(N: int, K: int, device: torch.device) -> PackedNVFP4:
    """Values of a standard deviation near 1 / sqrt(K), as trained weights have."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(N, K // 16, device=device) * 400 + 16).to(torch.float8_e4m3fn)
    return PackedNVFP4(codes, scale, torch.tensor(1 / (700 * K**0.5), device=device))


def ceilings(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """What this chip does at best today: bytes moved by a copy, read and written; FLOP of BF16 products."""
    source = torch.ones(2**20 if small else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds([lambda: target.copy_(source)], device, 10) * 1e6
    best = 0.0
    for M, N, K in (
        ((256, 256, 256),) if small else ((8192, 8192, 8192), (16384, 8192, 4096), (4096, 3072, 3072))
    ):
        a, b = (torch.randn(n, K, device=device).bfloat16() for n in (M, N))
        best = max(best, 2.0 * M * N * K / microseconds([lambda a=a, b=b: a @ b.T], device, 10) * 1e6)  # type: ignore[misc]
    return {"copy_bytes_per_s": copy, "bf16_flop_per_s": best}


def microseconds(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int, *, capture: bool = True
) -> float:
    """Median time of one of `calls`, which run one after the other: in a CUDA graph, unless they wait for the host."""
    if device.type == "cpu":  # where only the logic is looked at
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls) * 1e6
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        run: Callable[[], object] = lambda: [call() for call in calls]  # noqa: E731
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept = run()  # noqa: F841  # outputs live as long as the graph
            run = graph.replay
        times = []
        for _ in range(rounds + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def limit(sizes: Sizes, T: int, hit: float, limits: dict[str, float]) -> dict[str, float]:
    """What the layer has to move and to compute, and how long that takes at the measured ceilings."""
    D, I, _, K = sizes
    moved = hit * sizes.weight_bytes + T * (2 * D * 2) + T * K * (2 * 2 * I + 2 * 4 * D)
    flop = 2.0 * T * K * 3 * D * I
    memory, compute = moved / limits["copy_bytes_per_s"] * 1e6, flop / limits["bf16_flop_per_s"] * 1e6
    return {"bytes": moved, "flop": flop, "memory_us": memory, "compute_us": compute}


def measure_moe(layer: Layer, T: int, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """One number of tokens: ours in every mode, then torch, then other packages."""
    calls = max(1, min(16, 4096 // T)) if layer.device.type != "cpu" else 1
    batches = [layer.batch(T, seed) for seed in range(calls)]
    hit = statistics.mean(float(len(b.experts.unique())) for b in batches)
    physical = limit(layer.sizes, T, hit, limits)
    times: dict[str, float | str] = {}
    for mode in MODES:
        for invariant in (False, True):
            check(layer, batches[0], mode, invariant)
            name = NAMES[mode] + (", invariant" if invariant else "")
            runs = [
                lambda b=b, m=mode, i=invariant: nvfp4_moe.moe(b.x, layer.ours[m], *b[1:], invariant=i)  # type: ignore[misc]
                for b in batches
            ]
            times[name] = microseconds(runs, layer.device, rounds)
    for name, rival in {**RIVALS, **kernels_peers.moe_rivals(layer)}.items():
        times[name] = attempt(rival, layer, batches, rounds)
    best = max(physical["memory_us"], physical["compute_us"])
    shares = {
        name: round(best / t, 3)
        for name, t in times.items()
        if isinstance(t, float) and name.startswith("W4")
    }
    return {"tokens": T, "experts_hit": hit, **physical, "us": times, "share_of_limit": shares}


def check(layer: Layer, batch: Batch, mode: Activations, invariant: bool) -> None:
    y_TD = nvfp4_moe.moe(batch.x, layer.ours[mode], *batch[1:], invariant=invariant)
    rows = torch.linspace(0, len(y_TD) - 1, min(CHECKED, len(y_TD)), device=layer.device).long()
    some = [t[rows] for t in batch]
    expected = reference.moe(some[0], layer.plain, some[1], some[2], 0, mode, False)
    compare(f"{NAMES[mode]} experts, {len(y_TD)} tokens", y_TD[rows], expected)


def compare(name: str, y: Tensor, expected: Tensor) -> None:
    """End the run where a result is wrong."""
    noise = float((y.double() - expected.double()).square().sum() / expected.double().square().sum())
    if not noise < 10 ** (-CLOSE_DB / 10):
        sys.exit(f"{name}: wrong, noise is {noise:g} of the signal; nothing more is timed")


def attempt(
    rival: Callable[[Layer, Batch], Tensor], layer: Layer, batches: Sequence[Batch], rounds: int
) -> float | str:
    """A rival's time, once its result is right; or why there is none."""
    try:
        y_TD = rival(layer, batches[0])[:CHECKED]
        some = [t[:CHECKED] for t in batches[0]]
        expected = reference.moe(some[0], layer.plain, some[1], some[2], 0, "bf16", False)
        noise = float((y_TD.double() - expected.double()).square().sum() / expected.double().square().sum())
        if not noise < 1e-3:
            return f"wrong: noise is {noise:.1e} of the signal"
        runs = [lambda b=b: rival(layer, b) for b in batches]  # type: ignore[misc]
        return microseconds(runs, layer.device, rounds, capture=rival is torch_grouped)
    except Exception as error:  # noqa: BLE001  # a rival may fail in any way
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def torch_grouped(layer: Layer, batch: Batch) -> Tensor:
    """BF16 weights, `grouped_mm`, tokens sorted by expert within the call."""
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
    x_TD, experts_TK, weights_TK = batch
    (T, D), K, E = x_TD.shape, experts_TK.shape[1], layer.sizes.E
    order = experts_TK.flatten().argsort(stable=True)
    counts = torch.zeros(E, dtype=torch.int32, device=x_TD.device)
    counts.scatter_add_(0, experts_TK.flatten(), torch.ones_like(order, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = grouped(x_TD[order // K], layer.w13_bf16.mT, offs=ends).chunk(2, 1)
    out = grouped(F.silu(gate) * up, layer.w2_bf16.mT, offs=ends)
    y_SD = torch.empty(T * K, D, dtype=torch.float32, device=x_TD.device)
    y_SD[order] = out.float() * weights_TK.flatten()[order][:, None]
    return y_SD.view(T, K, D).sum(1).bfloat16()


def torch_plain(layer: Layer, batch: Batch) -> Tensor:
    """BF16 weights, one product after the other, as most Python models do; it waits for the routing."""
    x_TD, experts_TK, weights_TK = batch
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for e in experts_TK.unique().tolist():
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], layer.w13_bf16[e]).chunk(2, 1)
        out = F.linear(F.silu(gate) * up, layer.w2_bf16[e])
        y_TD.index_add_(0, token, out.float() * weights_TK[token, slot, None])
    return y_TD.bfloat16()


def sweep(layer: Layer, tokens: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """W4A16 with other tiles than the table's: what to put there for this chip.  Wrong ones are not timed either."""
    found = []
    for T in tokens:
        batches = [layer.batch(T, seed) for seed in range(max(1, min(8, 4096 // T)))]
        runs = [lambda b=b: nvfp4_moe.moe(b.x, layer.ours["bf16"], *b[1:]) for b in batches]  # type: ignore[misc]
        times: dict[str, float | str] = {}
        for tile in CANDIDATES:
            with mock.patch.object(tiles, "bf16", return_value=tile):
                try:
                    check(layer, batches[0], "bf16", False)
                    times[str(tuple(tile))] = microseconds(runs, layer.device, rounds)
                except (Exception, SystemExit) as error:  # noqa: BLE001  # it may be wrong, or not compile, or not fit
                    times[str(tuple(tile))] = type(error).__name__
        found.append({"tokens": T, "us": times})
    return found


RIVALS: dict[str, Callable[[Layer, Batch], Tensor]] = {
    "torch BF16, grouped_mm": torch_grouped,
    "torch BF16, plain": torch_plain,
}


def measure_gemm(layer: Layer, T: int, rounds: int) -> dict[str, Any]:
    """One projection [D, D] over 48 matrices in a row, 255 MB packed for M2.7: more than caches hold."""
    D, device = layer.sizes.D, layer.device
    count = 48 if device.type != "cpu" else 2
    packed = [random_packed(D, D, device) for _ in range(count)]
    x = torch.randn(T, D, device=device).bfloat16()
    scale, times = layer.input_scales[0], {}
    for mode in MODES:
        weights = [nvfp4_gemm.prepare(p, activations=mode) for p in packed]
        rows = slice(0, CHECKED)
        value = fake_quantize(x[rows].float(), scale) if mode == "nvfp4" else x[rows]
        y = nvfp4_gemm.gemm(x, weights[0], scale)
        compare(f"{NAMES[mode]} product, {T} tokens", y[rows], value.double() @ unpack(packed[0]).double().T)
        runs = [lambda w=w: nvfp4_gemm.gemm(x, w, scale) for w in weights]  # type: ignore[misc]
        times[NAMES[mode]] = microseconds(runs, device, rounds)
    plain = [unpack(p).bfloat16() for p in packed]
    times["torch BF16"] = microseconds([lambda w=w: F.linear(x, w) for w in plain], device, rounds)  # type: ignore[misc]
    return {"tokens": T, "us": times}


def describe(results: dict[str, Any]) -> dict[str, str]:
    """Tables in markdown."""
    limits, moe = results["limits"], results["moe"]
    names = list(dict.fromkeys(name for row in moe for name in row["us"]))
    head = ["tokens", "experts hit", "limit µs", "by", *names]
    lines = [
        [
            str(row["tokens"]),
            f"{row['experts_hit']:.1f}",
            f"{max(row['memory_us'], row['compute_us']):.1f}",
            "memory" if row["memory_us"] > row["compute_us"] else "BF16 products",
            *(_time(row["us"].get(name), row["share_of_limit"].get(name)) for name in names),
        ]
        for row in moe
    ]
    gemm_names = list(results["gemm"][0]["us"])
    gemm = [[str(row["tokens"]), *(f"{row['us'][n]:.1f}" for n in gemm_names)] for row in results["gemm"]]
    measured = (
        f"Measured in this run: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), BF16 products "
        f"{limits['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s. {results['seconds']} s in all."
    )
    found = {}
    if results["sweep"]:
        sizes = [str(row["tokens"]) for row in results["sweep"]]
        names = list(results["sweep"][0]["us"])
        rows = [[n, *(_time(row["us"][n], None) for row in results["sweep"])] for n in names]
        found["W4A16 with other tiles, µs"] = _table(["tile", *(f"{n} tokens" for n in sizes)], rows)
    backends = "; ".join(f"{op}: {reason}" for op, reason in results["backends"].items())
    return {
        "Limits": f"{measured}\n\n{backends}.",
        "Experts of a layer, µs (share of the limit)": _table(head, lines)
        + "\n\nOurs and grouped_mm in a CUDA graph; the others launched one by one, as they may wait for the host.",
        "One product [D, D], µs": _table(["tokens", *gemm_names], gemm),
    } | found


def _time(value: float | str | None, share: float | None) -> str:
    if not isinstance(value, float):
        return value or "-"
    return f"{value:.1f}" + (f" ({share:.0%})" if share is not None else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
