"""What can be wrong with a quantized checkpoint: each fault breaks one thing of a good one, and names its check."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from tests.faults import corruptions as c
from tests.faults.corruptions import INDEX, Change
from tests.faults.edits import (
    BIAS,
    FALLBACK,
    GATE,
    K_SCALE,
    LAYER,
    NAN,
    NORM,
    QUERY,
    V_SCALE,
    W2,
    W3,
    added,
    as_bf16,
    as_f32,
    both,
    config,
    dropped,
    excluding,
    forgotten_in_index,
    hf,
    json_field,
    link_out,
    moved_in_index,
    number,
    numbers,
    outside,
    pointer,
    renamed,
    replaced,
    same,
    section,
    special_token_lost,
    swizzled,
    times,
    token_beyond,
    without,
    zero_scale,
)


@dataclass(frozen=True)
class Fault:
    """A change, the check that must find it, and what the finding must name."""

    change: Change
    code: str
    names: str
    """Stands in the finding's message, tensor or file."""
    level: Literal["quick", "default"] = "quick"
    """The cheapest that can see it."""


FIRST = "model-00001-of-00014.safetensors"
SECOND = "model-00002-of-00014.safetensors"
EXPERTS = r".*\.experts\.\d+\.w[123]"

CONTAINER = {
    "empty shard": Fault(c.empty_shard, "M27-C001", FIRST),
    "header of 2^63 bytes": Fault(c.header_length(2**63), "M27-C001", FIRST),
    "header longer than the file": Fault(c.header_length(90_000_000), "M27-C001", FIRST),
    "header not JSON": Fault(c.header_text(b'{"a": '), "M27-C001", FIRST),
    "header not UTF-8": Fault(c.header_text(b'{"\xff": 1}'), "M27-C001", FIRST),
    "header a list": Fault(c.header_text(b"[]"), "M27-C001", FIRST),
    "header 100k deep": Fault(c.header_text(b'{"a":' * 100_000), "M27-C001", FIRST),
    "shard is a pickle": Fault(
        c.shard_becomes(lambda p: p.write_bytes(b"\x80\x02}q\x00." * 9)), "M27-C001", FIRST
    ),
    "shard is an LFS pointer": Fault(pointer(SECOND), "M27-C002", SECOND),
    "tokenizer is an LFS pointer": Fault(pointer("tokenizer.json"), "M27-C002", "tokenizer.json"),
    "metadata of numbers": Fault(
        lambda f: c.edit_header(f / FIRST, lambda h: h["__metadata__"].update(a=1)),
        "M27-C003",
        "__metadata__",
    ),
    "unknown dtype": Fault(c.first_entry(dtype="F12"), "M27-C003", "model.embed_tokens.weight"),
    "size is not shape times type": Fault(c.first_entry(shape=[3]), "M27-C003", "model.embed_tokens.weight"),
    "negative dimension": Fault(c.first_entry(shape=[-1, 4]), "M27-C003", "model.embed_tokens.weight"),
    "shape overflows": Fault(c.first_entry(shape=[2**62, 2**62]), "M27-C003", "model.embed_tokens.weight"),
    "hole": Fault(c.hole, "M27-C005", "model.embed_tokens.weight"),
    "truncated by a byte": Fault(c.truncated_by_one, "M27-C006", "model.embed_tokens.weight"),
    "trailing bytes": Fault(c.trailing_bytes, "M27-C007", FIRST),
    "name twice in a header": Fault(c.duplicate_key, "M27-C008", "model.embed_tokens.weight"),
    "tensor in two shards": Fault(c.same_tensor_twice, "M27-C009", "model.embed_tokens.weight"),
    "shard missing": Fault(c.missing_shard, "M27-C010", SECOND),
    "index places a tensor elsewhere": Fault(moved_in_index, "M27-C011", f"{W2}.weight"),
    "index names a tensor that is nowhere": Fault(
        c.index_names_absent("model.ghost.weight"), "M27-C011", "model.ghost.weight"
    ),
    "index forgets a tensor": Fault(forgotten_in_index, "M27-C012", f"{W2}.weight"),
    "stray shard": Fault(
        lambda f: (f / "old.safetensors").write_bytes((f / FIRST).read_bytes()), "M27-C013", "old.safetensors"
    ),
    "temporary file": Fault(c.put("model.tmp123", b"x"), "M27-C014", "model.tmp123"),
    "pickle beside": Fault(c.put("pytorch_model.bin", b"PK\x03\x04"), "M27-C014", "pytorch_model.bin"),
    "path with ..": Fault(outside("../evil.safetensors"), "M27-C015", "../evil.safetensors"),
    "absolute path": Fault(outside("/etc/passwd"), "M27-C015", "/etc/passwd"),
    "Windows path": Fault(outside("C:\\x.safetensors"), "M27-C015", "C:"),
    "not a safetensors file": Fault(outside("config.json"), "M27-C015", "config.json"),
    "link leaves the folder": Fault(c.link_leaves, "M27-C016", FIRST),
    "config.json is a link out": Fault(link_out("config.json"), "M27-C016", "config.json"),
    "tokenizer is a link out": Fault(link_out("tokenizer.json"), "M27-C016", "tokenizer.json"),
    "links in circles": Fault(c.shard_becomes(lambda p: p.symlink_to(p.name)), "M27-C016", FIRST),
    "link to nothing": Fault(c.shard_becomes(lambda p: p.symlink_to("nothing")), "M27-C022", FIRST),
    "mode 0600": Fault(lambda f: (f / FIRST).chmod(0o600), "M27-C017", FIRST),
    "index not JSON": Fault(c.index_text(b"{"), "M27-C018", INDEX),
    "weight_map a list": Fault(c.weight_map([]), "M27-C018", INDEX),
    "weight_map to numbers": Fault(c.weight_map({"a": 1}), "M27-C018", INDEX),
    "index missing": Fault(c.remove(INDEX), "M27-C019", INDEX),
    "total_size wrong": Fault(json_field(INDEX, "metadata", "total_size", value=7), "M27-C020", INDEX),
    "single file and index": Fault(c.single_and_index, "M27-C021", "model.safetensors"),
    "shard is a folder": Fault(c.shard_becomes(lambda p: p.mkdir()), "M27-C022", FIRST),
    "shard is a fifo": Fault(c.shard_becomes(os.mkfifo), "M27-C022", FIRST),
}

INVENTORY = {
    **{
        f"expert's {part} missing": Fault(without(f"{W2}.{part}"), "M27-T001", f"{W2}.{part}")
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale")
    },
    "norm missing": Fault(without(NORM), "M27-T002", NORM),
    "router bias missing": Fault(without(BIAS), "M27-T002", BIAS),
    "head missing": Fault(without("lm_head.weight"), "M27-T002", "lm_head.weight"),
    "KV scales of a layer missing": Fault(
        dropped(re.escape(K_SCALE), re.escape(V_SCALE)), "M27-T003", K_SCALE
    ),
    "all KV scales missing": Fault(dropped(r".*\.[kv]_scale"), "M27-T003", "quantization_report.json"),
    "k_scale missing": Fault(without(K_SCALE), "M27-T004", K_SCALE),
    "v_scale missing": Fault(without(V_SCALE), "M27-T004", V_SCALE),
    "in-memory names": Fault(
        both(
            renamed(r"\.block_sparse_moe\.", ".mlp."),
            renamed(r"\.w1\.", ".gate_proj."), renamed(r"\.w2\.", ".down_proj."), renamed(r"\.w3\.", ".up_proj."),
        ),
        "M27-T005", "mlp.experts.",
    ),
    "left-over amax": Fault(added(f"{QUERY}_amax"), "M27-T006", f"{QUERY}_amax"),
    "left-over quantizer": Fault(
        added(f"{W2}.weight_quantizer._amax"), "M27-T006", f"{W2}.weight_quantizer._amax"
    ),
    "MTP layer": Fault(added("model.layers.12.enorm.weight"), "M27-T007", "model.layers.12.enorm.weight"),
    "engine's KV names": Fault(renamed(r"[kv]_proj\.([kv]_scale)", r"attn.\1"), "M27-T008", "self_attn.attn.k_scale"),
    "unknown tensor": Fault(added(f"{LAYER}.self_attn.q_proj.bias"), "M27-T009", "q_proj.bias"),
    "expert too many": Fault(
        added(f"{LAYER}.block_sparse_moe.experts.4.w1.weight"), "M27-T009", "experts.4.w1.weight"
    ),
    "num_hidden_layers too large": Fault(config("num_hidden_layers", value=13), "M27-T010", "num_hidden_layers"),
    "num_hidden_layers too small": Fault(config("num_hidden_layers", value=11), "M27-T010", "num_hidden_layers"),
    "num_local_experts": Fault(config("num_local_experts", value=8), "M27-T010", "num_local_experts"),
    "hidden_size": Fault(config("hidden_size", value=64), "M27-T010", "hidden_size"),
    "intermediate_size": Fault(config("intermediate_size", value=48), "M27-T010", "intermediate_size"),
    "vocab_size": Fault(config("vocab_size", value=4096), "M27-T010", "vocab_size"),
    "num_attention_heads": Fault(config("num_attention_heads", value=4), "M27-T010", "num_attention_heads"),
    "FP8 scale left over": Fault(added(f"{QUERY}_scale_inv"), "M27-T011", f"{QUERY}_scale_inv"),
    "fake quantization": Fault(
        both(
            dropped(EXPERTS + r"\.(weight_scale|weight_scale_2|input_scale)"),
            replaced(EXPERTS + r"\.weight", "BF16", lambda s: [s[0], 2 * s[1]], lambda b: b * 4),
        ),
        "M27-T012", "experts.0.w1.weight",
    ),
    "weight-only": Fault(dropped(EXPERTS + r"\.input_scale"), "M27-T013", "input_scale"),
    "compressed-tensors names": Fault(
        both(
            renamed(r"(\.w[123])\.weight$", r"\1.weight_packed"),
            renamed(r"(\.w[123])\.weight_scale_2$", r"\1.weight_global_scale"),
            renamed(r"(\.w[123])\.input_scale$", r"\1.input_global_scale"),
        ),
        "M27-T014", "_global_scale",
    ),
}  # fmt: skip

TYPES = {
    "block scales as U8": Fault(
        replaced(re.escape(f"{W2}.weight_scale"), "U8", same, same), "M27-D001", f"{W2}.weight_scale"
    ),
    "attention in F16": Fault(replaced(re.escape(QUERY), "F16", same, same), "M27-D001", QUERY),
    "global scale in BF16": Fault(
        replaced(re.escape(f"{W2}.weight_scale_2"), "BF16", same, as_bf16), "M27-D001", f"{W2}.weight_scale_2"
    ),
    "norm too long": Fault(
        replaced(re.escape(NORM), "BF16", lambda s: [s[0] + 1], lambda b: b + b"\0\0"), "M27-D002", NORM
    ),
    "weight transposed": Fault(
        replaced(re.escape(f"{W2}.weight"), "U8", lambda s: s[::-1], same), "M27-D002", f"{W2}.weight"
    ),
    "gate in BF16": Fault(replaced(re.escape(GATE), "BF16", same, as_bf16), "M27-D003", GATE),
    "router bias in BF16": Fault(replaced(re.escape(BIAS), "BF16", same, as_bf16), "M27-D003", BIAS),
    "attention in F32": Fault(replaced(re.escape(QUERY), "F32", same, as_f32), "M27-D004", QUERY),
    "two global scales": Fault(
        replaced(re.escape(f"{W2}.weight_scale_2"), "F32", lambda s: [2], lambda b: b * 2),
        "M27-D005", f"{W2}.weight_scale_2",
    ),
    "global scale in a list": Fault(
        replaced(re.escape(f"{W2}.weight_scale_2"), "F32", lambda s: [1], same), "M27-D006", f"{W2}.weight_scale_2"
    ),
    "block scales swizzled": Fault(
        replaced(re.escape(f"{W2}.weight_scale"), "F8_E4M3", lambda s: [128, 4], swizzled),
        "M27-D007", f"{W2}.weight_scale",
    ),
    "k_scale in BF16": Fault(replaced(re.escape(K_SCALE), "BF16", same, as_bf16), "M27-D008", K_SCALE),
}  # fmt: skip

SCALES = {
    name: Fault(change, code, names, "default")
    for name, change, code, names in (
        ("global scale NaN", number(f"{W2}.weight_scale_2", NAN), "M27-S001", f"{W2}.weight_scale_2"),
        ("input scale infinite", number(f"{W2}.input_scale", float("inf")), "M27-S001", f"{W2}.input_scale"),
        ("k_scale NaN", number(K_SCALE, NAN), "M27-S001", K_SCALE),
        ("input scale zero", number(f"{W2}.input_scale", 0.0), "M27-S002", f"{W2}.input_scale"),
        ("global scale minus zero", number(f"{W2}.weight_scale_2", -0.0), "M27-S002", f"{W2}.weight_scale_2"),
        ("v_scale zero", number(V_SCALE, 0.0), "M27-S002", V_SCALE),
        ("global scale negative", number(f"{W2}.weight_scale_2", -1e-4), "M27-S003", f"{W2}.weight_scale_2"),
        ("v_scale negative", number(V_SCALE, -0.01), "M27-S003", V_SCALE),
        ("w3's global scale doubled", times(f"{W3}.weight_scale_2", 2), "M27-S004", f"{W3}.weight_scale_2"),
        ("w3's global scale a bit off", times(f"{W3}.weight_scale_2", 1.000001), "M27-S004", f"{W3}.weight_scale_2"),
        ("w3's input scale", times(f"{W3}.input_scale", 1.5), "M27-S005", f"{W3}.input_scale"),
        ("cold expert", number(f"{W2}.input_scale", FALLBACK), "M27-S006", f"{W2}.input_scale"),
        ("input scale 1.0", number(f"{W2}.input_scale", 1.0), "M27-S007", f"{W2}.input_scale"),
        ("global scale 1.0", number(f"{W2}.weight_scale_2", 1.0), "M27-S021", f"{W2}.weight_scale_2"),
        ("raw FP8 codes", numbers(EXPERTS + r"\.weight_scale_2", 448 / 2688), "M27-S008", "weight_scale_2"),
        ("input scale too small", times(f"{W2}.input_scale", 1 / 100), "M27-S009", f"{W2}.input_scale"),
        ("input scale too large", times(f"{W2}.input_scale", 500), "M27-S010", f"{W2}.input_scale"),
        ("global scale too large", times(f"{W2}.weight_scale_2", 500), "M27-S010", f"{W2}.weight_scale_2"),
        ("global scale too small", times(f"{W2}.weight_scale_2", 1 / 500), "M27-S011", f"{W2}.weight_scale_2"),
        ("block scale NaN", c.fill(f"{W2}.weight_scale", b"\x7f", at=3), "M27-S012", f"{W2}.weight_scale"),
        ("block scale minus NaN", c.fill(f"{W2}.weight_scale", b"\xff", at=3), "M27-S012", f"{W2}.weight_scale"),
        ("block scale negative", c.fill(f"{W2}.weight_scale", b"\xb8", at=3), "M27-S013", f"{W2}.weight_scale"),
        ("block scale zero", zero_scale, "M27-S014", f"{W2}.weight_scale"),
        ("block scales saturated", c.fill(f"{W2}.weight_scale", b"\x7e", count=64), "M27-S015", f"{W2}.weight_scale"),
        ("KV scales all 1.0", numbers(r".*\.[kv]_scale", 1.0), "M27-S016", "k_scale"),
    )
}  # fmt: skip

CONFIGS = {
    "config.json missing": Fault(c.remove("config.json"), "M27-F001", "config.json"),
    "config.json not JSON": Fault(c.config_bytes(b"{"), "M27-F001", "config.json"),
    "config.json with a BOM": Fault(c.config_bytes(b"\xef\xbb\xbf{}"), "M27-F001", "config.json"),
    "config.json with NaN": Fault(c.config_bytes(b'{"a": NaN}'), "M27-F001", "config.json"),
    "hf_quant_config.json empty": Fault(c.put("hf_quant_config.json", b"{}"), "M27-F001", "hf_quant_config.json"),
    "hidden_size missing": Fault(config("hidden_size", value=...), "M27-F002", "hidden_size"),
    "head_dim a string": Fault(config("head_dim", value="16"), "M27-F002", "head_dim"),
    "rotary_dim missing": Fault(config("rotary_dim", value=...), "M27-F003", "rotary_dim"),
    "rope_theta missing": Fault(config("rope_theta", value=...), "M27-F004", "rope_theta"),
    "quantization_config missing": Fault(config("quantization_config", value=...), "M27-F005", "config.json"),
    "hf_quant_config.json missing": Fault(c.remove("hf_quant_config.json"), "M27-F006", "hf_quant_config.json"),
    "quant_algo FP8": Fault(
        both(section("quant_algo", value="FP8"), hf("quantization", "quant_algo", value="FP8")),
        "M27-F007", "quant_algo",
    ),
    "quant_method fp8": Fault(section("quant_method", value="fp8"), "M27-F007", "quant_method"),
    "algorithms differ": Fault(hf("quantization", "quant_algo", value="FP8"), "M27-F008", "quant_algo"),
    "caches differ": Fault(hf("quantization", "kv_cache_quant_algo", value=None), "M27-F008", "FP8 cache"),
    "exclude lists differ": Fault(
        hf("quantization", "exclude_modules", value=["lm_head"]), "M27-F008", "exclude lists"
    ),
    "group size 32": Fault(
        section("config_groups", "group_0", "weights", "group_size", value=32), "M27-F009", "group_size"
    ),
    "hf group size 32": Fault(hf("quantization", "group_size", value=32), "M27-F009", "hf_quant_config.json"),
    "cache scheme not static": Fault(section("kv_cache_scheme", "dynamic", value=...), "M27-F010", "dynamic"),
    "cache scheme dynamic": Fault(section("kv_cache_scheme", "dynamic", value=True), "M27-F010", "dynamic"),
    "cache of 4 bits": Fault(section("kv_cache_scheme", "num_bits", value=4), "M27-F011", "kv_cache_scheme"),
    "another producer": Fault(section("producer", "name", value="somebody"), "M27-F012", "somebody"),
    "activations null": Fault(
        section("config_groups", "group_0", "input_activations", value=None), "M27-F013", "input_activations"
    ),
    "weights of 8 bits": Fault(
        section("config_groups", "group_0", "weights", "num_bits", value=8), "M27-F014", "weights"
    ),
    "KV scales without a cache": Fault(
        both(section("kv_cache_scheme", value=...), hf("quantization", "kv_cache_quant_algo", value=None)),
        "M27-F015", "KV scales",
    ),
    "generation_config.json missing": Fault(c.remove("generation_config.json"), "M27-F016", "generation_config.json"),
    "no eos": Fault(json_field("generation_config.json", "eos_token_id", value=...), "M27-F016", "eos_token_id"),
    "wrong eos": Fault(json_field("generation_config.json", "eos_token_id", value=2), "M27-F017", "eos_token_id"),
    "class defaults": Fault(
        both(config("bos_token_id", value=1), config("eos_token_id", value=2)), "M27-F018", "eos_token_id 2"
    ),
    "auto_map without files": Fault(
        config("auto_map", value={"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"}),
        "M27-F019", "configuration_minimax_m2.py",
    ),
    "GPT2Tokenizer": Fault(
        json_field("tokenizer_config.json", "tokenizer_class", value="GPT2Tokenizer"), "M27-F020", "GPT2Tokenizer"
    ),
    "tokenizer missing": Fault(c.remove("tokenizer.json"), "M27-F021", "tokenizer.json"),
    "weights alone": Fault(
        both(both(c.remove("tokenizer.json"), c.remove("tokenizer_config.json")), c.remove("chat_template.jinja")),
        "M27-F033", "weights alone",
    ),
    "tokenizer_config.json missing": Fault(
        c.remove("tokenizer_config.json"), "M27-F032", "tokenizer_config.json"
    ),
    "chat template missing": Fault(c.remove("chat_template.jinja"), "M27-F022", "chat_template"),
    "special token missing": Fault(special_token_lost, "M27-F023", "<minimax:tool_call>"),
    "token beyond the vocabulary": Fault(token_beyond, "M27-F024", "2,048"),
    "claims MTP": Fault(config("use_mtp", value=True), "M27-F025", "multi-token"),
    "two rotations": Fault(config("partial_rotary_factor", value=1.0), "M27-F026", "rotary_dim"),
    "two thetas": Fault(config("rope_parameters", value={"rope_theta": 7.0}), "M27-F026", "rope_theta"),
    "dtype float16": Fault(config("dtype", value="float16"), "M27-F030", "float16"),
    "dtype float32": Fault(config("dtype", value="float32"), "M27-F030", "float32"),
    "dtype no word": Fault(config("dtype", value=16), "M27-F030", "16"),
    "torch_dtype float16 beside it": Fault(config("torch_dtype", value="float16"), "M27-F030", "torch_dtype"),
    "dtype missing": Fault(config("dtype", value=...), "M27-F031", "no dtype"),
}  # fmt: skip

ENGINES = {
    "*mlp* excluded": Fault(excluding(lambda x: [*x, "*mlp*"]), "M27-E001", "vLLM takes"),
    "*block_sparse_moe* excluded": Fault(excluding(lambda x: [*x, "*block_sparse_moe*"]), "M27-E001", "SGLang takes"),
    "layer 1 and more excluded": Fault(
        excluding(lambda x: [*x, "model.layers.1*"]), "M27-E001", "model.layers.1.block_sparse_moe.experts"
    ),
    "attention of a layer not excluded": Fault(
        excluding(lambda x: [p for p in x if p != f"{LAYER}.self_attn*"]), "M27-E002", f"{LAYER}.self_attn"
    ),
    "globs of projections": Fault(
        excluding(lambda x: [p for p in x if "self_attn" not in p] + [f"*.self_attn.{p}_proj" for p in "qkvo"]),
        "M27-E002", "qkv_proj",
    ),
    "lm_head not excluded": Fault(excluding(lambda x: [p for p in x if p != "lm_head"]), "M27-E003", "lm_head"),
    "v not excluded": Fault(
        excluding(
            lambda x: [p for p in x if p != f"{LAYER}.self_attn*"] + [f"{LAYER}.self_attn.{p}_proj" for p in "qko"]
        ),
        "M27-E004", f"{LAYER}.self_attn.qkv_proj",
    ),
    "regular expression": Fault(excluding(lambda x: [*x, "re:.*self_attn.*"]), "M27-E005", "re:.*self_attn.*"),
    "exclude list a string": Fault(section("ignore", value="lm_head"), "M27-E006", "exclude list"),
}  # fmt: skip

FAULTS = CONTAINER | INVENTORY | TYPES | SCALES | CONFIGS | ENGINES
