"""The rest of a decoder layer on CUDA: attention, projections, router, norms, quantizing activations, at M2.7's widths.

As in `kernels_gpu`, nothing is timed that is not right first, and times are those of CUDA graphs.  Caches, weights and
activations of the calls in a graph are different ones, so that they come from memory.

Not run on a GPU yet; `measure(..., small=True)` runs on a CPU, to see its logic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_gpu import _table, compare, microseconds
from m27quant.kernels import dispatch
from m27quant.kernels.fp8_kv_attention import attention
from m27quant.kernels.fp8_kv_attention import reference as attention_reference
from m27quant.kernels.linear import linear
from m27quant.kernels.nvfp4_quantize import quantize
from m27quant.kernels.nvfp4_quantize import reference as quantize_reference
from m27quant.kernels.rms_norm import reference as norm_reference
from m27quant.kernels.rms_norm import rms_norm
from m27quant.kernels.rotary import qk_norm_rope
from m27quant.kernels.rotary import reference as rotary_reference
from m27quant.kernels.router import reference as router_reference
from m27quant.kernels.router import route

OPS = ("fp8_kv_attention", "linear", "router", "rms_norm", "rotary", "nvfp4_quantize")
TOKENS = (1, 8, 64, 512, 4096)
DECODE = tuple((sequences, context) for sequences in (1, 4, 32) for context in (1024, 8192, 32768))


class Sizes(NamedTuple):
    """M2.7's by default."""

    D: int = 3072
    H: int = 48
    J: int = 8
    C: int = 128
    R: int = 64
    E: int = 256
    K: int = 8
    V: int = 200064
    page: int = 64


SMALL = Sizes(64, 4, 2, 16, 8, 8, 2, 96, 4)


def measure(
    device: torch.device, copy_bytes_per_s: float, rounds: int = 20, *, small: bool = False
) -> dict[str, Any]:
    """Everything, as plain data; times in microseconds of one call."""
    sizes = SMALL if small else Sizes()
    tokens = (1, 3) if small else TOKENS
    decode = ((1, 8), (2, 16)) if small else DECODE
    bench = _Bench(sizes, device, copy_bytes_per_s, rounds)
    return {
        "backends": {op: dispatch.choose(op, device).reason for op in OPS},
        "decode": [bench.decode(sequences, context) for sequences, context in decode],
        "verify": [bench.decode(1, context, rows=8) for _, context in decode[:1]],
        "prefill": [bench.prefill(T) for T in (tokens[-1],)],
        "linear": [bench.linear(N, K, T) for N, K in bench.projections() for T in tokens],
        "router": [bench.router(T) for T in tokens],
        "quantize": [bench.quantize(T) for T in tokens],
        "norm": [bench.norm(T) for T in tokens],
    }


class _Bench:
    def __init__(self, sizes: Sizes, device: torch.device, copy_bytes_per_s: float, rounds: int) -> None:
        self.sizes, self.device, self.rounds = sizes, device, rounds
        self.copy = copy_bytes_per_s
        s = sizes
        blocks = 8 if device.type == "cpu" else 2**20 // s.page  # 1 Mi positions: 2 GiB
        shape = (blocks, s.page, s.J, s.C)
        self.caches = tuple(
            torch.randint(0, 126, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            for _ in range(2)
        )  # positive numbers: attention is not an average of noise
        self.scale = torch.tensor(0.01, device=device)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def time(self, calls: Sequence[Callable[[], object]]) -> float:
        return round(microseconds(calls, self.device, self.rounds), 2)

    def projections(self) -> list[tuple[int, int]]:
        """[N, K] of q, of k and v, of the output projection and of the head."""
        s = self.sizes
        return [(s.H * s.C, s.D), (s.J * s.C, s.D), (s.D, s.H * s.C), (s.V, s.D)]

    def attend(self, T: int, S: int, context: Tensor, table: Tensor, q: Tensor, invariant: bool) -> Tensor:
        sequence = torch.arange(S, dtype=torch.int32, device=self.device).repeat_interleave(T // S)
        lists = (table, sequence, context, None, self.scale, self.scale)
        return attention(
            q, *self.caches, *lists, softmax_scale=self.sizes.C**-0.5, invariant=invariant
        )  # fmt: skip

    def tables(self, S: int, context: int) -> list[Tensor]:
        """Block tables that share nothing: as many as fit into the caches, at most 16."""
        blocks = -(-context // self.sizes.page)
        order = torch.randperm(len(self.caches[0]), device=self.device).int()
        count = max(1, min(16, len(order) // (S * blocks)))
        return [order[i * S * blocks :][: S * blocks].view(S, blocks) for i in range(count)]

    def decode(self, S: int, context: int, rows: int = 1) -> dict[str, Any]:
        """`rows` rows for each sequence: 1 for plain decoding, more for a chain of drafts."""
        s, T = self.sizes, S * rows
        lengths = torch.full((T,), context, dtype=torch.int32, device=self.device)
        lengths -= torch.arange(rows, dtype=torch.int32, device=self.device).flip(0).repeat(S)
        tables, q = self.tables(S, context), self.random(T, s.H, s.C)
        moved = S * context * 2 * s.J * s.C
        found: dict[str, Any] = {"sequences": S, "context": context, "rows": rows, "bytes": moved}
        found["limit_us"] = round(moved / self.copy * 1e6, 2)
        for name, invariant in (("ours", False), ("ours, invariant", True)):
            y = self.attend(T, S, lengths, tables[0], q, invariant)
            some = slice(T - 1, T)
            expected = attention_reference.attention(
                q[some], *self.caches, tables[0][-1:], torch.zeros_like(lengths[some]), lengths[some], None,
                self.scale, self.scale, s.C**-0.5,
            )  # fmt: skip
            compare(f"attention of {S} x {context}, {name}", y[some], expected)
            calls = [lambda t=t, i=invariant: self.attend(T, S, lengths, t, q, i) for t in tables]  # type: ignore[misc]
            found[name] = self.time(calls)
        return found

    def prefill(self, T: int) -> dict[str, Any]:
        """One sequence from its first token on, beside torch's attention over BF16 keys."""
        s = self.sizes
        lengths = torch.arange(1, T + 1, dtype=torch.int32, device=self.device)
        table, q = self.tables(1, T)[0], self.random(T, s.H, s.C)
        found: dict[str, Any] = {"tokens": T, "flop": 2.0 * T * (T + 1) * s.H * s.C}
        for name, invariant in (("ours", False), ("ours, invariant", True)):
            y = self.attend(T, 1, lengths, table, q, invariant)
            expected = attention_reference.attention(
                q[-2:], *self.caches, table, torch.zeros_like(lengths[-2:]), lengths[-2:], None,
                self.scale, self.scale, s.C**-0.5,
            )  # fmt: skip
            compare(f"prefill of {T}, {name}", y[-2:], expected)
            found[name] = self.time([lambda i=invariant: self.attend(T, 1, lengths, table, q, i)])  # type: ignore[misc]
        k, v = self.random(1, s.J, T, s.C), self.random(1, s.J, T, s.C)
        plain = q.transpose(0, 1)[None].contiguous()
        found["torch BF16"] = self.time(
            [lambda: F.scaled_dot_product_attention(plain, k, v, is_causal=True, enable_gqa=True)]
        )
        return found

    def linear(self, N: int, K: int, T: int) -> dict[str, Any]:
        count = 2 if self.device.type == "cpu" else max(1, min(8, 2**28 // (N * K)))
        weights, x = [self.random(N, K) for _ in range(count)], self.random(T, K)
        expected = x[:16].double() @ weights[0].double().T
        compare(f"invariant product [{N}, {K}]", linear(x, weights[0], invariant=True)[:16], expected)
        moved = 2 * (N * K + T * (N + K))
        found: dict[str, Any] = {"N": N, "K": K, "tokens": T, "limit_us": round(moved / self.copy * 1e6, 2)}
        for name, invariant in (("torch BF16", False), ("ours, invariant", True)):
            found[name] = self.time([lambda w=w, i=invariant: linear(x, w, invariant=i) for w in weights])  # type: ignore[misc]
        return found

    def router(self, T: int) -> dict[str, Any]:
        s = self.sizes
        h, gate, bias = (
            self.random(T, s.D),
            self.random(s.E, s.D, dtype=torch.float32),
            self.random(s.E, dtype=torch.float32),
        )
        gate *= s.D**-0.5
        experts, weights = route(h, gate, bias, s.K)
        chosen, expected = router_reference.select(h.double().mm(gate.double().T).float(), bias, s.K)
        same = (experts == chosen).all(1)  # but for scores closer together than F32 sums are sure of
        compare(f"router, {T} tokens", weights[same], expected[same])
        if float(same.double().mean()) < 0.99:
            raise SystemExit(f"router, {T} tokens: {int((~same).sum())} rows chose other experts")

        def plain() -> tuple[Tensor, Tensor]:
            scores = torch.sigmoid(F.linear(h.float(), gate))
            best = torch.topk(scores + bias, s.K, dim=-1).indices
            picked = scores.gather(1, best)
            return best, picked / picked.sum(-1, keepdim=True)

        return {
            "tokens": T,
            "ours": self.time([lambda: route(h, gate, bias, s.K)]),
            "torch": self.time([plain]),
        }

    def quantize(self, T: int) -> dict[str, Any]:
        s = self.sizes
        inputs = [self.random(T, s.D) for _ in range(8)]
        found: dict[str, Any] = {"tokens": T}
        found["limit_us"] = round(T * s.D * (2 + 9 / 16) / self.copy * 1e6, 2)
        expected = quantize_reference.quantize(inputs[0], self.scale)
        for layout in ("plain", "swizzled"):
            codes, scales = quantize(inputs[0], self.scale, layout=layout)  # type: ignore[arg-type]
            wanted = expected[1] if layout == "plain" else quantize_reference.swizzle(expected[1])
            if not torch.equal(codes, expected[0]) or not torch.equal(
                scales.view(torch.uint8), wanted.view(torch.uint8)
            ):
                raise SystemExit(f"activations of {T} tokens, {layout}: other bytes than the reference's")
            found[layout] = self.time(
                [lambda x=x, n=layout: quantize(x, self.scale, layout=n) for x in inputs]
            )  # type: ignore[misc]
        found["torch"] = self.time([lambda x=x: quantize_reference.quantize(x, self.scale) for x in inputs])  # type: ignore[misc]
        return found

    def norm(self, T: int) -> dict[str, Any]:
        s = self.sizes
        x, weight = self.random(T, s.D), self.random(s.D)
        q, k = self.random(T, s.H * s.C), self.random(T, s.J * s.C)
        table = (self.random(T, 1, s.R), self.random(T, 1, s.R))
        rotated = (q, k, self.random(s.H * s.C), self.random(s.J * s.C), *table, s.C, 1e-6)
        compare(f"norm of {T}", rms_norm(x, weight, 1e-6), norm_reference.rms_norm(x, weight, 1e-6))
        pairs = zip(qk_norm_rope(*rotated), rotary_reference.qk_norm_rope(*rotated), strict=True)
        for found, expected in pairs:
            compare(f"query/key norm and rotation of {T}", found, expected)
        return {
            "tokens": T,
            "rms_norm": self.time([lambda: rms_norm(x, weight, 1e-6)]),
            "rms_norm, torch": self.time([lambda: norm_reference.rms_norm(x, weight, 1e-6)]),
            "qk_norm_rope": self.time([lambda: qk_norm_rope(*rotated)]),
            "qk_norm_rope, torch": self.time([lambda: rotary_reference.qk_norm_rope(*rotated)]),
        }


TITLES = {
    "decode": "Attention, one row for each sequence",
    "verify": "Attention, eight rows of one sequence",
    "prefill": "Attention, one whole sequence",
    "linear": "Projections and head",
    "router": "Router",
    "quantize": "Activations to NVFP4",
    "norm": "Norms and rotary embedding",
}


def describe(results: dict[str, Any]) -> dict[str, str]:
    """Tables in markdown, times in microseconds."""
    sections = {}
    for key, title in TITLES.items():
        rows = results[key]
        head = list(rows[0])
        sections[f"{title}, µs"] = _table(head, [[f"{row[name]:,}" for name in head] for row in rows])
    return sections
