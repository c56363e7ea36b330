"""A drafter beside its target: with --drafter."""

from __future__ import annotations

from m27quant.verify.checks.wording import ERROR, NOTE, WARNING, adder, engines
from m27quant.verify.findings import Check

CHECKS: dict[str, Check] = {}
check = adder(CHECKS)

_TRAIN = "Take a drafter that was trained for this target, or export it again."
_TAPS = "Ask who trained the drafter which hidden states it saw, and state exactly these in its config.json."

check(
    "M27-R001", ERROR, "drafter's files are not readable",
    "config.json or the weights are missing, damaged, pickled, or lie outside the folder.",
    "Download the drafter again.", engines("error on load", "error on load"),
)  # fmt: skip
check(
    "M27-R002", ERROR, "not a drafter for MiniMax-M2",
    "Nothing in its config.json says DFlash or EAGLE3, the two kinds that engines run with MiniMax-M2.",
    "Name a DFlash or EAGLE3 drafter.", engines("error on load, or an unrelated draft model", "as vLLM"),
)  # fmt: skip
check(
    "M27-R003", ERROR, "variant that is not supported",
    "A relative of DFlash or EAGLE3 with other mathematics: run as the plain kind it accepts next to nothing.",
    "Take the plain kind.", engines("refuses it, or drafts nonsense", "as vLLM"),
)  # fmt: skip
check(
    "M27-R004", ERROR, "drafter's config.json is not usable",
    "A size or setting that the drafter is computed from is absent or impossible.",
    "Take config.json from where the weights come from.", engines("error on load, or a class's default", "as vLLM"),
)  # fmt: skip
check(
    "M27-R005", ERROR, "drafter's tensor missing", "A tensor that the drafter's config.json implies is not there.",
    _TRAIN, engines("uninitialized memory or an error", "uninitialized memory, silently"),
)  # fmt: skip
check(
    "M27-R006", WARNING, "drafter's tensor unknown", "Nothing in a drafter of this kind has this name.",
    "Remove it, or correct its name.", engines("KeyError or ignored", "ignored"),
)  # fmt: skip
check(
    "M27-R007", ERROR, "drafter's tensor has the wrong shape",
    "Its shape is not the one that the drafter's config.json implies.",
    _TRAIN, engines("shape error on load", "shape error on load"),
)  # fmt: skip
check(
    "M27-R008", ERROR, "drafter's weights are quantized",
    "Drafters run in 16 bits here; these weights are stored as codes, or in a type that is no float.",
    "Store the drafter in BF16.", engines("codes taken for numbers", "codes taken for numbers"),
)  # fmt: skip
check(
    "M27-R009", ERROR, "drafter is for another hidden size",
    "It reads the target's hidden states and shares its embedding and head: the width must be the target's.",
    _TRAIN, engines("shape error in the first step", "as vLLM"),
)  # fmt: skip
check(
    "M27-R010", ERROR, "drafter has another vocabulary",
    "Token ids mean the same only where drafter and target share a vocabulary: its own may not be larger, and "
    "an embedding of its own must have a row for every id of the target.",
    _TRAIN, engines("error on load, or garbage drafts", "as vLLM"),
)  # fmt: skip
check(
    "M27-R011", ERROR, "reduced vocabulary without d2t",
    "The head has fewer rows than the target has tokens, and nothing says which token a row stands for.",
    "Export the drafter with its d2t.", engines("row numbers taken for ids: nothing is accepted", "as vLLM"),
)  # fmt: skip
check(
    "M27-R012", ERROR, "d2t or t2d is not a table",
    "d2t holds one integer for each row of the head, t2d one boolean for each token of the target.",
    "Export the drafter again.", engines("shape error, or values rounded", "as vLLM"),
)  # fmt: skip
check(
    "M27-R013", ERROR, "d2t leads to wrong tokens",
    "d2t holds offsets: row i stands for token i + d2t[i].  Each must be a token, and no two rows the same one.",
    "Where it holds ids, subtract the row numbers.",
    engines("index error or drafts of other tokens", "index error or drafts of other tokens"),
)  # fmt: skip
check(
    "M27-R014", ERROR, "t2d contradicts d2t",
    "t2d marks the tokens that the drafter knows; those are exactly the tokens that d2t leads to.",
    "Export the drafter again: one of the two belongs to another.", engines("not read", "not read"),
)  # fmt: skip
check(
    "M27-R015", ERROR, "taps are not stated",
    "A DFlash drafter without target_layer_ids: formulas that guess them are wrong for most published drafters.",
    _TAPS, engines("guesses, or error on load", "guesses, or error on load"),
)  # fmt: skip
check(
    "M27-R016", ERROR, "tap out of range", "The target has no layer of this number.",
    _TAPS, engines("index error, or a tap that is never filled", "IndexError"),
)  # fmt: skip
check(
    "M27-R017", WARNING, "tap behind the last layer",
    "The last layer's output is often taken after the final norm, or not at all (sglang#32204, vllm#46788).",
    _TAPS, engines("uninitialized or normed states, by version", "IndexError"),
)  # fmt: skip
check(
    "M27-R018", ERROR, "taps do not fill the drafter's input",
    "fc takes as many hidden states at once as it was trained with; config.json names another number of taps.",
    _TAPS, engines("shape error in the first step", "as vLLM"),
)  # fmt: skip
check(
    "M27-R019", ERROR, "taps are not in ascending order",
    "vLLM sorts the taps and drops repetitions: fc then sees hidden states in other places than in training.",
    "Sort the taps and the columns of fc.weight with them.", engines("sorts them, silently: nothing is accepted"),
)  # fmt: skip
check(
    "M27-R020", ERROR, "two lists of taps contradict each other",
    "The nested list counts layers, the top-level list hidden states, which is one more: each engine reads its own.",
    _TAPS, engines("reads the top-level list", "reads the nested list"),
)  # fmt: skip
check(
    "M27-R021", WARNING, "vLLM taps one layer too early",
    "It takes the ids nested in eagle_config for hidden states (vllm#43671): 10% accepted at the first place, not 45%.",
    "Add a top-level eagle_aux_hidden_state_layer_ids with each id plus one; SGLang does not read it.",
    engines("V1 runner: one layer early; V2 runner: its defaults"),
)  # fmt: skip
check(
    "M27-R022", WARNING, "SGLang takes other taps",
    "It reads only ids nested in eagle_config, and always adds one to them.",
    "State the taps in eagle_config as numbers of layers: the hidden state's number less one.",
    engines(sglang="its defaults, or one layer too late, silently"),
)  # fmt: skip
check(
    "M27-R023", WARNING, "taps are the engine's defaults",
    "An EAGLE3 drafter that states no taps gets hidden states 2, N/2 and N-3 of N layers.",
    _TAPS, engines("defaults, with a warning", "defaults, silently"),
)  # fmt: skip
check(
    "M27-R024", ERROR, "mask token is missing or no token",
    "DFlash fills the places to be drafted with this token's embedding, a row of the target's table.",
    "State mask_token_id in dflash_config.", engines("error on load", "error on load"),
)  # fmt: skip
check(
    "M27-R025", ERROR, "drafter has no head",
    "An EAGLE3 drafter, or one of a reduced vocabulary, cannot take the target's head for its own.",
    "Export the drafter with lm_head.weight.",
    engines("shape error, or the target's head", "accepts nothing (sglang#27908)"),
)  # fmt: skip
check(
    "M27-R026", NOTE, "drafter has its own embedding or head",
    "Engines share the target's where the drafter brings none: a second copy takes memory.",
    "Nothing, or leave it out where it equals the target's.", engines("loads it", "loads it, or shares the target's"),
)  # fmt: skip
check(
    "M27-R027", ERROR, "drafter inherits the target's quantization",
    "Its config.json has a quantization_config, copied with the rest of the target's, but its weights are plain.",
    "Remove quantization_config from the drafter's config.json.",
    engines("expects packed weights: error on load", "expects packed weights: error on load"),
)  # fmt: skip
check(
    "M27-R028", NOTE, "SGLang quantizes the drafter unless told otherwise",
    "Without a flag of its own the drafter takes --quantization of the target.",
    "Pass --speculative-draft-model-quantization unquant.",
    engines(sglang="treats the drafter as modelopt_fp4: error or garbage"),
)  # fmt: skip
check(
    "M27-R029", WARNING, "SGLang does not run DFlash with MiniMax-M2",
    "0.5.23 has no set_dflash_layers_to_capture for this model; its EAGLE3 hooks are there.",
    "Serve it with vLLM, or with a version of SGLang that has them.", engines(sglang="ValueError on start"),
)  # fmt: skip
check(
    "M27-R030", WARNING, "rope_theta of the drafter is missing",
    "Readers fall back to different values: 10000 in transformers, 1000000 in vLLM's DFlash.",
    "State the value that it was trained with.", engines("1000000 for DFlash, else 10000", "10000"),
)  # fmt: skip
