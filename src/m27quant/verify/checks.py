"""Every check, as data: what it is called, how bad it is, what each engine does, how to mend it.  One place."""

from __future__ import annotations

from m27quant.verify.findings import Check, Severity

FAMILIES = {
    "C": "container",
    "T": "inventory",
    "D": "types",
    "S": "scales",
    "W": "weights",
    "F": "configs",
    "E": "engines",
    "V": "serving",
    "R": "drafter",
    "L": "logits",
    "O": "outputs",
}
"""Letter of a code -> family, the gravest first."""

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
CHECKS: dict[str, Check] = {}
"""By code."""

_LOADERS = {"transformers": "SafetensorError on load", "vllm": "SafetensorError on load", "sglang": "as vLLM"}
_AGAIN = "Download the file again; `hf cache verify` compares it with the Hub."
_REINDEX = "Write the index again from the shards' headers, or fetch index and shards of one revision."
_REQUANTIZE = "Quantize again, with every expert calibrated."
_CONFIG = "Correct the field; `m27quant quantize` writes it right."


def _check(
    code: str, severity: Severity, title: str, meaning: str, mend: str, engines: dict[str, str] | None = None
) -> None:
    CHECKS[code] = Check(
        code=code,
        family=FAMILIES[code[4]],
        severity=severity,
        title=title,
        meaning=meaning,
        engines=engines or {},
        mend=mend,
    )


def _engines(vllm: str = "", sglang: str = "", transformers: str = "") -> dict[str, str]:
    table = {"transformers": transformers, "vllm": vllm, "sglang": sglang}
    return {engine: what for engine, what in table.items() if what}


_GARBAGE = _engines("garbage, silently", "garbage, silently", "garbage, silently")
_AS_IS = _engines("used as it is", "used as it is", "used as it is")

# -- container -------------------------------------------------------------------------------------

_check(
    "M27-C001", ERROR, "shard is not a readable safetensors file",
    "Its first bytes are no safetensors header: too short, a length that cannot be, no JSON, or a pickle.",
    _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C002", ERROR, "git-lfs pointer instead of the file",
    "A clone without git-lfs leaves 130 bytes of text in the place of every large file.",
    "Run `git lfs pull` in the folder, or download with `hf download`.",
    _engines("header or JSON error on load", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-C003", ERROR, "header entry that lies",
    "The entry's dtype, shape and offsets contradict each other, or one of them is not of this format.",
    _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C004", ERROR, "tensors overlap", "Two tensors claim the same bytes: a small file that takes much memory.",
    _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C005", ERROR, "hole between tensors", "Bytes of the buffer belong to no tensor.", _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C006", ERROR, "shard is truncated", "The file ends before its last tensor does.", _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C007", ERROR, "trailing bytes behind the last tensor",
    "The file goes on where its header says that it ends: a file of two formats, or two writes into one.",
    _AGAIN, _LOADERS,
)  # fmt: skip
_check(
    "M27-C008", ERROR, "name twice in one header",
    "JSON readers keep the last of two equal keys, so that the first tensor exists for nobody.",
    "Write the shard again with one entry for each name.",
    _engines("the last entry wins, silently", "the last entry wins, silently", "the last entry wins, silently"),
)  # fmt: skip
_check(
    "M27-C009", ERROR, "tensor in two shards",
    "The index names one of them; engines that read whole shards take whichever comes last.",
    "Remove the copy that the index does not name.",
    _engines("reads every tensor of every shard: the last one wins, silently", "as vLLM", "obeys the index"),
)  # fmt: skip
_check(
    "M27-C010", ERROR, "shard of the index is missing", "The index names a file that is not in the folder.",
    "Fetch it: `hf download ORG/NAME FILE --local-dir FOLDER`.",
    _engines("FileNotFoundError", "FileNotFoundError", "FileNotFoundError"),
)  # fmt: skip
_check(
    "M27-C011", ERROR, "index places a tensor where it is not",
    "The shard that the index names does not hold this tensor.", _REINDEX,
    _engines("never loaded; memory of the weight stays uninitialized", "never loaded", "KeyError or random weights"),
)  # fmt: skip
_check(
    "M27-C012", ERROR, "tensor in a shard, not in the index",
    "Readers that go by the index never see it; those that read whole shards do.", _REINDEX,
    _engines("loads it", "loads it", "does not load it: random weights"),
)  # fmt: skip
_check(
    "M27-C013", WARNING, "shard that the index does not name",
    "A stale or foreign file; loaders that take every shard in the folder mix it into the model.",
    "Remove the file, or add its tensors to the index.",
    _engines("ignores it", "ignores it", "ignores it"),
)  # fmt: skip
_check(
    "M27-C014", WARNING, "left-over or pickled file",
    "Temporary files are traces of a write that did not end; pickles can run code and are never loaded here.",
    "Remove it once nothing writes to the folder.",
    _engines("may load *.bin or *.pt where told to", "as vLLM", "may load *.bin where told to"),
)  # fmt: skip
_check(
    "M27-C015", ERROR, "path in the index leaves the folder",
    "A name with separators, a drive, `..` or of no .safetensors file makes a reader open other people's files.",
    "Do not use this checkpoint; ask where it comes from.",
    _engines("joins it with the folder", "joins it with the folder", "opens the path"),
)  # fmt: skip
_check(
    "M27-C016", ERROR, "link that leaves the folder",
    "The shard is a link to a file outside; copies and uploads of the folder lose or leak it.",
    "Copy the file into the folder.",
    _engines("follows it", "follows it", "follows it"),
)  # fmt: skip
_check(
    "M27-C017", NOTE, "file that others cannot read",
    "The safetensors library writes 0600: a server under another user cannot open the file.",
    "chmod 644 the files.",
    _engines("PermissionError under another user", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-C018", ERROR, "index is unreadable",
    "It is no JSON object with a weight_map from names to file names, or a name appears twice in it.", _REINDEX,
    _engines("error on load, or the last of two entries wins", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-C019", ERROR, "several shards without an index",
    "Nothing says which shards belong to the model.", "Fetch model.safetensors.index.json too.",
    _engines("reads every file in the folder", "reads every file in the folder", "OSError: no weights"),
)  # fmt: skip
_check(
    "M27-C020", WARNING, "total_size is wrong",
    "The index's metadata.total_size is not the bytes of all tensors; planners of memory and downloads trust it.",
    _REINDEX, _engines("not read", "not read", "used to plan memory"),
)  # fmt: skip
_check(
    "M27-C021", ERROR, "single file beside an index",
    "model.safetensors and an index that does not mention it: readers disagree on which is the model.",
    "Remove the one that is not meant.",
    _engines("loads what the index names", "loads what the index names", "loads model.safetensors alone"),
)  # fmt: skip
_check(
    "M27-C022", ERROR, "not a regular file", "A directory, fifo, device or broken link in the place of a file.",
    "Put the file itself there.", _engines("error or hang on load", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-C023", ERROR, "checkpoint could not be verified",
    "The run ended before the checks could say anything: no such folder, no weights in it, a file that may not be "
    "read, a source that is none. Nothing is known about the checkpoint. Report files (`--output-file`) carry this "
    "code; the exit code is that of the fault: 3 where the input is unreadable, 4 where the machine is to blame.",
    "Mend what the message names and run again.",
    {"transformers": "OSError where there are no weights", "vllm": "fails to start", "sglang": "as vLLM"},
)  # fmt: skip

# -- inventory -------------------------------------------------------------------------------------

_check(
    "M27-T001", ERROR, "expert tensor missing",
    "One of the four tensors of an expert's matrix (weight, weight_scale, weight_scale_2, input_scale) is not there.",
    _REQUANTIZE,
    _engines("silently uses uninitialized memory: NaN or garbage, depending on the prompt",
             "input_scale becomes 1.0, others stay uninitialized, silently",
             "random weights, named in the loading report"),
)  # fmt: skip
_check(
    "M27-T002", ERROR, "tensor missing", "A tensor that config.json implies is not there.",
    "Fetch the shard again, or quantize again.",
    _engines("uninitialized memory, silently", "uninitialized memory, silently", "random weights, with a warning"),
)  # fmt: skip
_check(
    "M27-T003", ERROR, "KV scales of a layer missing",
    "Other layers have k_scale and v_scale, this one has neither: its cache is quantized with 1.0.", _REQUANTIZE,
    _engines("1.0, one warning for all", "1.0, silently"),
)  # fmt: skip
_check(
    "M27-T004", ERROR, "one KV scale without the other", "k_scale and v_scale come in pairs.", _REQUANTIZE,
    _engines("k alone is used for v too; v alone is an AssertionError", "the missing one is 1.0, silently"),
)  # fmt: skip
_check(
    "M27-T005", ERROR, "in-memory tensor names",
    "transformers' own names (`mlp.experts.E.gate_proj`, fused `gate_up_proj`) instead of the official "
    "`block_sparse_moe.experts.E.w1`: an export without its reverse mapping.",
    "Rename the tensors, or export again; `m27quant quantize` writes official names.",
    _engines('ValueError "There is no module or parameter named ..."', "skips them silently: garbage"),
)  # fmt: skip
_check(
    "M27-T006", ERROR, "left-overs of calibration",
    "`_amax` and `*_quantizer` tensors are modelopt's state while it calibrates: this was saved, not exported.",
    "Export with modelopt's export_hf_checkpoint, or quantize with m27quant.",
    _engines("ValueError: no such parameter", "skips them silently"),
)  # fmt: skip
_check(
    "M27-T007", WARNING, "tensors of layers behind the last one",
    "Multi-token-prediction layers: no engine's MiniMax-M2 runs them, and public M2.x checkpoints have none.",
    "Drop them: they take room only.",
    _engines("dropped silently where num_mtp_modules covers them", "skipped silently", "ignored"),
)  # fmt: skip
_check(
    "M27-T008", ERROR, "KV scales under an engine's own names",
    "`self_attn.attn.k_scale` is what an engine renames `self_attn.k_proj.k_scale` to.",
    "Store them as self_attn.k_proj.k_scale and self_attn.v_proj.v_scale.",
    _engines("not remapped: may load by chance", "becomes `.attn.attn.` and is dropped: 1.0"),
)  # fmt: skip
_check(
    "M27-T009", ERROR, "unknown tensor", "Nothing in a MiniMax-M2 checkpoint in NVFP4 has this name.",
    "Remove it, or correct its name.",
    _engines("ValueError: no such parameter", "skipped silently", "ignored, named in the loading report"),
)  # fmt: skip
_check(
    "M27-T010", ERROR, "config.json disagrees with the tensors",
    "A size in config.json is not the one that the tensors have: these two files are not of one model.",
    "Take config.json from the checkpoint that was quantized.",
    _engines("shape error, or experts and layers that stay uninitialized", "as vLLM", "shape error"),
)  # fmt: skip
_check(
    "M27-T011", ERROR, "FP8 left-overs",
    "`weight_scale_inv` belongs to the FP8 original; NVFP4 checkpoints have none.",
    "Store attention in BF16, dequantized, and leave the scales out.",
    _engines("ValueError: no such parameter", "skipped silently: FP8 codes taken for values"),
)  # fmt: skip
_check(
    "M27-T012", ERROR, "labelled NVFP4, but experts are not packed",
    "A fake-quantized upload: config says NVFP4, yet the expert weights are stored in 16 or 8 bits.",
    "Export the checkpoint in earnest, or quantize the original with m27quant.",
    _engines("shape or parameter error", "shape error"),
)  # fmt: skip
_check(
    "M27-T013", ERROR, "weight-only, but labelled NVFP4",
    "No expert has an input_scale, while config says that activations are quantized: engines use what is not there.",
    "Label it W4A16_NVFP4 with input_activations null, or calibrate and quantize again.",
    _engines("uninitialized input_scale: experts become zero or NaN, silently", "input_scale 1.0 everywhere"),
)  # fmt: skip
_check(
    "M27-T014", ERROR, "compressed-tensors names",
    "`weight_packed` and `weight_global_scale` are another format, whose global scales are reciprocals.",
    "Label it quant_method compressed-tensors, or convert names and invert the global scales.",
    _engines("ValueError: no such parameter", "skipped silently: garbage"),
)  # fmt: skip

# -- types and shapes ------------------------------------------------------------------------------

_check(
    "M27-D001", ERROR, "wrong dtype", "The tensor is not stored in the type that engines allocate for it.",
    _REQUANTIZE, _engines("cast by value, silently: codes taken for numbers", "as vLLM", "cast by value"),
)  # fmt: skip
_check(
    "M27-D002", ERROR, "wrong shape", "The tensor's shape is not the one that config.json implies.",
    _REQUANTIZE, _engines("shape error on load", "shape error on load", "shape error on load"),
)  # fmt: skip
_check(
    "M27-D003", WARNING, "router is not F32",
    "Gate or e_score_correction_bias in less than F32: rounding changes which experts a token goes to.",
    "Copy both byte for byte from the original.",
    _engines("computes the gate in F32 of what is stored", "as vLLM", "casts the bias to BF16 itself"),
)  # fmt: skip
_check(
    "M27-D004", NOTE, "attention in F32", "Twice the bytes of BF16 and not a bit more information.",
    "Store it in BF16: 5.5 GB less for M2.7.",
    _engines("casts to BF16 on load", "casts to BF16 on load", "casts on load"),
)  # fmt: skip
_check(
    "M27-D005", ERROR, "scale has the wrong rank", "A global scale, input scale or KV scale is one number.",
    _REQUANTIZE, _engines("ValueError, or the first number is taken", "as vLLM"),
)  # fmt: skip
_check(
    "M27-D006", WARNING, "scale is a list of one number", "Shape [1] where modelopt and engines write [].",
    "Store it with shape [].", _engines("accepted", "accepted"),
)  # fmt: skip
_check(
    "M27-D007", ERROR, "block scales are padded or swizzled",
    "weight_scale has the shape of one kernel's layout; checkpoints store it linear, engines swizzle on load.",
    "Store it as [out, in/16], row by row.", _engines("shape error on load", "shape error on load"),
)  # fmt: skip
_check(
    "M27-D008", ERROR, "KV scale in the wrong dtype", "k_scale and v_scale are F32.",
    _REQUANTIZE, _engines("cast by value, with the rounding that it had", "as vLLM"),
)  # fmt: skip

# -- scales ----------------------------------------------------------------------------------------

_check(
    "M27-S001", ERROR, "scale is NaN or infinite", "All that it multiplies is NaN or infinite.",
    _REQUANTIZE, _engines("NaN logits", "NaN logits", "NaN logits"),
)  # fmt: skip
_check(
    "M27-S002", ERROR, "scale is zero", "Zero removes the weight; a zero input_scale is divided by: Inf, then NaN.",
    _REQUANTIZE, _engines("1/0, then NaN, depending on the prompt", "as vLLM", "zero weights"),
)  # fmt: skip
_check(
    "M27-S003", ERROR, "scale is negative", "A scale is a magnitude; a negative one flips every sign.",
    _REQUANTIZE, _engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip
_check(
    "M27-S004", ERROR, "w1 and w3 differ in weight_scale_2",
    "Engines fuse w1 and w3 and take w1's scale for both: the up half is scaled wrongly.",
    "Quantize w1 and w3 of an expert with one global scale, as m27quant does.",
    _engines("warns once, then uses w1's for both", "TRT-LLM kernels keep both, others use w1's"),
)  # fmt: skip
_check(
    "M27-S005", ERROR, "w1 and w3 differ in input_scale",
    "Both matrices see the same activations, so their scales must be one number.", _REQUANTIZE,
    _engines("uses the larger one", "uses the larger one"),
)  # fmt: skip
_check(
    "M27-S006", WARNING, "expert was never calibrated",
    "input_scale is 1.8601190e-4, modelopt's fallback for an expert that saw no token: it saturates real inputs.",
    _REQUANTIZE,
    _engines("hidden by the layer's maximum, except VLLM_CUTLASS: expert saturates", "as vLLM; CUTEDSL uses it for w2"),
)  # fmt: skip
_check(
    "M27-S007", WARNING, "scale is the default 1.0",
    "Exactly 1.0 is what is written where nothing was measured.", _REQUANTIZE,
    _engines("dominates the layer's maximum; small activations underflow", "as vLLM"),
)  # fmt: skip
_check(
    "M27-S008", ERROR, "weight_scale_2 is 1/6",
    "448/2688: the maximum was taken from raw FP8 codes, without their block scales.",
    "Quantize from the dequantized weights (m27quant does; modelopt 0.47 on FP8 modules does not).",
    _engines("uses it: garbage", "uses it: garbage", "uses it: garbage"),
)  # fmt: skip
_check(
    "M27-S009", WARNING, "input_scale far below its layer's median",
    "Less than 1/16 of the median of the layer's experts: an expert that saw too few tokens saturates.",
    _REQUANTIZE, _engines("hidden by the layer's maximum, except VLLM_CUTLASS", "CUTEDSL uses it for w2"),
)  # fmt: skip
_check(
    "M27-S010", WARNING, "scale far above its layer's median",
    "More than 64 times the median: an outlier in calibration, or a damaged number.",
    "Look at the calibration text, or at the weights of this expert.",
    _engines("raises the layer's maximum for all experts", "as vLLM"),
)  # fmt: skip
_check(
    "M27-S011", WARNING, "weight_scale_2 far below its layer's median",
    "Less than 1/64 of the median: a matrix of almost nothing, or a damaged number.",
    "Compare the expert with the original.", _engines("used as it is", "used as it is"),
)  # fmt: skip
_check(
    "M27-S012", ERROR, "block scale is NaN", "Codes 0x7F and 0xFF of E4M3: sixteen weights are NaN.",
    _REQUANTIZE, _engines("NaN for every token of this expert", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-S013", ERROR, "block scale is negative", "A block scale is a magnitude: sixteen weights change sign.",
    _REQUANTIZE, _engines("used as it is, or as its magnitude", "as vLLM", "used as it is"),
)  # fmt: skip
_check(
    "M27-S014", ERROR, "block scale is zero under non-zero codes",
    "Sixteen weights that are not zero become zero: the block's scale underflowed E4M3.",
    "Quantize with m27quant or modelopt 0.45 and later, which keep at least 2^-9.",
    _engines("zero weights, silently", "zero weights, silently", "zero weights, silently"),
)  # fmt: skip
_check(
    "M27-S015", WARNING, "block scales are saturated",
    "More than a tenth of a matrix's block scales is 448: its global scale is too small and blocks are clipped.",
    "Take weight_scale_2 from the matrix's own maximum.", _engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip
_check(
    "M27-S016", WARNING, "KV scales are all 1.0",
    "Placeholders: the cache was never calibrated.  Without any KV scales engines use the same 1.0.",
    "Calibrate the cache, or leave the scales out (recipe *-fp8_kv_cast).",
    _engines("1.0: keys or values beyond 448 are clipped", "as vLLM"),
)  # fmt: skip
_check(
    "M27-S017", NOTE, "FP8 cache without scales",
    "The cast recipe: config asks for an FP8 cache, no scales are stored, engines use 1.0.",
    "Nothing, where this is meant; recipe nvfp4_experts_only-fp8_kv calibrates them.",
    _engines("1.0 and one warning", "1.0"),
)  # fmt: skip
_check(
    "M27-S018", ERROR, "global scales look like reciprocals",
    "Half of these scales stand for weights beyond 2,688, or inputs beyond 268,800: no model has them. "
    "compressed-tensors stores 2688/amax where modelopt stores amax/2688; with --source, M27-W012 proves it.",
    "Store the reciprocals: weight_scale_2 = amax/2688, input_scale = amax/2688.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-S019", WARNING, "KV scale far from the other layers'",
    "A scale 64 times below the median of all layers saturates the cache, one 64 times above leaves it few values.",
    "Calibrate the KV cache again.", _AS_IS,
)  # fmt: skip

_check(
    "M27-S020", WARNING, "block scales look swizzled",
    "Rows and columns of a trained matrix differ in size. Here the block scales, read in order, hide that, and read as "
    "a kernel's 128x4 tiles they show it. Matrices without such rows and columns, or that fill no tiles, are not "
    "judged; with --source, M27-W011 proves it.",
    "Store block scales row by row; engines swizzle them on load.", _GARBAGE,
)  # fmt: skip

_check(
    "M27-S021", ERROR, "weights that no model has",
    "6 times the largest block scale times weight_scale_2 is beyond 1,000, which no trained weight comes near: a "
    "global scale of 1.0 that nobody computed, or a damaged number.",
    "Take weight_scale_2 from the source's maximum divided by 2688.", _GARBAGE,
)  # fmt: skip

# -- weights: level full; from W010 on with a source -----------------------------------------------

_FETCH = "Download the file again, or quantize again."

_check(
    "M27-W001", ERROR, "shard is not the file that was written",
    "Its hash is not the one in quantization_report.json: a bit that flipped, a copy that broke off, an edit.",
    _FETCH, _AS_IS,
)  # fmt: skip
_check(
    "M27-W002", WARNING, "matrix of zeros",
    "All codes of an expert's matrix are zero: the expert gives nothing.",
    "Compare with the original: `m27quant verify CHECKPOINT --full --source MODEL`.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W003", WARNING, "blocks of zeros under scales of their own",
    "A block that was zero has scale 1; another scale says that there were sixteen weights, which are lost.",
    "Compare with the original: `m27quant verify CHECKPOINT --full --source MODEL`.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W004", ERROR, "codes are saturated",
    "More than half of a matrix's codes are 6, the largest: its scales are far too small and weights are clipped.",
    "Quantize with scales from the blocks' own maxima.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W005", ERROR, "weight is NaN or infinite", "A tensor of 16 or 32 bits holds numbers that are none.",
    _FETCH, _engines("NaN logits", "NaN logits", "NaN logits"),
)  # fmt: skip
_check(
    "M27-W006", WARNING, "report does not cover the shards",
    "quantization_report.json has no hash of a shard: that file's content is unproven.",
    "Take report and shards of one run.",
)  # fmt: skip
_check(
    "M27-W007", ERROR, "norm or router is all zero",
    "Nothing of the hidden state passes such a norm, and such a router knows no expert.", _AGAIN, _AS_IS,
)  # fmt: skip
_check(
    "M27-W008", WARNING, "nibbles look swapped",
    "Training leaves row j of w3 and column j of w2 both large or both small, and all w1 and w3 of a layer with the "
    "same large columns. Here neighbouring columns are exchanged against that. It takes columns that differ in size: "
    "a matrix without them is not judged, nor w1 and w3 that are all swapped, nor w2 after AWQ; with --source, "
    "M27-W010 proves it.",
    "Swap the nibbles of every byte, or quantize again.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W010", ERROR, "nibbles are swapped",
    "The even column belongs in the low nibble; with nibbles swapped the matrix fits its source.",
    "Swap the nibbles of every byte, or quantize again.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W011", ERROR, "block scales are swizzled",
    "Stored in the tiles of one kernel's layout; put back row by row, the matrix fits its source.",
    "Store block scales as [out, in/16], row by row.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W012", ERROR, "global scale is a reciprocal",
    "weight_scale_2 multiplies; this one is what compressed-tensors stores, which divides.",
    "Store 1 / weight_scale_2.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W013", ERROR, "global scale does not belong to the codes",
    "Codes and block scales are those of the source's maximum, weight_scale_2 is not: the whole matrix is scaled.",
    "Take weight_scale_2 from the source's maximum divided by 2688.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W014", ERROR, "another matrix's weights",
    "The matrix holds what belongs under another name: w1 and w3 exchanged, another expert, another layer.",
    "Correct the names, or quantize again.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W015", ERROR, "bytes are damaged",
    "Most matrices are exactly what quantizing the source gives, this one is not: it was changed afterwards.",
    _FETCH, _AS_IS,
)  # fmt: skip
_check(
    "M27-W016", ERROR, "matrix is not the source's",
    "Less than 10 dB of SQNR where NVFP4 has about 20, and no known mistake explains it.",
    "Make sure that --source is the right model, then quantize again.", _GARBAGE,
)  # fmt: skip
_check(
    "M27-W017", NOTE, "another recipe than block maxima",
    "Most matrices fit the source, but are not the bytes that scales from block maxima give: another method.",
    "Nothing, where this is meant.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W018", ERROR, "attention is not the source's",
    "Attention weights must be the BF16 dequantization of the source: one product in F32, rounded once.",
    "Dequantize attention in F32 and round to BF16, as m27quant does.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W019", ERROR, "embedding or head is not the source's",
    "Tensors that are not quantized are copied byte for byte.", "Copy the tensor from the source.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W020", ERROR, "router is not the source's",
    "Gate and e_score_correction_bias decide which experts a token goes to; they are copied byte for byte.",
    "Copy the tensor from the source.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W021", ERROR, "norm is not the source's", "Norms are copied byte for byte.",
    "Copy the tensor from the source.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W022", ERROR, "source is another model",
    "A size in its config.json differs, so nothing was compared.", "Name the model that was quantized as --source.",
)  # fmt: skip
_check(
    "M27-W023", WARNING, "quantized under another maximum",
    "Most matrices are exactly what quantizing the source gives; this one has another global scale and codes for it.",
    "Quantize again, with weight_scale_2 from the matrix's own maximum.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W024", ERROR, "config.json computes otherwise than the source's",
    "The sizes agree, but a field that decides on the numbers (rotation, epsilon, experts a token) is another.",
    "Take config.json from the source and replace only quantization_config.",
    _engines("computes with the field: garbage", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-W025", WARNING, "block scale is not the best",
    "quantization_report.json says that each block has the scale with the least squared error; another of the 126 "
    "would lose less of the source.",
    "Quantize again with the recipe that the report names.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W026", NOTE, "block scales could not be repeated",
    "quantization_report.json says that block scales have the least error weighted by the calibration's moments, which "
    "the checkpoint does not hold: codes and global scales were checked, the choice of block scales was not.",
    "Nothing; who doubts quantizes again with the same calibration data and compares the bytes.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W027", NOTE, "rounding could not be repeated",
    "quantization_report.json says that weights were rounded with error feedback by the calibration's Hessians, which "
    "the checkpoint does not hold: global scales and the distance of each matrix from the source were checked, the "
    "rounding was not.",
    "Nothing; who doubts quantizes again with the same calibration data and compares the bytes.", _AS_IS,
)  # fmt: skip
_check(
    "M27-W028", ERROR, "matrix is not as measured",
    "Weights that were rounded with error feedback have another SQNR against the source than quantization_report.json "
    "says: weights, report or source were changed afterwards.",
    _FETCH, _AS_IS,
)  # fmt: skip

# -- configs ---------------------------------------------------------------------------------------

_check(
    "M27-F001", ERROR, "config file is missing or unreadable",
    "A file that engines read first is absent, or is no JSON object (NaN, byte-order mark, duplicate keys included).",
    "Fetch the file again.", _engines("error on load", "error on load", "error on load"),
)  # fmt: skip
_check(
    "M27-F002", ERROR, "config.json is not usable", "A field that the model's sizes depend on is absent or impossible.",
    "Take config.json from the original checkpoint and replace only quantization_config.",
    _engines("error on load, or the class's defaults", "as vLLM", "the class's defaults, silently"),
)  # fmt: skip
_check(
    "M27-F003", ERROR, "rotary_dim is missing",
    "Neither rotary_dim nor partial_rotary_factor: readers rotate the whole head instead of half of it.",
    'Add "rotary_dim": 64, as the official config.json has it.',
    _engines("rotates the full head: garbage", "rotates the full head: garbage", "rotates the full head: garbage"),
)  # fmt: skip
_check(
    "M27-F004", ERROR, "rope_theta is missing", "Readers fall back to 10000 where M2 was trained with 5000000.",
    'Add "rope_theta", as the official config.json has it.',
    _engines("10000, silently", "10000, silently", "the class's default"),
)  # fmt: skip
_check(
    "M27-F005", ERROR, "no quantization_config",
    "Nothing in config.json says that the experts are NVFP4.", _CONFIG,
    _engines("reads hf_quant_config.json where there is one, else shape errors", "as vLLM", "shape errors"),
)  # fmt: skip
_check(
    "M27-F006", WARNING, "no hf_quant_config.json", "TensorRT-LLM and older engines read this file alone.",
    "Write it beside config.json with the same values.",
    _engines("not needed beside quantization_config", "not needed beside quantization_config"),
)  # fmt: skip
_check(
    "M27-F007", ERROR, "quant_algo is wrong",
    "The label must be NVFP4 (under quant_method modelopt), since that is what the expert tensors are.", _CONFIG,
    _engines("refuses it, or takes another loader", "refuses it, or takes another loader"),
)  # fmt: skip
_check(
    "M27-F029", WARNING, "mixed precision is not judged",
    "MIXED_PRECISION gives every module an algorithm of its own, by names that vLLM and SGLang resolve differently; "
    "attention is often FP8. Experts are checked as NVFP4; FP8 attention, its scales and what an engine makes of the "
    "list are not.", "Keep attention in BF16 with quant_algo NVFP4: the only layout that both engines load.",
    _engines("resolves names under mlp.experts; FP8 blocks need weight_scale",
             "resolves names under block_sparse_moe.experts; FP8 blocks need weight_scale_inv"),
)  # fmt: skip
_check(
    "M27-F008", ERROR, "config.json and hf_quant_config.json disagree",
    "One checkpoint, two descriptions: each engine follows the one that it reads.", _CONFIG,
    _engines("follows config.json", "follows config.json"),
)  # fmt: skip
_check(
    "M27-F009", ERROR, "group size is not 16", "NVFP4 has one block scale for 16 weights.", _CONFIG,
    _engines("wrong shapes", "wrong shapes"),
)  # fmt: skip
_check(
    "M27-F010", ERROR, "kv_cache_scheme is not static",
    'Without "dynamic": false the cache silently stays in BF16.', _CONFIG,
    _engines("BF16 cache with only a warning: twice the memory", "ignores the field"),
)  # fmt: skip
_check(
    "M27-F011", ERROR, "kv_cache_scheme is not 8-bit float", "Engines know an FP8 (E4M3) cache, nothing else.", _CONFIG,
    _engines("BF16 cache, or an error", "BF16 cache, or an error"),
)  # fmt: skip
_check(
    "M27-F012", ERROR, "producer is not modelopt", "vLLM takes the format's meaning from producer.name.",
    'Set producer.name to "modelopt".', _engines("refuses or misreads the section"),
)  # fmt: skip
_check(
    "M27-F013", WARNING, "activations are declared unquantized",
    "input_activations is null while the label says NVFP4: vLLM takes the 16-bit path of Marlin.",
    "Declare input_activations, or label the checkpoint W4A16_NVFP4.",
    _engines("reroutes to W4A16_NVFP4"),
)  # fmt: skip
_check(
    "M27-F014", ERROR, "config_groups are not NVFP4", "Weights must be 4-bit floats, static.", _CONFIG,
    _engines("refuses or misreads the section", "ignores the groups"),
)  # fmt: skip
_check(
    "M27-F015", WARNING, "KV scales without an FP8 cache",
    "Scales are stored, but no kv_cache_scheme asks for an FP8 cache: engines leave them aside.", _CONFIG,
    _engines("BF16 cache unless told otherwise", "BF16 cache unless told otherwise"),
)  # fmt: skip
_check(
    "M27-F016", ERROR, "no end-of-sequence token",
    "generation_config.json is absent or names no eos_token_id: generation does not stop at the end of a turn.",
    "Copy generation_config.json from the original (eos_token_id 200020).",
    _engines("runs to the token limit", "runs to the token limit", "uses the class's default"),
)  # fmt: skip
_check(
    "M27-F017", ERROR, "wrong end-of-sequence token",
    "eos_token_id is not the tokenizer's end of turn, `[e~[`: generation does not stop where a turn ends.",
    "Copy generation_config.json from the original (eos_token_id 200020).",
    _engines("runs to the token limit", "runs to the token limit", "runs to the token limit"),
)  # fmt: skip
_check(
    "M27-F018", WARNING, "class defaults for bos and eos in config.json",
    "bos 1 and eos 2 come from the configuration class of the original's code, not from the model.",
    "Remove both from config.json; generation_config.json has the true ones.",
    _engines("generation_config.json wins", "adds the wrong eos", "generation_config.json wins"),
)  # fmt: skip
_check(
    "M27-F019", WARNING, "auto_map without its files",
    "config.json names Python files that are not in the folder.",
    "Remove auto_map, or copy the files from the original.",
    _engines("error with --trust-remote-code", "error with --trust-remote-code", "error with trust_remote_code"),
)  # fmt: skip
_check(
    "M27-F020", WARNING, "tokenizer class that breaks on transformers 5",
    "GPT2Tokenizer replaces M2's own pre-tokenizer in early transformers 5: spurious spaces, other ids. Any class "
    "but those that take tokenizer.json as it is may do the like, or not exist.",
    'Set tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json.',
    _engines("spurious spaces, by version", "spurious spaces, by version", "wrong in early 5.x"),
)  # fmt: skip
_check(
    "M27-F021", ERROR, "tokenizer is missing", "No tokenizer.json in the folder.",
    "Copy it from the original.",
    _engines("needs --tokenizer", "needs --tokenizer-path", "cannot load a tokenizer"),
)  # fmt: skip
_check(
    "M27-F022", ERROR, "chat template is missing", "Neither chat_template.jinja nor one in tokenizer_config.json.",
    "Copy chat_template.jinja from the original.",
    _engines("chat requests fail", "a wrong default template", "chat templates fail"),
)  # fmt: skip
_check(
    "M27-F023", ERROR, "special token is missing", "The tokenizer does not know one of M2's special tokens.",
    "Copy tokenizer.json from the original.",
    _engines("turns, thinking or tool calls are not recognized", "as vLLM", "as vLLM"),
)  # fmt: skip
_check(
    "M27-F024", ERROR, "tokenizer is larger than the vocabulary",
    "The tokenizer gives ids for which the embedding has no row.", "Take tokenizer and config.json of one model.",
    _engines("index error or garbage", "index error or garbage", "index error"),
)  # fmt: skip
_check(
    "M27-F025", NOTE, "claims multi-token prediction",
    "use_mtp and num_mtp_modules promise layers that public M2.x checkpoints do not hold.",
    "Nothing: engines drop the claim.  Speculative decoding needs a drafter of its own.",
    _engines("drops it", "drops it", "ignores it"),
)  # fmt: skip
_check(
    "M27-F026", ERROR, "two answers on rotation",
    "rotary_dim and partial_rotary_factor, or rope_theta and rope_parameters, contradict each other.",
    "Keep the official fields: rotary_dim and rope_theta.",
    _engines("version by version another one counts", "as vLLM", "rope_parameters count"),
)  # fmt: skip
_check(
    "M27-F027", ERROR, "rotation is not the official one",
    "The sizes are those of MiniMax-M2.x, but rotary_dim, rope_theta or head_dim is not what it was trained with.",
    "Take the field from the official config.json: rotary_dim 64, rope_theta 5000000, head_dim 128.",
    _engines("rotates wrongly: garbage", "rotates wrongly: garbage", "rotates wrongly: garbage"),
)  # fmt: skip
_check(
    "M27-F028", ERROR, "chat template is not usable", "The chat template is empty, or Jinja cannot compile it.",
    "Copy chat_template.jinja from the original.",
    _engines("chat requests fail", "chat requests fail", "apply_chat_template fails"),
)  # fmt: skip
_check(
    "M27-F030", ERROR, "dtype is not bfloat16",
    "dtype (torch_dtype in older files) is what attention, norms and all activations are computed in. MiniMax-M2.x is "
    "trained in BF16, whose range FP16 does not have: what is beyond 65,504 becomes infinite.",
    'Set "dtype": "bfloat16", as the official config.json has it.',
    _engines("float16: computes in FP16; float32: BF16 instead, with a line in the log; another word: error on load",
             "computes in FP16, silently, for float32 and unknown words, too",
             "computes in what it says; another word: error on load"),
)  # fmt: skip
_check(
    "M27-F031", WARNING, "dtype is not told",
    "Neither dtype nor torch_dtype: each engine decides for itself what it computes in.",
    'Add "dtype": "bfloat16".',
    _engines("looks at the tensors: BF16", "takes float32 for granted and computes in FP16", "takes the tensors'"),
)  # fmt: skip
_check(
    "M27-F032", NOTE, "tokenizer_config.json is missing",
    "tokenizer.json alone has no beginning, end and padding token, and names no class: each version takes its own.",
    "Copy it from the original.",
    _engines("stops by generation_config.json alone", "as vLLM", "no bos, eos and pad token; 5.23 tokenizes rightly"),
)  # fmt: skip

_check(
    "M27-F033", WARNING, "weights without tokenizer",
    "No tokenizer, no chat template: an export of the model alone. Whoever serves it takes them from elsewhere.",
    "Copy tokenizer.json, tokenizer_config.json and chat_template.jinja from the original.",
    _engines("needs --tokenizer", "needs --tokenizer-path", "cannot load a tokenizer"),
)  # fmt: skip

# -- engines ---------------------------------------------------------------------------------------

_check(
    "M27-E001", ERROR, "exclude list covers experts",
    "By the engine's own matching the list takes NVFP4 experts out of quantization "
    "(vLLM sees `mlp.experts`, SGLang `block_sparse_moe.experts`).",
    "Use model.layers.N.self_attn*, model.layers.N.block_sparse_moe.gate for every layer, and lm_head.",
    _engines("AttributeError: no parameter 'w13_weight_scale'", "experts stay uninitialized, silently"),
)  # fmt: skip
_check(
    "M27-E002", ERROR, "attention is not excluded",
    "By the engine's own matching it expects NVFP4 where the checkpoint holds BF16.",
    "Exclude model.layers.N.self_attn* for every layer.",
    _engines("shape error on load", "shape error on load"),
)  # fmt: skip
_check(
    "M27-E003", ERROR, "lm_head is not excluded", "vLLM quantizes the head unless it is excluded.",
    'Add "lm_head" to the exclude lists.', _engines("shape error on load"),
)  # fmt: skip
_check(
    "M27-E004", ERROR, "q, k and v are excluded only in part", "Engines fuse the three and want one answer for all.",
    "Exclude model.layers.N.self_attn* for every layer.",
    _engines('ValueError "Detected some but not all shards of ... are quantized"', "as vLLM"),
)  # fmt: skip
_check(
    "M27-E005", WARNING, "regular expression in the exclude list",
    "`re:` is compressed-tensors' notation; modelopt's readers do not know it.", "Write globs or names.",
    _engines("never matches", "never matches"),
)  # fmt: skip
_check(
    "M27-E006", ERROR, "exclude list is not usable", "It is no list of module names, or far longer than the model.",
    _CONFIG, _engines("error on load", "error on load"),
)  # fmt: skip

# -- serving: only where --gpu, --tp, --ep or --context ask for it ---------------------------------

_OTHER_TP = (
    "Take another size; `m27quant verify CHECKPOINT --gpu GPU` picks the smallest that holds the model."
)
_KNOWN_FAULT = "Pass what the finding names, or take a version in which the fault is mended."

_check(
    "M27-V001", ERROR, "model does not divide among so many GPUs",
    "Tensor parallelism cuts query heads, key/value heads and the rows of every expert; blocks of 16 stay whole.",
    _OTHER_TP, _engines("ValueError or AssertionError on load", "as vLLM"),
)  # fmt: skip
_check(
    "M27-V002", ERROR, "experts' kernel refuses the shards",
    "The backend that is picked by itself wants a GPU's columns of w2 to be a multiple of 64: of its block scales, "
    "columns come in fours, and rows of the fused w1 and w3 in multiples of 128.",
    "Take another size, or a backend that pads, as the finding says.",
    _engines("NotImplementedError on load", "AssertionError on load"),
)  # fmt: skip
_check(
    "M27-V003", ERROR, "expert-parallel size does not fit",
    "Whole experts are divided among GPUs, evenly, and the engine has a rule for how this and tensor parallelism meet.",
    "Take a size that divides the experts and follows the engine's rule.",
    _engines("--enable-expert-parallel: the size is tensor- times data-parallel size", "--ep-size divides --tp-size"),
)  # fmt: skip
_check(
    "M27-V004", ERROR, "does not fit in memory",
    "Weights as the engine spreads them, and the cache for the context, are more than 90% of the GPU's memory.",
    "Take more GPUs, a shorter context, or a checkpoint with an FP8 cache.",
    _engines("out of memory, or no room for the cache", "out of memory, or no room for the cache"),
)  # fmt: skip
_check(
    "M27-V005", ERROR, "context is longer than the model's",
    "max_position_embeddings in config.json is less than the context that was asked for.",
    "Ask for a shorter context.", _engines("ValueError on start", "ValueError on start"),
)  # fmt: skip
_check(
    "M27-V006", WARNING, "custom all-reduce crashes",
    "On GPUs without NVLink vLLM's own all-reduce is left on where there are two of them, and crashes.",
    _KNOWN_FAULT, _engines("crash in the first forward; --disable-custom-all-reduce avoids it"),
)  # fmt: skip
_check(
    "M27-V007", WARNING, "tensor parallelism can hang",
    "Workstation boards whose IOMMU redirects traffic between GPUs let collectives wait for ever.",
    "Pass what the finding names, or turn ACS and IOMMU translation off.",
    _engines("hangs on start; NCCL_P2P_DISABLE=1 avoids it, at some speed"),
)  # fmt: skip
_check(
    "M27-V008", WARNING, "attention with an FP8 cache gives gibberish",
    "FlashAttention 3 with an FP8 cache gave meaningless text for M2.5 on H100.",
    _KNOWN_FAULT, _engines(sglang="repeats a word; --kv-cache-dtype bf16 avoids it, at twice the cache"),
)  # fmt: skip
_check(
    "M27-V009", NOTE, "misleading warning about KV scales",
    "The engine warns that no scaling factors were provided even where it has loaded them.",
    "Nothing: this tool's checks of KV scales say whether they are there.",
    _engines(sglang="prints the warning and uses the scales"),
)  # fmt: skip
_check(
    "M27-V010", NOTE, "backend that corrupts the model exists",
    "flashinfer_trtllm computes M2's routing wrongly; flashinfer_trtllm_routed, which 0.5.23 picks, does not.",
    "Leave the backend to the engine, or name the right one.",
    _engines(sglang="garbage with --moe-runner-backend flashinfer_trtllm, and in versions that pick it"),
)  # fmt: skip
_check(
    "M27-V011", NOTE, "backend that breaks under tensor parallelism exists",
    "flashinfer_b12x is never picked by itself and gives garbage where experts are cut among GPUs.",
    "Leave the backend to the engine.", _engines("garbage with --moe-backend flashinfer_b12x"),
)  # fmt: skip
_check(
    "M27-V012", NOTE, "activations are not quantized on this GPU",
    "Without FP4 units the weights are unpacked to 16 bits for every product: it saves memory, not arithmetic.",
    "Nothing, where memory is the aim; input_scale is not used there.",
    _engines("Marlin, W4A16", "Marlin, W4A16"),
)  # fmt: skip

# -- logits: with --logits -------------------------------------------------------------------------

_ALONE = "`m27quant verify CHECKPOINT --full --source MODEL` names the matrix; quantize again."
_check(
    "M27-L001", ERROR, "logits are NaN or infinite", "Some token of the text gets no probabilities.",
    "Mend what other checks find; overflow without a finding comes from scales that are far too large.",
    _engines("NaN logits, or `!` for ever", "NaN logits, or `!` for ever", "NaN logits"),
)  # fmt: skip
_check(
    "M27-L002", ERROR, "perplexity is too high",
    "Over its source's on the text, the ratio is above 1.05; tiny-m27, which has little to spare, measures 1.02.",
    _ALONE,
)  # fmt: skip
_check(
    "M27-L003", ERROR, "distributions are too far apart",
    "The mean KL divergence from the source's next-token probabilities is above 0.05 nats; tiny-m27 measures 0.013.",
    _ALONE,
)  # fmt: skip
_check(
    "M27-L004", WARNING, "too many likeliest tokens differ",
    "Checkpoint and source agree on fewer than 85% of the likeliest next tokens; tiny-m27 measures 92%.", _ALONE,
)  # fmt: skip
_check(
    "M27-L005", ERROR, "expert is not the source's",
    "On the source's own tokens for this expert its output has an SQNR below 10 dB; sound ones of tiny-m27 have 12 to "
    "18. A halved scale leaves 6 or less.",
    _ALONE, _engines("used as it is", "used as it is", "used as it is"),
)  # fmt: skip

# -- outputs: only where --outputs runs the checkpoint ---------------------------------------------

_RUN_AGAIN = (
    "Mend what the other findings say; if there are none, report it with the output of `m27quant env`."
)

_check(
    "M27-O001", ERROR, "kernel differs from the weights",
    "An expert's output as this device computes it has an SQNR below 35 dB against the same product in F64; sound "
    "kernels have more than 40.",
    "Run with M27QUANT_KERNELS=reference to tell kernel from weights, and report it with `m27quant env`.",
)  # fmt: skip
_check(
    "M27-O002", ERROR, "activations beyond their calibrated range",
    "What a layer's w2 sees is, in the median of its experts, more than twice as large as in calibration: the scales "
    "of w1 and w3 are too large there, or input_scale is too small.",
    _REQUANTIZE, _GARBAGE,
)  # fmt: skip
_check(
    "M27-O003", ERROR, "expert's output is not the source's",
    "On the same inputs its output has an SQNR below 6 dB against the source's expert; sound ones have 10 to 20. The "
    "factor between them tells a wrong scale.",
    _REQUANTIZE, _AS_IS,
)  # fmt: skip
_check(
    "M27-O004", ERROR, "tokenizer class breaks the tokenizer",
    "Loaded through the class that tokenizer_config.json names, texts become other tokens than tokenizer.json gives, "
    "or do not come back as they were: spaces where none belong, as in `SPEC. md`.",
    "Set tokenizer_class to PreTrainedTokenizerFast, which takes tokenizer.json as it is in transformers 4 and 5.",
    _engines("other tokens, silently", "other tokens, silently", "other tokens, silently"),
)  # fmt: skip
_check(
    "M27-O005", ERROR, "a prompt got no answer",
    "Logits were NaN or infinite, or the prompt does not fit.", _RUN_AGAIN,
)  # fmt: skip
_check(
    "M27-O006", ERROR, "the source passes a smoke test, the checkpoint does not",
    "Prose, a tool call that parses, closed thoughts: the source's own answer has it, the checkpoint's does not.",
    _RUN_AGAIN,
)  # fmt: skip
_check(
    "M27-O007", NOTE, "smoke test not passed",
    "An answer lacks prose, a tool call that parses, or closed thoughts. Without a source that does better it may be "
    "the model's own weakness, or too few tokens.",
    "Give --source to compare, or more --max-tokens.",
)  # fmt: skip
_check(
    "M27-O008", ERROR, "texts are sicker than the source's",
    "More spurious spaces, repetition or broken characters than in what the source writes to the same prompts.",
    _RUN_AGAIN,
)  # fmt: skip
_check(
    "M27-O009", WARNING, "texts look sick",
    "Many spurious spaces, hardly anything but repetition, or broken characters; there is no source to compare with.",
    "Give --source to compare.",
)  # fmt: skip
_check(
    "M27-O010", ERROR, "drafter changes the text",
    "In batch-invariant mode a text with the drafter must be the text without it, token for token.",
    "Report it with the output of `m27quant env`: the fault is in the runtime.",
)  # fmt: skip
_check(
    "M27-O011", ERROR, "drafter's taps are shifted",
    "Fed with hidden states one layer up or down, clearly more of its drafts are accepted: its config.json counts "
    "layers otherwise than it was trained.",
    "State the hidden states that it was trained on in its config.json, or run with --drafter-tap-offset.",
    _engines("low acceptance, silently", "low acceptance, silently"),
)  # fmt: skip
_check(
    "M27-O012", WARNING, "drafter does not pay",
    "Fewer than 1.1 tokens a step: it belongs to another target, or its text is not what it was trained on.",
    "Take a drafter that was trained for this target; `--drafter ngram` costs nothing.",
)  # fmt: skip
_check(
    "M27-O013", NOTE, "drafter changes the text by rounding",
    "Outside of batch-invariant mode products of several rows round otherwise than those of one, and near ties fall "
    "differently.",
    "Nothing, or run with --invariant.",
)  # fmt: skip

_check(
    "M27-O014", WARNING, "activations use little of their calibrated range",
    "What a layer's w2 sees is less than an eighth of what the other layers' see of their ranges: the scales of w1 and "
    "w3 are too small there, or input_scale is too large.",
    "Compare with --source, which tells a wrong scale from a quiet layer.", _AS_IS,
)  # fmt: skip

# -- drafter: only where --drafter asks for it -----------------------------------------------------

_TRAIN = "Take a drafter that was trained for this target, or export it again."
_TAPS = "Ask who trained the drafter which hidden states it saw, and state exactly these in its config.json."

_check(
    "M27-R001", ERROR, "drafter's files are not readable",
    "config.json or the weights are missing, damaged, pickled, or lie outside the folder.",
    "Download the drafter again.", _engines("error on load", "error on load"),
)  # fmt: skip
_check(
    "M27-R002", ERROR, "not a drafter for MiniMax-M2",
    "Nothing in its config.json says DFlash or EAGLE3, the two kinds that engines run with MiniMax-M2.",
    "Name a DFlash or EAGLE3 drafter.", _engines("error on load, or an unrelated draft model", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R003", ERROR, "variant that is not supported",
    "A relative of DFlash or EAGLE3 with other mathematics: run as the plain kind it accepts next to nothing.",
    "Take the plain kind.", _engines("refuses it, or drafts nonsense", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R004", ERROR, "drafter's config.json is not usable",
    "A size or setting that the drafter is computed from is absent or impossible.",
    "Take config.json from where the weights come from.", _engines("error on load, or a class's default", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R005", ERROR, "drafter's tensor missing", "A tensor that the drafter's config.json implies is not there.",
    _TRAIN, _engines("uninitialized memory or an error", "uninitialized memory, silently"),
)  # fmt: skip
_check(
    "M27-R006", WARNING, "drafter's tensor unknown", "Nothing in a drafter of this kind has this name.",
    "Remove it, or correct its name.", _engines("KeyError or ignored", "ignored"),
)  # fmt: skip
_check(
    "M27-R007", ERROR, "drafter's tensor has the wrong shape",
    "Its shape is not the one that the drafter's config.json implies.",
    _TRAIN, _engines("shape error on load", "shape error on load"),
)  # fmt: skip
_check(
    "M27-R008", ERROR, "drafter's weights are quantized",
    "Drafters run in 16 bits here; these weights are stored as codes, or in a type that is no float.",
    "Store the drafter in BF16.", _engines("codes taken for numbers", "codes taken for numbers"),
)  # fmt: skip
_check(
    "M27-R009", ERROR, "drafter is for another hidden size",
    "It reads the target's hidden states and shares its embedding and head: the width must be the target's.",
    _TRAIN, _engines("shape error in the first step", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R010", ERROR, "drafter has another vocabulary",
    "Token ids mean the same only where drafter and target share a vocabulary: its own may not be larger, and "
    "an embedding of its own must have a row for every id of the target.",
    _TRAIN, _engines("error on load, or garbage drafts", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R011", ERROR, "reduced vocabulary without d2t",
    "The head has fewer rows than the target has tokens, and nothing says which token a row stands for.",
    "Export the drafter with its d2t.", _engines("row numbers taken for ids: nothing is accepted", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R012", ERROR, "d2t or t2d is not a table",
    "d2t holds one integer for each row of the head, t2d one boolean for each token of the target.",
    "Export the drafter again.", _engines("shape error, or values rounded", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R013", ERROR, "d2t leads to wrong tokens",
    "d2t holds offsets: row i stands for token i + d2t[i].  Each must be a token, and no two rows the same one.",
    "Where it holds ids, subtract the row numbers.",
    _engines("index error or drafts of other tokens", "index error or drafts of other tokens"),
)  # fmt: skip
_check(
    "M27-R014", ERROR, "t2d contradicts d2t",
    "t2d marks the tokens that the drafter knows; those are exactly the tokens that d2t leads to.",
    "Export the drafter again: one of the two belongs to another.", _engines("not read", "not read"),
)  # fmt: skip
_check(
    "M27-R015", ERROR, "taps are not stated",
    "A DFlash drafter without target_layer_ids: formulas that guess them are wrong for most published drafters.",
    _TAPS, _engines("guesses, or error on load", "guesses, or error on load"),
)  # fmt: skip
_check(
    "M27-R016", ERROR, "tap out of range", "The target has no layer of this number.",
    _TAPS, _engines("index error, or a tap that is never filled", "IndexError"),
)  # fmt: skip
_check(
    "M27-R017", WARNING, "tap behind the last layer",
    "The last layer's output is often taken after the final norm, or not at all (sglang#32204, vllm#46788).",
    _TAPS, _engines("uninitialized or normed states, by version", "IndexError"),
)  # fmt: skip
_check(
    "M27-R018", ERROR, "taps do not fill the drafter's input",
    "fc takes as many hidden states at once as it was trained with; config.json names another number of taps.",
    _TAPS, _engines("shape error in the first step", "as vLLM"),
)  # fmt: skip
_check(
    "M27-R019", ERROR, "taps are not in ascending order",
    "vLLM sorts the taps and drops repetitions: fc then sees hidden states in other places than in training.",
    "Sort the taps and the columns of fc.weight with them.", _engines("sorts them, silently: nothing is accepted"),
)  # fmt: skip
_check(
    "M27-R020", ERROR, "two lists of taps contradict each other",
    "The nested list counts layers, the top-level list hidden states, which is one more: each engine reads its own.",
    _TAPS, _engines("reads the top-level list", "reads the nested list"),
)  # fmt: skip
_check(
    "M27-R021", WARNING, "vLLM taps one layer too early",
    "It takes the ids nested in eagle_config for hidden states (vllm#43671): 10% accepted at the first place, not 45%.",
    "Add a top-level eagle_aux_hidden_state_layer_ids with each id plus one; SGLang does not read it.",
    _engines("V1 runner: one layer early; V2 runner: its defaults"),
)  # fmt: skip
_check(
    "M27-R022", WARNING, "SGLang takes other taps",
    "It reads only ids nested in eagle_config, and always adds one to them.",
    "State the taps in eagle_config as numbers of layers: the hidden state's number less one.",
    _engines(sglang="its defaults, or one layer too late, silently"),
)  # fmt: skip
_check(
    "M27-R023", WARNING, "taps are the engine's defaults",
    "An EAGLE3 drafter that states no taps gets hidden states 2, N/2 and N-3 of N layers.",
    _TAPS, _engines("defaults, with a warning", "defaults, silently"),
)  # fmt: skip
_check(
    "M27-R024", ERROR, "mask token is missing or no token",
    "DFlash fills the places to be drafted with this token's embedding, a row of the target's table.",
    "State mask_token_id in dflash_config.", _engines("error on load", "error on load"),
)  # fmt: skip
_check(
    "M27-R025", ERROR, "drafter has no head",
    "An EAGLE3 drafter, or one of a reduced vocabulary, cannot take the target's head for its own.",
    "Export the drafter with lm_head.weight.",
    _engines("shape error, or the target's head", "accepts nothing (sglang#27908)"),
)  # fmt: skip
_check(
    "M27-R026", NOTE, "drafter has its own embedding or head",
    "Engines share the target's where the drafter brings none: a second copy takes memory.",
    "Nothing, or leave it out where it equals the target's.", _engines("loads it", "loads it, or shares the target's"),
)  # fmt: skip
_check(
    "M27-R027", ERROR, "drafter inherits the target's quantization",
    "Its config.json has a quantization_config, copied with the rest of the target's, but its weights are plain.",
    "Remove quantization_config from the drafter's config.json.",
    _engines("expects packed weights: error on load", "expects packed weights: error on load"),
)  # fmt: skip
_check(
    "M27-R028", NOTE, "SGLang quantizes the drafter unless told otherwise",
    "Without a flag of its own the drafter takes --quantization of the target.",
    "Pass --speculative-draft-model-quantization unquant.",
    _engines(sglang="treats the drafter as modelopt_fp4: error or garbage"),
)  # fmt: skip
_check(
    "M27-R029", WARNING, "SGLang does not run DFlash with MiniMax-M2",
    "0.5.23 has no set_dflash_layers_to_capture for this model; its EAGLE3 hooks are there.",
    "Serve it with vLLM, or with a version of SGLang that has them.", _engines(sglang="ValueError on start"),
)  # fmt: skip
_check(
    "M27-R030", WARNING, "rope_theta of the drafter is missing",
    "Readers fall back to different values: 10000 in transformers, 1000000 in vLLM's DFlash.",
    "State the value that it was trained with.", _engines("1000000 for DFlash, else 10000", "10000"),
)  # fmt: skip
