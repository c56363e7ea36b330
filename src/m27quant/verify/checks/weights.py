"""What the weights hold: level full; with a source, against it."""

from __future__ import annotations

from m27quant.verify.checks.wording import AGAIN, AS_IS, ERROR, GARBAGE, NOTE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

_FETCH = "Download the file again, or quantize again."

check(
    "M27-W001", ERROR, "shard is not the file that was written",
    "Its hash is not the one in quantization_report.json: a bit that flipped, a copy that broke off, an edit.",
    _FETCH, AS_IS,
)  # fmt: skip
check(
    "M27-W002", WARNING, "matrix of zeros",
    "All codes of an expert's matrix are zero: the expert gives nothing.",
    "Compare with the original: `m27quant verify CHECKPOINT --full --source MODEL`.", AS_IS,
)  # fmt: skip
check(
    "M27-W003", WARNING, "blocks of zeros under scales of their own",
    "A block that was zero has scale 1; another scale says that there were sixteen weights, which are lost.",
    "Compare with the original: `m27quant verify CHECKPOINT --full --source MODEL`.", AS_IS,
)  # fmt: skip
check(
    "M27-W004", ERROR, "codes are saturated",
    "More than half of a matrix's codes are 6, the largest: its scales are far too small and weights are clipped.",
    "Quantize with scales from the blocks' own maxima.", GARBAGE,
)  # fmt: skip
check(
    "M27-W005", ERROR, "weight is NaN or infinite", "A tensor of 16 or 32 bits holds numbers that are none.",
    _FETCH, engines("NaN logits", "NaN logits", "NaN logits"),
)  # fmt: skip
check(
    "M27-W006", WARNING, "report does not cover the shards",
    "quantization_report.json has no hash of a shard: that file's content is unproven.",
    "Take report and shards of one run.",
)  # fmt: skip
check(
    "M27-W007", ERROR, "norm or router is all zero",
    "Nothing of the hidden state passes such a norm, and such a router knows no expert.", AGAIN, AS_IS,
)  # fmt: skip
check(
    "M27-W008", WARNING, "nibbles look swapped",
    "Training leaves row j of w3 and column j of w2 both large or both small, and all w1 and w3 of a layer with the "
    "same large columns. Here neighbouring columns are exchanged against that. It takes columns that differ in size: "
    "a matrix without them is not judged, nor w1 and w3 that are all swapped, nor w2 after AWQ; with --source, "
    "M27-W010 proves it.",
    "Swap the nibbles of every byte, or quantize again.", GARBAGE,
)  # fmt: skip
check(
    "M27-W010", ERROR, "nibbles are swapped",
    "The even column belongs in the low nibble; with nibbles swapped the matrix fits its source.",
    "Swap the nibbles of every byte, or quantize again.", GARBAGE,
)  # fmt: skip
check(
    "M27-W011", ERROR, "block scales are swizzled",
    "Stored in the tiles of one kernel's layout; put back row by row, the matrix fits its source.",
    "Store block scales as [out, in/16], row by row.", GARBAGE,
)  # fmt: skip
check(
    "M27-W012", ERROR, "global scale is a reciprocal",
    "weight_scale_2 multiplies; this one is what compressed-tensors stores, which divides.",
    "Store 1 / weight_scale_2.", GARBAGE,
)  # fmt: skip
check(
    "M27-W013", ERROR, "global scale does not belong to the codes",
    "Codes and block scales are those of the source's maximum, weight_scale_2 is not: the whole matrix is scaled.",
    "Take weight_scale_2 from the source's maximum divided by 2688.", AS_IS,
)  # fmt: skip
check(
    "M27-W014", ERROR, "another matrix's weights",
    "The matrix holds what belongs under another name: w1 and w3 exchanged, another expert, another layer.",
    "Correct the names, or quantize again.", GARBAGE,
)  # fmt: skip
check(
    "M27-W015", ERROR, "bytes are damaged",
    "Most matrices are exactly what quantizing the source gives, this one is not: it was changed afterwards.",
    _FETCH, AS_IS,
)  # fmt: skip
check(
    "M27-W016", ERROR, "matrix is not the source's",
    "Less than 10 dB of SQNR where NVFP4 has about 20, and no known mistake explains it.",
    "Make sure that --source is the right model, then quantize again.", GARBAGE,
)  # fmt: skip
check(
    "M27-W017", NOTE, "another recipe than block maxima",
    "Most matrices fit the source, but are not the bytes that scales from block maxima give: another method.",
    "Nothing, where this is meant.", AS_IS,
)  # fmt: skip
check(
    "M27-W018", ERROR, "attention is not the source's",
    "Attention weights must be the BF16 dequantization of the source: one product in F32, rounded once.",
    "Dequantize attention in F32 and round to BF16, as m27quant does.", AS_IS,
)  # fmt: skip
check(
    "M27-W019", ERROR, "embedding or head is not the source's",
    "Tensors that are not quantized are copied byte for byte.", "Copy the tensor from the source.", AS_IS,
)  # fmt: skip
check(
    "M27-W020", ERROR, "router is not the source's",
    "Gate and e_score_correction_bias decide which experts a token goes to; they are copied byte for byte.",
    "Copy the tensor from the source.", AS_IS,
)  # fmt: skip
check(
    "M27-W021", ERROR, "norm is not the source's", "Norms are copied byte for byte.",
    "Copy the tensor from the source.", AS_IS,
)  # fmt: skip
check(
    "M27-W022", ERROR, "source is another model",
    "A size in its config.json differs, so nothing was compared.", "Name the model that was quantized as --source.",
)  # fmt: skip
check(
    "M27-W023", WARNING, "quantized under another maximum",
    "Most matrices are exactly what quantizing the source gives; this one has another global scale and codes for it.",
    "Quantize again, with weight_scale_2 from the matrix's own maximum.", AS_IS,
)  # fmt: skip
check(
    "M27-W024", ERROR, "config.json computes otherwise than the source's",
    "The sizes agree, but a field that decides on the numbers (rotation, epsilon, experts a token) is another.",
    "Take config.json from the source and replace only quantization_config.",
    engines("computes with the field: garbage", "as vLLM", "as vLLM"),
)  # fmt: skip
check(
    "M27-W025", WARNING, "block scale is not the best",
    "quantization_report.json says that each block has the scale with the least squared error; another of the 126 "
    "would lose less of the source.",
    "Quantize again with the recipe that the report names.", AS_IS,
)  # fmt: skip
check(
    "M27-W026", NOTE, "block scales could not be repeated",
    "quantization_report.json says that block scales have the least error weighted by the calibration's moments, which "
    "the checkpoint does not hold: codes and global scales were checked, the choice of block scales was not.",
    "Nothing; who doubts quantizes again with the same calibration data and compares the bytes.", AS_IS,
)  # fmt: skip
check(
    "M27-W027", NOTE, "rounding could not be repeated",
    "quantization_report.json says that weights were rounded with error feedback by the calibration's Hessians, which "
    "the checkpoint does not hold: global scales and the distance of each matrix from the source were checked, the "
    "rounding was not.",
    "Nothing; who doubts quantizes again with the same calibration data and compares the bytes.", AS_IS,
)  # fmt: skip
check(
    "M27-W028", ERROR, "matrix is not as measured",
    "Weights that were rounded with error feedback have another SQNR against the source than quantization_report.json "
    "says: weights, report or source were changed afterwards.",
    _FETCH, AS_IS,
)  # fmt: skip
