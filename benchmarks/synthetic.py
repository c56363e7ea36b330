"""A MiniMax-M2 checkpoint of any size in the official layout, made on the fly: random weights, real shapes.

    python -m benchmarks.synthetic OUT [--layers 2] [--experts 256]

Weights are streamed to disk: FP8 codes are slices, at random places, of one pool of normally distributed codes, so
that making 7.3 GB takes seconds and little memory.  The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m27quant.checkpoint import names
from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.checkpoint.durable import pwrite_all
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.writer import ShardPlan, split_into_shards

BLOCK = 128
POOL_BYTES = 2**26
CODE_STD = 100.0
"""Of the FP8 codes' values: blocks of 128x128 then reach 448 as in the official checkpoint."""
MODEL_SHARD_BYTES = 1_850_000_000
"""The official shards' size."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes under config.json's names; the default is M2.7's, with two layers and a small vocabulary."""

    num_hidden_layers: int = 2
    num_local_experts: int = 256
    num_experts_per_tok: int = 8
    hidden_size: int = 3072
    intermediate_size: int = 1536
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64
    vocab_size: int = 4096

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attn_type_list": [1] * self.num_hidden_layers,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "max_position_embeddings": 204800,
            "model_type": "minimax_m2",
            "qk_norm_type": "per_layer",
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "use_routing_bias": True,
            **asdict(self),
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "float8_e4m3fn",
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
        }


TINY = Size(
    num_local_experts=4, num_experts_per_tok=2, hidden_size=256, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, rotary_dim=32, vocab_size=128,
)  # fmt: skip
"""For tests of the benchmarks themselves."""


def model_bytes(size: Size) -> int:
    """Bytes of the tensors that `write_model` writes."""
    return sum(plan.size for plan in _shards(size, MODEL_SHARD_BYTES))


def write_model(folder: Path, size: Size, *, seed: int = 0, shard_bytes: int = MODEL_SHARD_BYTES) -> Path:
    """Write config.json, the index and the shards, numbered as oddly as the official ones.

    Raises:
        OSError: there is no room for it.
    """
    plans = _shards(size, shard_bytes)
    require_room(folder, sum(plan.size for plan in plans))
    folder.mkdir(parents=True, exist_ok=True)
    weights = _Weights(seed)
    weight_map: dict[str, str] = {}
    for number, plan in enumerate(plans):
        name = f"model-{number:05d}-of-{len(plans) + 5:05d}.safetensors"
        with (folder / name).open("wb") as file:
            pwrite_all(file.fileno(), plan.header, 0)
            for spec, offset in plan.offsets.values():
                pwrite_all(file.fileno(), weights.content(spec), offset)
        weight_map |= dict.fromkeys(plan.offsets, name)
    (folder / "config.json").write_text(json.dumps(size.config(), indent=2))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_rows(path: Path, *, rows: int, length: int, vocab_size: int, seed: int = 0) -> Path:
    """A calibration file of random `input_ids`."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(rows):
            ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
    return path


def require_room(folder: Path, needed: int) -> None:
    """Raise `OSError` where the file system of `folder` has fewer than `needed` bytes free, and some to spare."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.1:
        raise OSError(f"{free / 1e9:.1f} GB free, {needed * 1.1 / 1e9:.1f} GB needed")


def _shards(size: Size, shard_bytes: int) -> list[ShardPlan]:
    return split_into_shards(_specs(parse_config(size.config())), shard_bytes)


def _specs(c: M2Config) -> Iterator[TensorSpec]:
    """Every tensor of the official layout, layer by layer."""
    table = (c.vocab_size, c.hidden_size)
    yield TensorSpec(names.EMBEDDING, "BF16", table)
    for layer in range(c.num_hidden_layers):
        for name, shape in names.norm_shapes(c, layer).items():
            yield TensorSpec(name, "BF16", shape)
        for projection, matrix in names.attention_shapes(c).items():
            yield from _linear(f"{names.attention(layer)}.{projection}", matrix)
        yield TensorSpec(names.gate(layer), "F32", (c.num_local_experts, c.hidden_size))
        yield TensorSpec(names.correction_bias(layer), "F32", (c.num_local_experts,))
        for expert in range(c.num_local_experts):
            for projection, matrix in names.expert_shapes(c).items():
                yield from _linear(names.expert(layer, expert, projection), matrix)
    yield TensorSpec(names.FINAL_NORM, "BF16", (c.hidden_size,))
    yield TensorSpec(names.LM_HEAD, "BF16", table)


def _linear(module: str, shape: tuple[int, int]) -> Iterator[TensorSpec]:
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    yield TensorSpec(f"{module}.weight", "F8_E4M3", shape)
    yield TensorSpec(f"{module}.weight_scale_inv", "F32", blocks)


class _Weights:
    """The bytes of every tensor, in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        values = torch.randn(POOL_BYTES, generator=self._generator).mul_(CODE_STD).clamp_(-448, 448)
        self._pool = values.to(torch.float8_e4m3fn).view(torch.uint8)

    def content(self, spec: TensorSpec) -> memoryview:
        """Values as a trained model has them in size: matrices keep the scale of what they multiply."""
        if spec.dtype == "F8_E4M3":
            count = spec.shape[0] * spec.shape[1]
            assert count < POOL_BYTES, spec
            at = int(torch.randint(POOL_BYTES - count, (1,), generator=self._generator))
            return byte_view(self._pool[at : at + count])
        noise = torch.randn(spec.shape, generator=self._generator)
        if spec.name.endswith("weight_scale_inv"):
            value = (0.25 * noise).exp() * (spec.shape[1] * BLOCK) ** -0.5 / CODE_STD
        elif spec.name.endswith("norm.weight"):
            value = 1 + 0.1 * noise
        elif spec.name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise if spec.name == names.EMBEDDING else noise * spec.shape[-1] ** -0.5
        stored = value.bfloat16() if spec.dtype == "BF16" else value
        return byte_view(stored)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a synthetic MiniMax-M2 checkpoint and calibration rows."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="calibration rows, in OUT.jsonl")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    args = parser.parse_args()
    size = Size(num_hidden_layers=args.layers, num_local_experts=args.experts)
    write_model(args.out, size)
    rows = args.out.with_suffix(".jsonl")
    write_rows(rows, rows=args.rows, length=args.length, vocab_size=size.vocab_size)
    print(f"{args.out}: {model_bytes(size) / 1e9:.2f} GB; {rows}: {args.rows} rows of {args.length} tokens")


if __name__ == "__main__":
    main()
