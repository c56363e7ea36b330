"""The official FP8 layout of MiniMax-M2, written and read back.

Matrices of attention and experts are E4M3 with one F32 multiplier per 128x128 block (`weight_scale_inv` =
amax / 448, edge blocks are smaller); embedding, head and norms are BF16; router and selection bias are F32.
Two oddities of the official checkpoint are kept, because readers must cope with them: shards are numbered
from 0 with a denominator that is not their count, and the index states the size that the weights would
have in BF16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import ModelConfig, Parameters
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0
MAX_SHARD_BYTES = 2_200_000

PLAIN = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER_PLAIN = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}


def to_blocks(weight: Tensor) -> Tensor:
    """[N, K] -> [ceil(N/128), 128, ceil(K/128), 128], padded with zeros."""
    N, K = weight.shape
    rows, columns = -(-N // BLOCK), -(-K // BLOCK)
    padded = weight.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[:N, :K] = weight
    return padded.view(rows, BLOCK, columns, BLOCK)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """F32 [N, K] -> (F8_E4M3 [N, K], F32 scale_inv [ceil(N/128), ceil(K/128)])."""
    N, K = weight.shape
    blocks = to_blocks(weight)
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    padded = scaled.to(torch.float8_e4m3fn).view(blocks.shape[0] * BLOCK, -1)
    return padded[:N, :K].contiguous(), scale


def dequantize_fp8(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """The inverse, F32 [N, K]."""
    N, K = weight.shape
    blocks = to_blocks(weight.float()) * scale_inv[:, None, :, None]
    return blocks.view(blocks.shape[0] * BLOCK, -1)[:N, :K].contiguous()


def official_tensors(masters: Parameters, bias: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors by their official names: embedding, layers in order, final norm, head."""
    tensors = {PLAIN["embed"]: masters["embed"].bfloat16()}

    def add_fp8(name: str, weight: Tensor) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantize_fp8(weight)

    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        for name in "qkvo":
            add_fp8(f"{layer}self_attn.{name}_proj", masters[f"{n}.{name}"])
        for name, official in LAYER_PLAIN.items():
            tensors[layer + official] = masters[f"{n}.{name}"].bfloat16()
        moe = layer + "block_sparse_moe."
        tensors[moe + "gate.weight"] = masters[f"{n}.router"].clone()
        tensors[moe + "e_score_correction_bias"] = bias[n].clone()
        for e in range(config.num_local_experts):
            w1, w3 = masters[f"{n}.w13"][e].chunk(2)
            for name, weight in (("w1", w1), ("w2", masters[f"{n}.w2"][e]), ("w3", w3)):
                add_fp8(f"{moe}experts.{e}.{name}", weight)
    tensors[PLAIN["norm"]] = masters["norm"].bfloat16()
    tensors[PLAIN["head"]] = masters["head"].bfloat16()
    return tensors


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in order, cut where a shard would exceed MAX_SHARD_BYTES (a layer may straddle a cut)."""
    result: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > MAX_SHARD_BYTES:
            result.append({})
            size = 0
        result[-1][name] = tensor
        size += tensor.nbytes
    return result


def write_weights(folder: Path, masters: Parameters, bias: Tensor, config: ModelConfig) -> None:
    """Write model-*.safetensors and their index into `folder`; same weights, same bytes."""
    masters = {name: w.detach().float().cpu() for name, w in masters.items()}
    tensors = official_tensors(masters, bias.detach().float().cpu(), config)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    parts = shards(tensors)
    weight_map = {}
    for number, part in enumerate(parts):
        path = folder / f"model-{number:05d}-of-{len(parts) + 1:05d}.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in part.items()}, path, metadata={"format": "pt"}
        )
        path.chmod(0o644)
        weight_map |= dict.fromkeys(part, path.name)
    bf16_size = 2 * sum(w.numel() for w in masters.values())
    index = {"metadata": {"total_size": bf16_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_dequantized(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its official name, F32; the scales are used up."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        stored |= load_file(folder / shard)
    return {
        name: dequantize_fp8(tensor, stored[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def read_weights(folder: Path, config: ModelConfig) -> tuple[Parameters, Tensor]:
    """(F32 parameters for model.forward, bias F32 [layers, E]) of a checkpoint that `write_weights` wrote."""
    tensors = read_dequantized(folder)
    params = {name: tensors[official] for name, official in PLAIN.items()}
    biases = []
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        moe = f"{layer}block_sparse_moe."
        params |= {f"{n}.{name}": tensors[layer + official] for name, official in LAYER_PLAIN.items()}
        params |= {f"{n}.{name}": tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo"}
        params[f"{n}.router"] = tensors[moe + "gate.weight"]
        biases.append(tensors[moe + "e_score_correction_bias"])
        w1, w2, w3 = (
            torch.stack([tensors[f"{moe}experts.{e}.{name}.weight"] for e in range(config.num_local_experts)])
            for name in ("w1", "w2", "w3")
        )
        params[f"{n}.w13"], params[f"{n}.w2"] = torch.cat([w1, w3], 1), w2
    return params, torch.stack(biases)
