"""The embedded checkpoint is what its card says: structure from the files' own headers, and a little of its text."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-m27"
OFFICIAL_KEYS = [
    "architectures",
    "attn_type_list",
    "dtype",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "mtp_transformer_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "num_mtp_modules",
    "qk_norm_type",
    "quantization_config",
    "rms_norm_eps",
    "rope_theta",
    "rotary_dim",
    "scoring_func",
    "shared_intermediate_size",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
    "use_mtp",
    "use_qk_norm",
    "use_routing_bias",
    "vocab_size",
]  # of M2.7's config.json, in its order, without auto_map


def read_json(name: str) -> dict[str, Any]:
    return json.loads((TINY / name).read_text(encoding="utf-8"))


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


@pytest.fixture(scope="module")
def stored() -> dict[str, tuple[str, tuple[int, ...], str]]:
    """name -> (dtype, shape, shard) of every tensor in every shard."""
    result = {}
    for path in sorted(TINY.glob("*.safetensors")):
        entries = header(path)
        assert entries.pop("__metadata__") == {"format": "pt"}
        for name, entry in entries.items():
            assert name not in result
            result[name] = (entry["dtype"], tuple(entry["shape"]), path.name)
    return result


def expected_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The official layout for the sizes of config.json."""
    c = read_json("config.json")
    D, I, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    Q, KV = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (V, D)),
        "lm_head.weight": ("BF16", (V, D)),
        "model.norm.weight": ("BF16", (D,)),
    }

    def fp8(name: str, N: int, K: int) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", (N, K))
        tensors[f"{name}.weight_scale_inv"] = ("F32", (math.ceil(N / 128), math.ceil(K / 128)))

    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, width in (("input_layernorm", D), ("post_attention_layernorm", D)):
            tensors[f"{layer}.{name}.weight"] = ("BF16", (width,))
        for name, width in (("q_norm", Q), ("k_norm", KV)):
            tensors[f"{layer}.self_attn.{name}.weight"] = ("BF16", (width,))
        for name, N, K in (("q", Q, D), ("k", KV, D), ("v", KV, D), ("o", D, Q)):
            fp8(f"{layer}.self_attn.{name}_proj", N, K)
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = ("F32", (c["num_local_experts"], D))
        tensors[f"{layer}.block_sparse_moe.e_score_correction_bias"] = ("F32", (c["num_local_experts"],))
        for e in range(c["num_local_experts"]):
            for name, N, K in (("w1", I, D), ("w2", D, I), ("w3", I, D)):
                fp8(f"{layer}.block_sparse_moe.experts.{e}.{name}", N, K)
    return tensors


def test_tensors_are_exactly_the_official_ones(stored: dict[str, tuple[str, tuple[int, ...], str]]) -> None:
    assert {name: (dtype, shape) for name, (dtype, shape, _) in stored.items()} == expected_tensors()


def test_index_names_every_tensor_in_its_shard(stored: dict[str, tuple[str, tuple[int, ...], str]]) -> None:
    weight_map = read_json("model.safetensors.index.json")["weight_map"]
    assert weight_map == {name: shard for name, (_, _, shard) in stored.items()}


def test_shards_are_numbered_as_oddly_as_the_official_ones() -> None:
    names = [path.name for path in sorted(TINY.glob("*.safetensors"))]
    matches = [re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", name) for name in names]
    assert [int(match[1]) for match in matches if match] == list(range(len(names)))
    assert {int(match[2]) for match in matches if match} == {len(names) + 1}
    assert len(names) >= 3


def test_index_states_the_bf16_size_and_not_the_real_one(
    stored: dict[str, tuple[str, tuple[int, ...], str]],
) -> None:
    stated = read_json("model.safetensors.index.json")["metadata"]["total_size"]
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    real = sum(sizes[dtype] * math.prod(shape) for dtype, shape, _ in stored.values())
    assert stated > 1.5 * real


def test_a_side_is_no_multiple_of_128(stored: dict[str, tuple[str, tuple[int, ...], str]]) -> None:
    shapes = {shape for dtype, shape, _ in stored.values() if dtype == "F8_E4M3"}
    assert (64, 272) in shapes
    assert (272, 256) in shapes


def test_the_whole_is_at_most_12_megabytes_and_readable_by_all() -> None:
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_config_has_the_official_keys_in_their_order() -> None:
    config = read_json("config.json")
    assert list(config) == OFFICIAL_KEYS
    assert config["num_hidden_layers"] >= 8
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert config["rotary_dim"] * 2 == config["head_dim"]
    assert config["attn_type_list"] == [1] * config["num_hidden_layers"]


def test_generation_config_holds_the_tokenizers_ids() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    generation, config = read_json("generation_config.json"), read_json("tokenizer_config.json")
    for kind in ("bos", "eos", "pad"):
        assert generation[f"{kind}_token_id"] == tokenizer.token_to_id(config[f"{kind}_token"])
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]
    assert config["tokenizer_class"] == "GPT2Tokenizer"


def test_tokenizer_returns_the_held_out_text_unchanged() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(text.encode()) / len(ids) > 2.5
    assert len(text.encode()) <= 300_000


def test_calibration_rows_are_long_texts_and_chats() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    lines = (TINY / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows if "text" in row]
    chats = [row["messages"] for row in rows if "messages" in row]
    assert len(texts) + len(chats) == len(rows)
    assert len(texts) >= 64
    assert min(len(tokenizer.encode(text).ids) for text in texts) >= 256
    assert all(chat[0]["role"] == "user" and chat[-1]["role"] == "assistant" for chat in chats)
    assert len(chats) > 0


def test_heldout_text_is_not_calibrated_on() -> None:
    heldout = (TINY / "heldout.txt").read_text(encoding="utf-8")
    for line in (TINY / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert "text" not in row or row["text"] not in heldout


def test_chat_template_speaks_m2s_turns() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "reasoning_content": "old thought", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 3}}}]},
        {"role": "tool", "content": "four"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.startswith("]~!b[]~b]system\n")
    assert "]~b]user\none[e~[\n]~b]ai\ntwo[e~[\n]~b]user\nthree[e~[\n]~b]ai\n" in text
    assert '<invoke name="f">\n<parameter name="n">3</parameter>\n</invoke>\n</minimax:tool_call>[e~[' in text
    assert text.endswith("]~b]tool\n<response>four</response>[e~[\n]~b]ai\n<think>\n")
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids


def test_it_predicts_held_out_python_and_its_bias_matters(script: Callable[[str], ModuleType]) -> None:
    fp8_checkpoint, model = script("fp8_checkpoint"), script("model")
    config = model.ModelConfig()
    params, bias = fp8_checkpoint.read_weights(TINY, config)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode((TINY / "heldout.txt").read_text(encoding="utf-8")).ids)
    windows = ids[: len(ids) // 257 * 257].view(-1, 257)[::44]
    scores: list[torch.Tensor] = []
    with torch.no_grad():
        hidden = model.forward(params, bias, windows[:, :-1], config, scores=scores)
        loss = F.cross_entropy(F.linear(hidden, params["head"]), windows[:, 1:].reshape(-1))
    counts = torch.bincount(ids, minlength=config.vocab_size).double() + 1
    unigram = -(counts / counts.sum()).log()[windows[:, 1:]].mean()
    assert (unigram - loss).exp() > 12  # 2,048 tokens, unigram fitted to the held-out text itself
    for n, score in enumerate(scores):
        with_bias = (score + bias[n]).topk(config.num_experts_per_tok).indices.sort(-1).values
        without = score.topk(config.num_experts_per_tok).indices.sort(-1).values
        assert (with_bias != without).any(-1).float().mean() > 0.02, f"layer {n}"
