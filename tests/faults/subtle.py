"""Faults that look like several at once, or like good values; folders as in `tests.faults.outputs`."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from tests.faults import corruptions as c
from tests.faults.corruptions import Change
from tests.faults.edits import (
    BIAS,
    GATE,
    K_SCALE,
    LAYER,
    NAN,
    NORM,
    V_SCALE,
    W2,
    config,
    dropped,
    edit_tensors,
    excluding,
    json_field,
    renamed,
    section,
    times,
)
from tests.faults.outputs import Fault

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
Q_NORM = f"{LAYER}.self_attn.q_norm.weight"


def one_name(name: str, other: str) -> Change:
    return renamed(re.escape(name), other)


def reciprocal(ending: str) -> Change:
    """Every scale of this kind as compressed-tensors has it."""

    def change(folder: Path) -> None:
        edit_tensors(
            folder,
            lambda name, e, data: [
                (
                    name, e["dtype"], e["shape"],
                    struct.pack("<f", 1 / struct.unpack("<f", data)[0]) if name.endswith(ending) else data,
                )
            ],
        )  # fmt: skip

    return change


def template_moved(text: str) -> Change:
    """The template stands in tokenizer_config.json, where older tools write it."""

    def change(folder: Path) -> None:
        (folder / TEMPLATE).unlink()
        path = folder / TOKENIZER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))

    return change


NAMES = {
    "expert's scale misspelt": Fault(
        one_name(f"{W2}.weight_scale", f"{W2}.weight_scales"), "M27-T001", f"{W2}.weight_scales"
    ),
    "expert's input scale misspelt": Fault(
        one_name(f"{W2}.input_scale", f"{W2}.act_scale"), "M27-T001", f"{W2}.input_scale"
    ),
    "norm renamed": Fault(one_name(Q_NORM, f"{LAYER}.self_attn.query_norm.weight"), "M27-T002", Q_NORM),
    "router bias renamed": Fault(one_name(BIAS, f"{LAYER}.block_sparse_moe.bias"), "M27-T002", BIAS),
    "head renamed": Fault(one_name("lm_head.weight", "output.weight"), "M27-T002", "lm_head.weight"),
    "k_scale renamed": Fault(one_name(K_SCALE, f"{LAYER}.self_attn.k_proj.kv_scale"), "M27-T002", K_SCALE),
    "all names behind a prefix": Fault(
        renamed(r"^(model|lm_head)\.", r"language_model.\1."), "M27-T005", "language_model."
    ),
    "prefix before the model, not the head": Fault(renamed(r"^model\.", "base.model."), "M27-T005", "base."),
    "layer lost": Fault(dropped(r"model\.layers\.1\..*"), "M27-T002", "model.layers.1."),
    "two layers lost": Fault(dropped(r"model\.layers\.[12]\..*"), "M27-T002", "model.layers.2."),
    "expert lost in every layer": Fault(dropped(r".*\.experts\.2\..*"), "M27-T001", "experts.2.w1.weight"),
}

CONFIGS = {
    "algorithm in config.json alone": Fault(section("quant_algo", value="FP8"), "M27-F007", "quant_algo"),
    "exclude list of config.json alone": Fault(section("ignore", value=["lm_head"]), "M27-E002", "self_attn"),
    "exclude list with a prefix": Fault(
        excluding(lambda patterns: [p if p == "lm_head" else f"language_model.{p}" for p in patterns]),
        "M27-E002", "self_attn",
    ),
    "template empty": Fault(c.put(TEMPLATE, b" \n"), "M27-F028", TEMPLATE),
    "template cut off": Fault(c.put(TEMPLATE, b"{% for m in messages %}{{ m"), "M27-F028", TEMPLATE),
    "template in tokenizer_config cut off": Fault(template_moved("{% if"), "M27-F028", TOKENIZER_CONFIG),
    "tokenizer of another class": Fault(
        json_field(TOKENIZER_CONFIG, "tokenizer_class", value="LlamaTokenizer"), "M27-F020", "LlamaTokenizer"
    ),
    "more experts a token than there are": Fault(
        config("num_experts_per_tok", value=5), "M27-F002", "num_experts_per_tok"
    ),
    "softmax routing": Fault(config("scoring_func", value="softmax"), "M27-F002", "scoring_func"),
}  # fmt: skip

VALUES = {
    name: Fault(change, code, names, "default")
    for name, change, code, names in (
        ("global scales reciprocal", reciprocal(".weight_scale_2"), "M27-S018", "weight_scale_2"),
        ("input scales reciprocal", reciprocal(".input_scale"), "M27-S018", "input_scale"),
        ("k_scale a thousand times too large", times(K_SCALE, 1000), "M27-S019", K_SCALE),
        ("v_scale a thousand times too small", times(V_SCALE, 1 / 1000), "M27-S019", V_SCALE),
        ("router bias NaN", c.fill(BIAS, struct.pack("<f", NAN), at=1), "M27-W005", BIAS),
        ("gate infinite", c.fill(GATE, struct.pack("<f", float("-inf")), at=7), "M27-W005", GATE),
        ("norm NaN", c.fill(NORM, b"\xc0\x7f", at=3), "M27-W005", NORM),
        ("norm of zeros", c.zeroed(NORM), "M27-W007", NORM),
        ("gate of zeros", c.zeroed(GATE), "M27-W007", GATE),
    )
}

SUBTLE = NAMES | CONFIGS | VALUES
