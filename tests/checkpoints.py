"""Random MiniMax-M2 checkpoints of any shape in the official layout, made on the fly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a random model; the default is small, with sides that are no multiples of 128."""

    hidden_size: int = 144
    intermediate_size: int = 80
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 16
    num_local_experts: int = 6
    num_experts_per_tok: int = 2
    vocab_size: int = 256

    def config(self, fp8: bool = True) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attn_type_list": [1] * self.num_hidden_layers,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": 1024,
            "model_type": "minimax_m2",
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.num_local_experts,
            "qk_norm_type": "per_layer",
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000,
            "rotary_dim": self.rotary_dim,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "use_routing_bias": True,
            "vocab_size": self.vocab_size,
        }
        if fp8:
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "float8_e4m3fn",
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            }
        return config


def to_fp8(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-scaled FP8 of a matrix: codes [N, K] and multipliers F32 [ceil(N/128), ceil(K/128)]."""
    n, k = weight_NK.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[:n, :k] = weight_NK
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    scale[scale == 0] = 1
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(FP8)
    return codes.view(rows * BLOCK, columns * BLOCK)[:n, :k].contiguous(), scale


def from_fp8(codes_NK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The BF16 values of block-scaled FP8, by plain broadcasting."""
    n, k = codes_NK.shape
    wide = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return (codes_NK.float() * wide).to(torch.bfloat16)


def random_tensors(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of a random model, linears in F32: their stored form is up to the caller."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * std

    d, i, e = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    tensors = {
        "model.embed_tokens.weight": normal(shape.vocab_size, d, std=1.0).bfloat16(),
        "lm_head.weight": normal(shape.vocab_size, d, std=d**-0.5).bfloat16(),
        "model.norm.weight": (1 + normal(d, std=0.1)).bfloat16(),
    }
    for layer in range(shape.num_hidden_layers):
        p = f"model.layers.{layer}."
        a, m = p + "self_attn.", p + "block_sparse_moe."
        tensors[p + "input_layernorm.weight"] = (1 + normal(d, std=0.1)).bfloat16()
        tensors[p + "post_attention_layernorm.weight"] = (1 + normal(d, std=0.1)).bfloat16()
        tensors[a + "q_norm.weight"] = (1 + normal(q, std=0.1)).bfloat16()
        tensors[a + "k_norm.weight"] = (1 + normal(kv, std=0.1)).bfloat16()
        tensors[m + "gate.weight"] = normal(e, d, std=d**-0.5)
        tensors[m + "e_score_correction_bias"] = normal(e, std=0.1)
        for name, size in (("q_proj", (q, d)), ("k_proj", (kv, d)), ("v_proj", (kv, d)), ("o_proj", (d, q))):
            tensors[f"{a}{name}.weight"] = normal(*size, std=size[1] ** -0.5)
        for expert in range(e):
            for name, size in (("w1", (i, d)), ("w2", (d, i)), ("w3", (i, d))):
                tensors[f"{m}experts.{expert}.{name}.weight"] = normal(*size, std=size[1] ** -0.5)
    return tensors


def stored(tensors: dict[str, torch.Tensor], fp8: bool = True) -> dict[str, torch.Tensor]:
    """The tensors as a checkpoint holds them: linears in block-scaled FP8 or in BF16, the rest as it is."""
    result = {}
    for name, tensor in tensors.items():
        linear = "_proj.weight" in name or ".experts." in name
        if not linear:
            result[name] = tensor
        elif fp8:
            result[name], result[name + "_scale_inv"] = to_fp8(tensor)
        else:
            codes, scale = to_fp8(tensor)
            result[name] = from_fp8(codes, scale)
    return result


def write_checkpoint(
    folder: Path,
    shape: Shape | None = None,
    *,
    seed: int = 0,
    fp8: bool = True,
    num_shards: int = 3,
    tensors: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with an index; the BF16 form has exactly the values of the FP8 form."""
    shape = shape or Shape()
    tensors = stored(random_tensors(shape, seed), fp8) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or shape.config(fp8), indent=2))
    weight_map = {}
    names = sorted(tensors)
    for number in range(num_shards):
        part = {n: tensors[n].contiguous() for n in names[number::num_shards]}
        file = f"model-{number:05d}-of-{num_shards + 2:05d}.safetensors"  # the official numbering is as odd
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_rows(path: Path, *, vocab_size: int = 256, rows: int = 6, longest: int = 40, seed: int = 0) -> Path:
    """A calibration file of `input_ids` rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for row in range(rows):
            length = longest - 3 * (row % 4)
            ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
    return path


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards in a folder, read by the safetensors library; a name twice is an error."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not set(part) & set(tensors), path
        tensors |= part
    return tensors
