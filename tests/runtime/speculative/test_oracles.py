"""Drafters against other people's code: transformers' Qwen3 and Llama modules, and modelopt's DFlash module.

speculators 0.9 (not a dependency) was compared with in the same way: full, reduced and windowed DFlash drafters and
all variants of EAGLE3, saved by it and read here, agree to 1e-6 with equal drafts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from m27quant.runtime.speculative.dflash import DFlashDrafter
from m27quant.runtime.speculative.eagle3 import Eagle3Drafter
from m27quant.runtime.speculative.load import DrafterOptions, load_drafter
from m27quant.runtime.speculative.proposal import DraftRequest
from tests.runtime.speculative import makers as m
from tests.tolerance import DRAFTER_ATOL

EMBED, HEAD = m.target_weights()
N, BLOCK = 30, 8


def rope_parameters(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


def load(module: torch.nn.Module, tensors: m.Tensors, prefix: str) -> torch.nn.Module:
    """Weights by their names; what the module has beside them is left alone."""
    mine, its = {n.removeprefix(prefix): t for n, t in tensors.items()}, module.state_dict()
    module.load_state_dict(
        {n: t for n, t in mine.items() if n in its and t.shape == its[n].shape}, strict=False
    )
    return module.eval()


def norm_of(weight: Tensor, eps: float) -> torch.nn.Module:
    norm = modeling_qwen3.Qwen3RMSNorm(len(weight), eps)
    norm.weight.data = weight
    return norm


@torch.no_grad()
def qwen3_block(config: dict[str, object], tensors: m.Tensors, taps: Tensor, anchor: int) -> Tensor:
    """A block by transformers' own layers: context and block go in as one sequence, the context renewed each time."""
    sizes = {k: v for k, v in config.items() if k in m.sizes(1) and k != "rope_theta"}
    q = Qwen3Config(**sizes, rope_parameters=rope_parameters(1000.0), attn_implementation="eager")
    eps = q.rms_norm_eps
    context = norm_of(tensors["hidden_norm.weight"], eps)(taps @ tensors["fc.weight"].T)
    n, total = len(taps), len(taps) + BLOCK
    rope = modeling_qwen3.Qwen3RotaryEmbedding(q)
    cos_sin = rope(context[None], torch.arange(total)[None])
    x = EMBED[[anchor] + [m.VOCAB - 1] * (BLOCK - 1)]
    for index in range(q.num_hidden_layers):
        layer = load(modeling_qwen3.Qwen3DecoderLayer(q, index), tensors, f"layers.{index}.")
        both = torch.cat((context, layer.input_layernorm(x)))[None]
        attended, _ = layer.self_attn(
            both, position_embeddings=cos_sin, attention_mask=torch.zeros(1, 1, total, total)
        )
        x = x + attended[0, n:]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return norm_of(tensors["norm.weight"], eps)(x)


@torch.no_grad()
def modelopt_block(config: dict[str, object], tensors: m.Tensors, taps: Tensor, anchor: int) -> Tensor:
    """The same by modelopt's module, which was made from SpecForge's."""
    dflash = pytest.importorskip("modelopt.torch.speculative.plugins.modeling_dflash")
    sizes = {k: v for k, v in config.items() if k in m.sizes(1) and k != "rope_theta"}
    q = Qwen3Config(**sizes, rope_parameters=rope_parameters(1000.0), attn_implementation="eager")
    q.block_size, q.target_layer_ids = BLOCK, [1, 4, 8]
    module = dflash.DFlashModule(q)
    module.load_state_dict(tensors)
    module.rotary_emb = modeling_qwen3.Qwen3RotaryEmbedding(q)  # modelopt 0.47 makes it as transformers 4 did
    block = EMBED[[anchor] + [m.VOCAB - 1] * (BLOCK - 1)]
    hidden: Tensor = module.eval()(block[None], taps[None], torch.arange(len(taps) + BLOCK)[None])
    return hidden[0]


@pytest.mark.parametrize("oracle", [qwen3_block, pytest.param(modelopt_block, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_dflash(tmp_path: Path, oracle: object, seed: int) -> None:
    config, tensors = m.dflash(seed)
    folder = m.write(tmp_path, config, tensors)
    drafter = load_drafter(folder, m.TARGET, EMBED, HEAD, dtype=torch.float32).drafter
    assert isinstance(drafter, DFlashDrafter)
    tokens, taps = m.history(N, 3 * m.D, seed)
    (proposal,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    expected = oracle(config, tensors, taps, tokens[-1])  # type: ignore[operator]  # one of the two above
    with torch.inference_mode():
        ours = drafter.block_hidden([(0, tokens[-1])])[0]
    torch.testing.assert_close(ours, expected, atol=DRAFTER_ATOL, rtol=0)
    assert proposal.tokens == (expected[1:] @ HEAD.T).argmax(-1).tolist()


@torch.no_grad()
def llama_chain(
    config: dict[str, object], tensors: m.Tensors, tokens: list[int], taps: Tensor, steps: int
) -> list[int]:
    """A chain by transformers' Llama modules, everything computed anew for every draft."""
    sizes = {k: v for k, v in config.items() if k in m.sizes(1) and k != "rope_theta"}
    c = LlamaConfig(**sizes, rope_parameters=rope_parameters(1000.0), attn_implementation="eager")
    layer = load(modeling_llama.LlamaDecoderLayer(c, 0), tensors, "midlayer.")
    for name in "qkv":  # the projections read embedding and hidden state side by side
        weight = tensors[f"midlayer.self_attn.{name}_proj.weight"]
        getattr(layer.self_attn, f"{name}_proj").weight = torch.nn.Parameter(weight)
    hidden_norm, norm = (
        norm_of(tensors[f"{n}.weight"], c.rms_norm_eps) for n in ("midlayer.hidden_norm", "norm")
    )
    rope = modeling_llama.LlamaRotaryEmbedding(c)
    hidden, drafted = taps @ tensors["fc.weight"].T, list[int]()
    for _ in range(steps):
        ids = [*tokens[1:], *drafted]
        T = len(ids)
        u = torch.cat((layer.input_layernorm(EMBED[ids]), hidden_norm(hidden)), -1)
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
        cos_sin = rope(hidden[None], torch.arange(T)[None])
        attended, _ = layer.self_attn(u[None], position_embeddings=cos_sin, attention_mask=mask)
        x = hidden + attended[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        row = int((norm(x[-1]) @ tensors["lm_head.weight"].T).argmax())
        drafted.append(row + int(tensors["d2t"][row]))
        hidden = torch.cat((hidden, x[-1:]))
    return drafted


@pytest.mark.parametrize("seed", range(4))
def test_eagle3(tmp_path: Path, seed: int) -> None:
    config, tensors = m.eagle3(seed)
    folder = m.write(tmp_path, config, tensors)
    options = DrafterOptions(num_steps=5)
    drafter = load_drafter(folder, m.TARGET, EMBED, HEAD, options, dtype=torch.float32).drafter
    assert isinstance(drafter, Eagle3Drafter)
    tokens, taps = m.history(N, 3 * m.D, seed)
    (proposal,) = drafter.propose([DraftRequest(0, tokens, taps, 99)])
    assert proposal.tokens == llama_chain(config, tensors, tokens, taps, 5)
