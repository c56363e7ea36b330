"""Decoding at full size on one GPU against the memory's bandwidth: random NVFP4 weights, made where they are used.

What a step has to read: attention, router, head, every expert that some token of the batch goes to, and the cache.
The routing is measured on the same weights.  Time is that of whole engine steps, scheduling and sampling included.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.synthetic import Size
from benchmarks.synthetic_nvfp4 import BLOCK_SCALE, E2M1_RMS, INPUT_AMAX, KV_SCALE
from m27quant import LLM, RunOptions, SamplingParams
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.kernels import chip
from m27quant.kernels.nvfp4_moe import ExpertWeights
from m27quant.kernels.nvfp4_pack import GROUP, PackedNVFP4
from m27quant.runtime.experts import PackedExperts
from m27quant.runtime.kv_cache import CacheShape, KvCache
from m27quant.runtime.layer import AttentionWeights, RouterWeights
from m27quant.runtime.memory import Budget, step_bytes
from m27quant.runtime.model import LayerWeights, Model
from m27quant.runtime.probe import logits_of

BATCHES = (1, 8, 32)
PROMPT = 128
WARM_UP = 8


def measure(
    *,
    layers: int,
    tokens: int,
    device: str = "cuda",
    size: Size | None = None,
    batches: tuple[int, ...] = BATCHES,
) -> dict[str, Any]:
    """Seconds of a decoding step at each batch, and what the bandwidth allows."""
    where = torch.device(device)
    size = size or Size(num_hidden_layers=layers, vocab_size=200_064)
    config = parse_config({k: v for k, v in size.config().items() if k != "quantization_config"})
    fp4 = where.type == "cuda" and chip.of(where).fp4
    options = RunOptions(
        device=device, max_num_seqs=max(batches), max_model_len=PROMPT + WARM_UP + tokens + 16, prefix_caching=False,
        activations="nvfp4" if fp4 else "bf16",
    )  # fmt: skip
    rate = 2 * machine.copy_rate(
        where, 2**30 if where.type == "cuda" else 2**26
    )  # each byte is read and written
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        llm = make(config, options, where, Path(folder))
        rows = [_decode(llm, batch, tokens, rate) for batch in batches]
    lines = [
        f"{config.num_hidden_layers} layers of {config.num_local_experts} experts, {llm.model.nbytes / 1e9:.1f} GB, "
        f"on {torch.cuda.get_device_name(where) if where.type == 'cuda' else 'cpu'}; "
        f"{'W4A4' if fp4 else 'W4A16'}, FP8 cache, prompts of {PROMPT} tokens, {tokens} steps timed. "
        f"Copying moves {rate / 1e12:.2f} TB/s.",
        "",
        "| batch | ms per step | tokens/s | GB read a step | experts a layer | ms at copying speed | share of it |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['batch']} | {r['ms_per_step']:.2f} | {r['tokens_per_s']:.1f} | {r['gb_per_step']:.2f} | "
            f"{r['experts_per_layer']:.1f} | {r['limit_ms']:.2f} | {r['share_of_limit']:.0%} |"
            for r in rows
        ),
    ]
    return {"layers": config.num_hidden_layers, "bytes_per_s": rate, "rows": rows, "lines": lines}


def make(config: M2Config, options: RunOptions, device: torch.device, folder: Path) -> LLM:
    """An engine around random weights."""
    generator = torch.Generator(device).manual_seed(0)
    layers = [_layer(config, options, device, generator) for _ in range(config.num_hidden_layers)]
    table = (config.vocab_size, config.hidden_size)
    assert options.max_model_len is not None
    model = Model(
        config,
        embedding_VD=_normal(table, 1.0, generator),
        layers=layers,
        norm_D=_normal((config.hidden_size,), 0.1, generator) + 1,
        head_VD=_normal(table, config.hidden_size**-0.5, generator),
        max_length=options.max_model_len,
        invariant=device.type == "cpu",
    )
    shape = CacheShape(
        num_layers=config.num_hidden_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        dtype=torch.float8_e4m3fn, block_size=options.block_size, num_taps=0, hidden_size=config.hidden_size,
        taps_dtype=torch.bfloat16,
    )  # fmt: skip
    blocks = options.max_num_seqs * -(-options.max_model_len // options.block_size)
    plan = Budget.of(device, None).plan(
        shape,
        weight_bytes=0,  # they are there already
        drafter_bytes=0,
        step_bytes=step_bytes(
            config,
            num_tokens=options.max_num_batched_tokens,
            num_logits=options.max_num_seqs,
            dtype=torch.bfloat16,
        ),
        most_blocks=blocks,
        cache_bytes=None,
    )
    return LLM(model, KvCache(shape, plan.num_blocks, device), folder, options, plan)


def _decode(llm: LLM, batch: int, tokens: int, rate: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    vocab = llm.model.config.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=WARM_UP + tokens + 8, ignore_eos=True)
    requests = [
        llm.submit(torch.randint(vocab, (PROMPT,), generator=generator).tolist(), params)
        for _ in range(batch)
    ]
    while min(r.num_output for r in requests) < WARM_UP:  # prompts, then graphs are captured
        llm.step()
    _wait(llm.model.device)
    started = time.perf_counter()
    for _ in range(tokens):
        llm.step()
    _wait(llm.model.device)
    seconds = (time.perf_counter() - started) / tokens
    keys = sum(len(r.tokens) for r in requests)
    for request in requests:
        llm.cancel(request)
    experts = _experts_per_layer(llm.model, batch)
    read = _bytes_per_step(llm, experts, keys)
    return {
        "batch": batch, "ms_per_step": seconds * 1e3, "tokens_per_s": batch / seconds, "gb_per_step": read / 1e9,
        "experts_per_layer": experts, "limit_ms": read / rate * 1e3, "share_of_limit": read / rate / seconds,
    }  # fmt: skip


def _experts_per_layer(model: Model, batch: int) -> float:
    """How many different experts the tokens of a step go to, on average of layers and of some steps."""
    counts: list[int] = []
    for seed in range(4):
        ids = torch.randint(
            model.config.vocab_size, (batch,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        logits_of(model, ids, lambda _index, _h, routing: counts.append(len(routing.experts.unique())))
    return sum(counts) / len(counts)


def _bytes_per_step(llm: LLM, experts_per_layer: float, num_keys: int) -> float:
    model = llm.model
    held = sum(layer.experts.nbytes for layer in model.layers)
    dense = model.nbytes - held - model.embedding.nbytes
    cache = llm.engine.cache
    return (
        dense
        + held * experts_per_layer / model.config.num_local_experts
        + (num_keys * cache.shape.block_bytes / cache.shape.block_size)
    )


def _layer(
    c: M2Config, options: RunOptions, device: torch.device, generator: torch.Generator
) -> LayerWeights:
    experts = ExpertWeights.empty(
        c.num_local_experts,
        c.hidden_size,
        c.intermediate_size,
        activations="nvfp4" if options.activations == "nvfp4" else "bf16",
        device=device,
    )
    w1, w2, w3 = (
        _packed(shape, generator)
        for shape in ((c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size),
                      (c.intermediate_size, c.hidden_size))
    )  # fmt: skip
    scale = torch.tensor(INPUT_AMAX / 2688, device=device)
    for expert in range(c.num_local_experts):  # the same numbers in each one's own place
        experts.set(expert, w1, w2, w3, scale, scale)

    def matrix(n: int, k: int) -> torch.Tensor:
        return _normal((n, k), k**-0.5, generator)

    def norm(width: int) -> torch.Tensor:
        return _normal((width,), 0.1, generator) + 1

    return LayerWeights(
        attention=AttentionWeights(
            input_layernorm=norm(c.hidden_size),
            q_proj=matrix(c.q_size, c.hidden_size),
            k_proj=matrix(c.kv_size, c.hidden_size),
            v_proj=matrix(c.kv_size, c.hidden_size),
            o_proj=matrix(c.hidden_size, c.q_size),
            q_norm=norm(c.q_size),
            k_norm=norm(c.kv_size),
        ),
        router=RouterWeights(
            post_attention_layernorm=norm(c.hidden_size),
            gate=matrix(c.num_local_experts, c.hidden_size).float(),
            e_score_correction_bias=_normal((c.num_local_experts,), 0.1, generator).float(),
        ),
        experts=PackedExperts(experts),
        k_scale=torch.tensor(KV_SCALE, device=device),
        v_scale=torch.tensor(KV_SCALE, device=device),
    )


def _packed(shape: tuple[int, int], generator: torch.Generator) -> PackedNVFP4:
    n, k = shape
    device = generator.device
    noise = torch.randn(n, k // GROUP, generator=generator, device=device)
    return PackedNVFP4(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator, device=device),
        (BLOCK_SCALE * (0.25 * noise).exp()).clamp(1, 448).to(torch.float8_e4m3fn),
        torch.tensor(k**-0.5 / (E2M1_RMS * BLOCK_SCALE), device=device),
    )


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return out.normal_(0, std, generator=generator)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
