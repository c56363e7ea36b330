"""config.json, hf_quant_config.json, tokenizer and chat template."""

from __future__ import annotations

from m27quant.verify.checks.wording import CONFIG, ERROR, NOTE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

check(
    "M27-F001", ERROR, "config file is missing or unreadable",
    "A file that engines read first is absent, or is no JSON object (NaN, byte-order mark, duplicate keys included).",
    "Fetch the file again.", engines("error on load", "error on load", "error on load"),
)  # fmt: skip
check(
    "M27-F002", ERROR, "config.json is not usable", "A field that the model's sizes depend on is absent or impossible.",
    "Take config.json from the original checkpoint and replace only quantization_config.",
    engines("error on load, or the class's defaults", "as vLLM", "the class's defaults, silently"),
)  # fmt: skip
check(
    "M27-F003", ERROR, "rotary_dim is missing",
    "Neither rotary_dim nor partial_rotary_factor: readers rotate the whole head instead of half of it.",
    'Add "rotary_dim": 64, as the official config.json has it.',
    engines("rotates the full head: garbage", "rotates the full head: garbage", "rotates the full head: garbage"),
)  # fmt: skip
check(
    "M27-F004", ERROR, "rope_theta is missing", "Readers fall back to 10000 where M2 was trained with 5000000.",
    'Add "rope_theta", as the official config.json has it.',
    engines("10000, silently", "10000, silently", "the class's default"),
)  # fmt: skip
check(
    "M27-F005", ERROR, "no quantization_config",
    "Nothing in config.json says that the experts are NVFP4.", CONFIG,
    engines("reads hf_quant_config.json where there is one, else shape errors", "as vLLM", "shape errors"),
)  # fmt: skip
check(
    "M27-F006", WARNING, "no hf_quant_config.json", "TensorRT-LLM and older engines read this file alone.",
    "Write it beside config.json with the same values.",
    engines("not needed beside quantization_config", "not needed beside quantization_config"),
)  # fmt: skip
check(
    "M27-F007", ERROR, "quant_algo is wrong",
    "The label must be NVFP4 (under quant_method modelopt), since that is what the expert tensors are.", CONFIG,
    engines("refuses it, or takes another loader", "refuses it, or takes another loader"),
)  # fmt: skip
check(
    "M27-F029", WARNING, "mixed precision is not judged",
    "MIXED_PRECISION gives every module an algorithm of its own, by names that vLLM and SGLang resolve differently; "
    "attention is often FP8. Experts are checked as NVFP4; FP8 attention, its scales and what an engine makes of the "
    "list are not.", "Keep attention in BF16 with quant_algo NVFP4: the only layout that both engines load.",
    engines("resolves names under mlp.experts; FP8 blocks need weight_scale",
             "resolves names under block_sparse_moe.experts; FP8 blocks need weight_scale_inv"),
)  # fmt: skip
check(
    "M27-F008", ERROR, "config.json and hf_quant_config.json disagree",
    "One checkpoint, two descriptions: each engine follows the one that it reads.", CONFIG,
    engines("follows config.json", "follows config.json"),
)  # fmt: skip
check(
    "M27-F009", ERROR, "group size is not 16", "NVFP4 has one block scale for 16 weights.", CONFIG,
    engines("wrong shapes", "wrong shapes"),
)  # fmt: skip
check(
    "M27-F010", ERROR, "kv_cache_scheme is not static",
    'Without "dynamic": false the cache silently stays in BF16.', CONFIG,
    engines("BF16 cache with only a warning: twice the memory", "ignores the field"),
)  # fmt: skip
check(
    "M27-F011", ERROR, "kv_cache_scheme is not 8-bit float", "Engines know an FP8 (E4M3) cache, nothing else.", CONFIG,
    engines("BF16 cache, or an error", "BF16 cache, or an error"),
)  # fmt: skip
check(
    "M27-F012", ERROR, "producer is not modelopt", "vLLM takes the format's meaning from producer.name.",
    'Set producer.name to "modelopt".', engines("refuses or misreads the section"),
)  # fmt: skip
check(
    "M27-F013", WARNING, "activations are declared unquantized",
    "input_activations is null while the label says NVFP4: vLLM takes the 16-bit path of Marlin.",
    "Declare input_activations, or label the checkpoint W4A16_NVFP4.",
    engines("reroutes to W4A16_NVFP4"),
)  # fmt: skip
check(
    "M27-F014", ERROR, "config_groups are not NVFP4", "Weights must be 4-bit floats, static.", CONFIG,
    engines("refuses or misreads the section", "ignores the groups"),
)  # fmt: skip
check(
    "M27-F015", WARNING, "KV scales without an FP8 cache",
    "Scales are stored, but no kv_cache_scheme asks for an FP8 cache: engines leave them aside.", CONFIG,
    engines("BF16 cache unless told otherwise", "BF16 cache unless told otherwise"),
)  # fmt: skip
check(
    "M27-F016", ERROR, "no end-of-sequence token",
    "generation_config.json is absent or names no eos_token_id: generation does not stop at the end of a turn.",
    "Copy generation_config.json from the original (eos_token_id 200020).",
    engines("runs to the token limit", "runs to the token limit", "uses the class's default"),
)  # fmt: skip
check(
    "M27-F017", ERROR, "wrong end-of-sequence token",
    "eos_token_id is not the tokenizer's end of turn, `[e~[`: generation does not stop where a turn ends.",
    "Copy generation_config.json from the original (eos_token_id 200020).",
    engines("runs to the token limit", "runs to the token limit", "runs to the token limit"),
)  # fmt: skip
check(
    "M27-F018", WARNING, "class defaults for bos and eos in config.json",
    "bos 1 and eos 2 come from the configuration class of the original's code, not from the model.",
    "Remove both from config.json; generation_config.json has the true ones.",
    engines("generation_config.json wins", "adds the wrong eos", "generation_config.json wins"),
)  # fmt: skip
check(
    "M27-F019", WARNING, "auto_map without its files",
    "config.json names Python files that are not in the folder.",
    "Remove auto_map, or copy the files from the original.",
    engines("error with --trust-remote-code", "error with --trust-remote-code", "error with trust_remote_code"),
)  # fmt: skip
check(
    "M27-F020", WARNING, "tokenizer class that breaks on transformers 5",
    "GPT2Tokenizer replaces M2's own pre-tokenizer in early transformers 5: spurious spaces, other ids. Any class "
    "but those that take tokenizer.json as it is may do the like, or not exist.",
    'Set tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json.',
    engines("spurious spaces, by version", "spurious spaces, by version", "wrong in early 5.x"),
)  # fmt: skip
check(
    "M27-F021", ERROR, "tokenizer is missing", "No tokenizer.json in the folder.",
    "Copy it from the original.",
    engines("needs --tokenizer", "needs --tokenizer-path", "cannot load a tokenizer"),
)  # fmt: skip
check(
    "M27-F022", ERROR, "chat template is missing", "Neither chat_template.jinja nor one in tokenizer_config.json.",
    "Copy chat_template.jinja from the original.",
    engines("chat requests fail", "a wrong default template", "chat templates fail"),
)  # fmt: skip
check(
    "M27-F023", ERROR, "special token is missing", "The tokenizer does not know one of M2's special tokens.",
    "Copy tokenizer.json from the original.",
    engines("turns, thinking or tool calls are not recognized", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-F024", ERROR, "tokenizer is larger than the vocabulary",
    "The tokenizer gives ids for which the embedding has no row.", "Take tokenizer and config.json of one model.",
    engines("index error or garbage", "index error or garbage", "index error"),
)  # fmt: skip
check(
    "M27-F025", NOTE, "claims multi-token prediction",
    "use_mtp and num_mtp_modules promise layers that public M2.x checkpoints do not hold.",
    "Nothing: engines drop the claim.  Speculative decoding needs a drafter of its own.",
    engines("drops it", "drops it", "ignores it"),
)  # fmt: skip
check(
    "M27-F026", ERROR, "two answers on rotation",
    "rotary_dim and partial_rotary_factor, or rope_theta and rope_parameters, contradict each other.",
    "Keep the official fields: rotary_dim and rope_theta.",
    engines("version by version another one counts", "as vLLM", "rope_parameters count"),
)  # fmt: skip
check(
    "M27-F027", ERROR, "rotation is not the official one",
    "The sizes are those of MiniMax-M2.x, but rotary_dim, rope_theta or head_dim is not what it was trained with.",
    "Take the field from the official config.json: rotary_dim 64, rope_theta 5000000, head_dim 128.",
    engines("rotates wrongly: garbage", "rotates wrongly: garbage", "rotates wrongly: garbage"),
)  # fmt: skip
check(
    "M27-F028", ERROR, "chat template is not usable", "The chat template is empty, or Jinja cannot compile it.",
    "Copy chat_template.jinja from the original.",
    engines("chat requests fail", "chat requests fail", "apply_chat_template fails"),
)  # fmt: skip
check(
    "M27-F030", ERROR, "dtype is not bfloat16",
    "dtype (torch_dtype in older files) is what attention, norms and all activations are computed in. MiniMax-M2.x is "
    "trained in BF16, whose range FP16 does not have: what is beyond 65,504 becomes infinite.",
    'Set "dtype": "bfloat16", as the official config.json has it.',
    engines("float16: computes in FP16; float32: BF16 instead, with a line in the log; another word: error on load",
             "computes in FP16, silently, for float32 and unknown words, too",
             "computes in what it says; another word: error on load"),
)  # fmt: skip
check(
    "M27-F031", WARNING, "dtype is not told",
    "Neither dtype nor torch_dtype: each engine decides for itself what it computes in.",
    'Add "dtype": "bfloat16".',
    engines("looks at the tensors: BF16", "takes float32 for granted and computes in FP16", "takes the tensors'"),
)  # fmt: skip
check(
    "M27-F032", NOTE, "tokenizer_config.json is missing",
    "tokenizer.json alone has no beginning, end and padding token, and names no class: each version takes its own.",
    "Copy it from the original.",
    engines("stops by generation_config.json alone", "as vLLM", "no bos, eos and pad token; 5.23 tokenizes rightly"),
)  # fmt: skip

check(
    "M27-F033", WARNING, "weights without tokenizer",
    "No tokenizer, no chat template: an export of the model alone. Whoever serves it takes them from elsewhere.",
    "Copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original.",
    engines("needs --tokenizer", "needs --tokenizer-path", "cannot load a tokenizer"),
)  # fmt: skip
