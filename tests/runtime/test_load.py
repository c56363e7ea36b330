"""Loading: what is refused and by which name, what was decided, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import m27quant
from m27quant import SamplingParams
from m27quant.errors import CheckpointError, EnvironmentFault, UsageError
from tests.checkpoints import Shape, read_tensors, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def copy_with(checkpoint: Path, folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced, or left out where None."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    tensors = read_tensors(checkpoint) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    config = json.loads((checkpoint / "config.json").read_text())
    return write_checkpoint(folder, tensors=kept, config=config)


EXPERT = "model.layers.3.block_sparse_moe.experts.5"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{EXPERT}.w1.weight_scale_2", torch.tensor(torch.nan)),
        (f"{EXPERT}.w2.weight_scale", None),
        (f"{EXPERT}.w3.weight", torch.zeros(64, 8, dtype=torch.uint8)),
        ("model.layers.2.self_attn.k_norm.weight", None),
        ("model.layers.1.self_attn.k_proj.k_scale", torch.tensor(-1.0)),
        (f"{EXPERT}.w1.input_scale", torch.tensor(0.0)),
    ],
    ids=lambda value: value.rpartition("experts.")[2] if isinstance(value, str) else "",
)
def test_a_checkpoint_with_errors_is_refused_by_their_names(
    tiny_nvfp4: Path, tmp_path: Path, name: str, value: Any
) -> None:
    folder = copy_with(tiny_nvfp4, tmp_path / "bad", {name: value})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        m27quant.load(folder)
    assert "M27-" in str(caught.value)
    assert "verify" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{EXPERT}.w1.weight_scale_2", torch.tensor(torch.nan)),
        (f"{EXPERT}.w2.weight_scale", None),
        ("model.layers.2.self_attn.k_norm.weight", torch.full((64,), torch.nan).bfloat16()),
        ("model.layers.1.self_attn.k_proj.k_scale", torch.tensor(-1.0)),
    ],
)
def test_the_loader_refuses_by_itself_what_it_cannot_compute_with(
    tiny_nvfp4: Path, tmp_path: Path, name: str, value: Any
) -> None:
    """Verification can be left out; a tensor of no use is named all the same."""
    folder = copy_with(tiny_nvfp4, tmp_path / "bad", {name: value})
    module = ".".join(name.split(".")[-3:-1]) if "experts" in name else name
    with pytest.raises(CheckpointError) as caught:
        m27quant.load(folder, check=False)
    text = str(caught.value)
    assert name in text or ("layer 3" in text and "expert 5" in text), (module, text)


def test_a_source_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "fp8")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    folder = copy_with(source, tmp_path / "bad", {name: None})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        m27quant.load(folder)


def test_source_bf16_copy_and_nvfp4_run(tmp_path: Path, tiny_nvfp4: Path) -> None:
    """The FP8 source and a BF16 model of the same values say the same."""
    fp8 = m27quant.load(write_checkpoint(tmp_path / "fp8", Shape()))
    bf16 = m27quant.load(write_checkpoint(tmp_path / "bf16", Shape(), fp8=False))
    ids = [5, 6, 7, 8]
    assert fp8.generate(ids, GREEDY)[0].token_ids == bf16.generate(ids, GREEDY)[0].token_ids
    assert fp8.tokenizer is None
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        fp8.generate("text", GREEDY)
    with pytest.raises(UsageError, match="stop strings"):
        fp8.generate(ids, SamplingParams(stop="a"))
    lines: list[str] = []
    llm = m27quant.load(tiny_nvfp4, say=lines.append)
    assert len(llm.generate("def ", GREEDY)[0].token_ids) == 6
    assert any("FP8 E4M3" in line and "BF16 activations" in line for line in lines)
    assert any("weights 0.0" in line and "KV cache" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"max_memory": 2**20}, EnvironmentFault, "does not fit.*weights"),
        ({"kv_cache_memory": 2**50, "max_num_seqs": 2**24}, EnvironmentFault, "does not fit"),
        ({"device": "cuda:7"}, EnvironmentFault, "cuda:7"),
        ({"max_num_seqs": 0}, UsageError, "max_num_seqs"),
        ({"activations": "fp8"}, UsageError, "activations"),
        ({"block_size": 2.5}, UsageError, "block_size"),
    ],
)
def test_options_that_cannot_be(tiny_nvfp4: Path, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        m27quant.load(tiny_nvfp4, check=False, **changes)


def test_nvfp4_activations_need_their_scales(repository: Path) -> None:
    with pytest.raises(UsageError, match="NVFP4 weights"):
        m27quant.load(repository / "examples/tiny-m27", activations="nvfp4")


def test_the_cache_takes_what_it_was_given(tiny_nvfp4: Path) -> None:
    """8 layers, 2 heads of 32, keys and values of one byte: 1 KiB a token, 16 KiB a block."""
    llm = m27quant.load(tiny_nvfp4, check=False, kv_cache_memory=10 * 16384 + 5000)
    assert llm.memory.num_blocks == 10
    assert llm.memory.cache_bytes == sum(t.nbytes for t in (*llm.engine.cache.keys, *llm.engine.cache.values))
    assert llm.max_model_len == 161
    assert m27quant.load(tiny_nvfp4, check=False, max_model_len=50).max_model_len == 50
    assert llm.memory.weight_bytes == pytest.approx(llm.model.nbytes, rel=0.1)


MEASURE = """
import sys, torch
torch.set_num_threads(1)
import m27quant
from m27quant.quantize import peak_rss_bytes
from m27quant.llm import load
from m27quant.runtime.host_memory import rss_bytes
kept = load(sys.argv[2], check=False, kv_cache_memory=2**20, max_model_len=16)  # code is loaded, first buffers are made
before = rss_bytes()
llm = load(sys.argv[1], check=False, kv_cache_memory=2**20, max_model_len=1024)
print(peak_rss_bytes() - before, llm.model.nbytes, llm.memory.cache_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_loading_takes_little_more_than_the_packed_weights(tmp_path: Path, record_property: Any) -> None:
    from benchmarks.synthetic import TINY, Size
    from benchmarks.synthetic_nvfp4 import nvfp4_bytes, write_nvfp4

    size = Size(
        num_hidden_layers=3, num_local_experts=32, hidden_size=1536, intermediate_size=768, vocab_size=2048,
        num_attention_heads=12, num_key_value_heads=4,
    )  # fmt: skip
    folder = write_nvfp4(tmp_path / "model", size)
    small = write_nvfp4(tmp_path / "small", TINY)
    command = [sys.executable, "-c", MEASURE, folder, small]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights, cache = map(int, done.stdout.split())
    packed = nvfp4_bytes(size)
    assert packed > 200e6
    record_property("peak_over_packed", round((peak - cache) / packed, 3))
    record_property("in_memory_over_packed", round(weights / packed, 3))
    assert peak - cache <= 1.1 * packed
