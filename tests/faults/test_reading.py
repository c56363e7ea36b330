"""Every fault of a source ends in its exit code, with a message that names the place and the next step.

The comments give the kinds of faults; `OUT` must be as it was before, or hold resumable private state alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import corruptions as c
from tests.faults.conftest import Quantize

FIRST = "model-00000-of-00005.safetensors"
SECOND = "model-00001-of-00005.safetensors"
OVERSIZED = {"num_hidden_layers": 4096, "num_local_experts": 16384}

# name -> (how it is broken, what the message must contain)
CORRUPT: dict[str, tuple[c.Change, tuple[str, ...]]] = {
    # shards that are no safetensors files
    "empty": (c.empty_shard, (FIRST, "0 bytes")),
    "truncated by a byte": (c.truncated_by_one, (FIRST, "truncated")),
    "truncated in the header": (c.truncated_in_header, (FIRST, "a header of ", "the file has 100")),
    "trailing bytes": (c.trailing_bytes, (FIRST, "13 trailing bytes")),
    "header of 2^63 bytes": (c.header_length(2**63), (FIRST, "9,223,372,036,854,775,808")),
    "header of 100 MB and a byte": (c.header_length(100_000_001), (FIRST, "100,000,001")),
    "header longer than the file": (c.header_length(90_000_000), (FIRST, "90,000,000")),
    "header not UTF-8": (c.header_text(b'{"\xff": 1}'), (FIRST, "header: not UTF-8 at byte 2")),
    "header not JSON": (c.header_text(b'{"a": '), (FIRST, "header: not valid JSON at line 1, column 7")),
    "header a list": (c.header_text(b"[]"), (FIRST, "not a JSON object")),
    "header 100k deep": (c.header_text(b'{"a":' * 100_000), (FIRST, "header: nested too deeply")),
    "header with NaN": (c.header_text(b'{"a": NaN}'), (FIRST, "NaN is not JSON")),
    "header of no bytes": (c.header_length(0), (FIRST, "header: not valid JSON")),
    "git-lfs pointer": (
        c.shard_becomes(lambda p: p.write_bytes(c.LFS_POINTER)),
        (FIRST, "git-lfs pointer"),
    ),
    "pickle": (c.shard_becomes(lambda p: p.write_bytes(b"\x80\x02}q\x00." * 9)), (FIRST, "pickle")),
    "zipped pickle": (
        c.shard_becomes(lambda p: p.write_bytes(b"PK\x03\x04" * 9)),
        (FIRST, "pickle"),
    ),
    # entries that lie
    "overlap": (c.overlapping, ("overlaps the one before it", "experts")),
    "hole": (c.hole, (FIRST, "leaves a hole of 8 bytes")),
    "shape overflows": (c.first_entry(shape=[2**62, 2**62]), (FIRST, "tensor '", "could exist")),
    "negative dimension": (c.first_entry(shape=[-1, 4]), (FIRST, "tensor '", "bad shape [-1, 4]")),
    "boolean dimension": (c.first_entry(shape=[True]), (FIRST, "bad shape [True]")),
    "fractional dimension": (c.first_entry(shape=[1.0]), (FIRST, "bad shape [1.0]")),
    "size is not shape times type": (c.first_entry(shape=[3]), (FIRST, "tensor '", "bytes, offsets span")),
    "offsets swapped": (c.first_entry(data_offsets=[8, 0]), (FIRST, "offsets span -8")),
    "offsets of strings": (c.first_entry(data_offsets=["0", "8"]), (FIRST, "bad data_offsets")),
    "one offset": (c.first_entry(data_offsets=[0]), (FIRST, "bad data_offsets [0]")),
    "unknown type": (c.first_entry(dtype="F12"), (FIRST, "unknown dtype 'F12'", "BF16")),
    "type is no string": (c.first_entry(dtype=["F32"]), (FIRST, "unknown dtype")),
    "extra key in an entry": (c.first_entry(stride=1), (FIRST, "exactly dtype, shape and data_offsets")),
    "half a byte": (c.odd_f4, (FIRST, "tensor 'odd'", "whole number of bytes")),
    "same name twice": (c.duplicate_key, (FIRST, "key '", "appears twice")),
    "metadata not strings": (
        lambda f: c.edit_header(c.shards(f)[0], lambda h: h.update(__metadata__={"a": 1})),
        (FIRST, "__metadata__"),
    ),
    # shards that are no files
    "shard a folder": (c.shard_becomes(Path.mkdir), (FIRST, "not a regular file")),
    "shard a fifo": (c.shard_becomes(os.mkfifo), (FIRST, "not a regular file")),
    "shard links to itself": (c.shard_becomes(lambda p: p.symlink_to(p)), (FIRST,)),
    "shard links to /dev/zero": (
        c.shard_becomes(lambda p: p.symlink_to("/dev/zero")),
        (FIRST, "leaves the folder"),
    ),
    "shard links outside": (c.link_leaves, (FIRST, "leaves the folder")),
    "dangling link": (c.shard_becomes(lambda p: p.symlink_to(p.with_name("gone"))), (FIRST, "missing")),
    # the index
    "shard missing": (c.missing_shard, (SECOND, "1 of the index's 3 shards are missing")),
    "no index": (c.remove(c.INDEX), ("3 shards but no model.safetensors.index.json",)),
    "only pickles": (c.pickled_only, ("pytorch_model.bin", "never loaded")),
    "no weights at all": (
        c.without_weights,
        ("no weights",),
    ),
    "index names an absent tensor": (c.index_names_absent("model.ghost"), ("'model.ghost'", FIRST)),
    "absolute path": (c.mapped_to("/etc/passwd.safetensors"), ("'/etc/passwd.safetensors'", c.INDEX)),
    "parent folder": (c.mapped_to("../x.safetensors"), ("'../x.safetensors'", "leave the folder")),
    "hidden parent": (c.mapped_to("a/../../x.safetensors"), ("leave the folder",)),
    "subfolder": (c.mapped_to("a/x.safetensors"), ("leave the folder",)),
    "drive": (c.mapped_to("C:\\x.safetensors"), ("leave the folder",)),
    "drive-relative": (c.mapped_to("C:x.safetensors"), ("leave the folder",)),
    "network share": (c.mapped_to("\\\\host\\share\\x.safetensors"), ("leave the folder",)),
    "Windows separators": (c.mapped_to("a\\x.safetensors"), ("leave the folder",)),
    "NUL in a file name": (c.mapped_to("x\x00.safetensors"), ("x\\x00.safetensors",)),
    "empty file name": (c.mapped_to(""), ("leave the folder",)),
    "dots": (c.mapped_to(".."), ("leave the folder",)),
    "file name too long": (c.mapped_to("x" * 300 + ".safetensors"), ("leave the folder",)),
    "file name too long in UTF-8": (c.mapped_to("ü" * 200 + ".safetensors"), (c.INDEX, "ü")),
    "lone surrogate in a file name": (c.mapped_to("\ud800.safetensors"), ("\\ud800.safetensors",)),
    "not a safetensors file": (c.mapped_to("weights.bin"), ("'weights.bin' is not a .safetensors file",)),
    "weight_map a list": (c.weight_map([EXPERT := c.EXPERT]), (c.INDEX, "weight_map")),
    "weight_map empty": (c.weight_map({}), (c.INDEX, "weight_map")),
    "weight_map to numbers": (c.weight_map({EXPERT: 1}), (c.INDEX, f"weight_map['{EXPERT}']")),
    "index a list": (c.index_text(b"[]"), (c.INDEX, "weight_map")),
    "index empty": (c.index_text(b""), (c.INDEX, "not valid JSON at line 1, column 1")),
    "index with a key twice": (c.duplicate_index_key, (c.INDEX, f"key '{EXPERT}' appears twice")),
    "index of 1 GB": (c.huge_index, (c.INDEX, "1,000,000,000 bytes")),
    "index 100k deep": (c.index_text(b"[" * 100_000), (c.INDEX, "nested too deeply")),
    "index a git-lfs pointer": (c.index_text(c.LFS_POINTER), (c.INDEX, "git-lfs pointer")),
    "index a folder": (c.becomes_folder(c.INDEX), (c.INDEX,)),
    "single file and index": (c.single_and_index, ("both model.safetensors and an index",)),
    # config.json
    "config missing": (c.remove("config.json"), ("config.json: no such file",)),
    "config not JSON": (c.config_bytes(b'{\n "a": 1,\n}'), ("config.json", "line 3, column 1")),
    "config with NaN": (c.config_bytes(b'{"rms_norm_eps": NaN}'), ("config.json: NaN is not JSON",)),
    "config with an infinite number": (
        c.config_bytes(b'{"rms_norm_eps": 1e999}'),
        ("config.json: 1e999 is no finite number",),
    ),
    "config with 5000 digits": (c.config_bytes(b'{"a": ' + b"9" * 5000 + b"}"), ("config.json",)),
    "config with a BOM": (c.config_bytes(b"\xef\xbb\xbf{}"), ("config.json", "byte-order mark")),
    "config in UTF-16": (c.config_bytes('{"a": 1}'.encode("utf-16")), ("config.json: not UTF-8",)),
    "config a list": (c.config_bytes(b"[]"), ("config.json: expected a JSON object, found list",)),
    "config with a key twice": (c.config_bytes(b'{"a": 1, "a": 2}'), ("config.json: key 'a' appears twice",)),
    "config 100k deep": (c.config_bytes(b'{"a":' * 100_000), ("config.json: nested too deeply",)),
    "config deeper than it can be shown": (
        c.config_bytes(b'{"model_type":' + b"[" * 950 + b"]" * 950 + b"}"),
        ("config.json",),
    ),
    "config a git-lfs pointer": (c.config_bytes(c.LFS_POINTER), ("config.json: a git-lfs pointer",)),
    "config a folder": (
        c.becomes_folder("config.json"),
        ("config.json: not a regular file",),
    ),
    "another model": (c.config(model_type="llama"), ("model_type is 'llama'", "minimax_m2")),
    "no model type": (c.without_config_key("model_type"), ("model_type is 'None'",)),
    "another architecture": (
        c.config(architectures=["MiniMaxText01ForCausalLM"]),
        ("architectures", "MiniMaxText01", "MiniMaxM2ForCausalLM"),
    ),
    "softmax router": (c.config(scoring_func="softmax"), ("scoring_func = softmax",)),
    "shared expert": (c.config(shared_intermediate_size=64), ("shared_intermediate_size = 64",)),
    "linear attention": (c.config(attn_type_list=[0, 1]), ("attn_type_list",)),
    "scaled rotation": (c.config(rope_scaling={"type": "yarn"}), ("rope_scaling",)),
    "number as text": (c.config(hidden_size="48"), ("hidden_size is 48",)),
    "boolean number": (c.config(num_hidden_layers=True), ("num_hidden_layers is True",)),
    "zero layers": (c.config(num_hidden_layers=0), ("num_hidden_layers is 0",)),
    "negative size": (c.config(vocab_size=-1), ("vocab_size is -1",)),
    "missing field": (c.without_config_key("head_dim"), ("head_dim is missing",)),
    "top-k above the experts": (c.config(num_experts_per_tok=5), ("num_experts_per_tok 5",)),
    "heads that do not divide": (c.config(num_key_value_heads=3), ("3 key/value heads",)),
    "no group of 16": (c.config(intermediate_size=40), ("intermediate_size 40 is not a multiple of 16",)),
    "odd rotation": (c.config(rotary_dim=7), ("rotary_dim 7",)),
    "already NVFP4": (
        c.quantization(quant_method="modelopt", quant_algo="NVFP4"),
        ("already quantized (modelopt NVFP4)",),
    ),
    "already INT4": (c.quantization(quant_method="awq"), ("already quantized (awq)",)),
    "per-tensor FP8": (c.quantization(weight_block_size=None), ("weight_block_size is None",)),
    "E5M2": (c.quantization(fmt="float8_e5m2"), ("'float8_e5m2'", "E4M3")),
    "exemptions no list": (c.quantization(modules_to_not_convert=7), ("modules_to_not_convert",)),
    # config.json against the tensors
    "a layer too many": (
        c.config(num_hidden_layers=3),
        ("'model.layers.2.input_layernorm.weight' is missing",),
    ),
    "an expert too many": (c.config(num_local_experts=5), ("gate.weight' has shape [4, 48]", "[5, 48]")),
    "another width": (c.config(hidden_size=64), ("has shape [64, 48], config.json implies [64, 64]",)),
    "sizes without end": (c.config(**OVERSIZED), ("and 96 more",)),
    "tensor missing": (lambda f: c.drop_tensor(f, "model.norm.weight"), ("'model.norm.weight' is missing",)),
    "scale missing": (c.without_scale, (f"'{EXPERT}_scale_inv' is missing",)),
    "scale of another shape": (c.scale_shape, (f"'{EXPERT}_scale_inv' has shape [2, 1]", "[1, 1]")),
    "FP8 that config.json denies": (
        c.without_config_key("quantization_config"),
        ("block-scaled FP8", "quantization_config"),
    ),
    # what lies beside the weights
    "tokenizer not JSON": (
        c.put("tokenizer.json", b"{"),
        ("tokenizer.json: not valid JSON",),
    ),
    "tokenizer a list": (c.put("tokenizer.json", b"[]"), ("tokenizer.json",)),
    "tokens no list": (
        c.put("tokenizer.json", b'{"added_tokens": 7}'),
        ("tokenizer.json", "added_tokens"),
    ),
    "tokenizer a git-lfs pointer": (
        c.put("tokenizer.json", c.LFS_POINTER),
        ("tokenizer.json: a git-lfs pointer",),
    ),
    "tokenizer config a list": (
        c.put("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json: expected a JSON object",),
    ),
    "generation config broken": (
        c.put("generation_config.json", b"{"),
        ("generation_config.json: not valid JSON",),
    ),
    "chat template a fifo": (
        lambda f: os.mkfifo(f / "chat_template.jinja"),
        ("chat_template.jinja: not a regular file",),
    ),
    "template links outside": (
        lambda f: (f / "chat_template.jinja").symlink_to("/etc/passwd"),
        ("chat_template.jinja: a link that leaves the folder",),
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_source_is_refused(name: str, model: Path, tmp_path: Path, quantize: Quantize) -> None:
    change, fragments = CORRUPT[name]
    change(model)
    ended = quantize(model, tmp_path / "out")
    assert (ended.code, ended.document, ended.error["kind"]) == (3, None, "checkpoint"), ended.error
    for fragment in fragments:
        assert fragment in ended.error["message"]
    assert ended.error["hint"], "a next step"
    assert len(ended.error["message"]) < 3000
    assert ended.error["message"].isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["truncated by a byte", "shard missing", "config with NaN", "an expert too many"]
)
def test_a_dry_run_refuses_it_too(name: str, model: Path, tmp_path: Path, quantize: Quantize) -> None:
    change, fragments = CORRUPT[name]
    change(model)
    ended = quantize(model, tmp_path / "out", "--dry-run")
    assert (ended.code, ended.document, ended.error["kind"]) == (3, None, "checkpoint")
    for fragment in fragments:
        assert fragment in ended.error["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["truncated by a byte", "another model"])
def test_as_a_process(name: str, model: Path, tmp_path: Path, rows: Path) -> None:
    """The exit code and the two lines that a shell sees."""
    change, fragments = CORRUPT[name]
    change(model)
    ended = subprocess.run(
        [sys.executable, "-m", "m27quant", "quantize", model, tmp_path / "out", "--dataset", rows],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (3, "")
    *_, error, gap, hint = ended.stderr.splitlines()
    assert error.startswith("error: ")
    assert gap == ""
    assert hint.startswith("hint: ")
    for fragment in fragments:
        assert fragment in error
    assert not (tmp_path / "out").exists()
