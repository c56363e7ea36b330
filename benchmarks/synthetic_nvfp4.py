"""An NVFP4 checkpoint of any size, made on the fly: random codes under believable scales, real shapes and names.

    python -m benchmarks.synthetic_nvfp4 OUT [--layers 2] [--experts 256] [--vocab 4096]

It need not be quantized from anything, which would take hours at full size; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.synthetic import MODEL_SHARD_BYTES, POOL_BYTES, Size, require_room
from m27quant.checkpoint import names
from m27quant.checkpoint.buffers import byte_view
from m27quant.checkpoint.config import M2Config, parse_config
from m27quant.checkpoint.durable import pwrite_all
from m27quant.checkpoint.names import TensorSpec
from m27quant.checkpoint.quant_config import exclude_modules, hf_quant_config, quantization_config
from m27quant.checkpoint.writer import split_into_shards

E2M1_RMS = 2.93
"""Of uniformly distributed codes."""
BLOCK_SCALE = 128.0
INPUT_AMAX = 6.0
"""What activations behind a norm reach."""
KV_SCALE = 0.02


def nvfp4_bytes(size: Size) -> int:
    """Bytes of the tensors that `write_nvfp4` writes."""
    return sum(plan.size for plan in split_into_shards(_specs(_config(size)), MODEL_SHARD_BYTES))


def write_nvfp4(folder: Path, size: Size, *, seed: int = 0) -> Path:
    """Write configs, index and shards.

    Raises:
        OSError: there is no room for it.
    """
    config = _config(size)
    plans = split_into_shards(_specs(config), MODEL_SHARD_BYTES)
    require_room(folder, sum(plan.size for plan in plans))
    folder.mkdir(parents=True, exist_ok=True)
    values = _Values(config, seed)
    weight_map: dict[str, str] = {}
    for number, plan in enumerate(plans, 1):
        name = f"model-{number:05d}-of-{len(plans):05d}.safetensors"
        with (folder / name).open("wb") as file:
            pwrite_all(file.fileno(), plan.header, 0)
            for spec, offset in plan.offsets.values():
                pwrite_all(file.fileno(), values.content(spec), offset)
        weight_map |= dict.fromkeys(plan.offsets, name)
    packed = [m for m in names.linear_modules(config) if ".experts." in m]
    exclude = exclude_modules(packed, [m for m in names.linear_modules(config) if ".experts." not in m])
    raw = {k: v for k, v in size.config().items() if k != "quantization_config"}
    files = {
        "config.json": raw | {"quantization_config": quantization_config(exclude, "fp8")},
        "hf_quant_config.json": hf_quant_config(exclude, "fp8"),
        "generation_config.json": {"eos_token_id": size.vocab_size - 1},
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
    }
    for file_name, content in files.items():
        (folder / file_name).write_text(json.dumps(content, indent=2))
    return folder


def _config(size: Size) -> M2Config:
    return parse_config({k: v for k, v in size.config().items() if k != "quantization_config"})


def _specs(c: M2Config) -> Iterator[TensorSpec]:
    table = (c.vocab_size, c.hidden_size)
    yield TensorSpec(names.EMBEDDING, "BF16", table)
    for layer in range(c.num_hidden_layers):
        for name, shape in names.norm_shapes(c, layer).items():
            yield TensorSpec(name, "BF16", shape)
        for projection, matrix in names.attention_shapes(c).items():
            yield TensorSpec(f"{names.attention(layer)}.{projection}.weight", "BF16", matrix)
        yield TensorSpec(names.k_scale(layer), "F32", ())
        yield TensorSpec(names.v_scale(layer), "F32", ())
        yield TensorSpec(names.gate(layer), "F32", (c.num_local_experts, c.hidden_size))
        yield TensorSpec(names.correction_bias(layer), "F32", (c.num_local_experts,))
        for expert in range(c.num_local_experts):
            for projection, matrix in names.expert_shapes(c).items():
                yield from names.nvfp4_specs(names.expert(layer, expert, projection), matrix)
    yield TensorSpec(names.FINAL_NORM, "BF16", (c.hidden_size,))
    yield TensorSpec(names.LM_HEAD, "BF16", table)


class _Values:
    """The bytes of every tensor, in the order in which they are asked for; large ones are slices of pools."""

    def __init__(self, config: M2Config, seed: int) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(seed)
        self._codes = torch.randint(0, 256, (POOL_BYTES,), dtype=torch.uint8, generator=self._generator)
        noise = torch.randn(POOL_BYTES // 4, generator=self._generator)
        self._scales = (BLOCK_SCALE * (0.25 * noise).exp()).clamp(1, 448).to(torch.float8_e4m3fn)
        self._normal = torch.randn(POOL_BYTES // 2, generator=self._generator)

    def content(self, spec: TensorSpec) -> memoryview:
        """Matrices keep the scale of what they multiply, as a trained model's."""
        return byte_view(self._tensor(spec).contiguous())

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        name, shape = spec.name, spec.shape
        if spec.dtype == "U8":
            return self._slice(self._codes, shape)
        if spec.dtype == "F8_E4M3":
            return self._slice(self._scales.view(torch.uint8), shape)
        if name.endswith("weight_scale_2"):
            width = self._config.intermediate_size if ".w2." in name else self._config.hidden_size
            return torch.tensor(width**-0.5 / (E2M1_RMS * BLOCK_SCALE))
        if name.endswith("input_scale"):
            return torch.tensor(INPUT_AMAX / 2688)
        if name.endswith(("k_scale", "v_scale")):
            return torch.tensor(KV_SCALE)
        noise = self._slice(self._normal, shape)
        if name.endswith("norm.weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith("bias"):
            noise = 0.1 * noise
        elif name != names.EMBEDDING:
            noise = noise * shape[-1] ** -0.5
        return noise.bfloat16() if spec.dtype == "BF16" else noise

    def _slice(self, pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        if count > len(pool):  # the embedding of the full vocabulary
            return pool.repeat(-(-count // len(pool)))[:count].view(shape)
        at = int(torch.randint(len(pool) - count + 1, (1,), generator=self._generator))
        return pool[at : at + count].view(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic NVFP4 checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    size = Size(num_hidden_layers=args.layers, num_local_experts=args.experts, vocab_size=args.vocab)
    write_nvfp4(args.out, size)
    print(f"{args.out}: {nvfp4_bytes(size) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
