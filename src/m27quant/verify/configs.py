"""config.json and the files beside it: readable, of one mind, and right for the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from m27quant.checkpoint.config import GROUP_SIZE, MODEL_TYPE, parse_config
from m27quant.checkpoint.names import EMBEDDING
from m27quant.checkpoint.sidecars import END_OF_TURN, MAX_SIDECAR_BYTES
from m27quant.checkpoint.strict_json import MAX_CONFIG_BYTES, parse, read_bytes
from m27quant.errors import CheckpointError, escape
from m27quant.verify.collect import Findings
from m27quant.verify.engines import exclude_list
from m27quant.verify.view import View

CONFIG, HF_QUANT, GENERATION = "config.json", "hf_quant_config.json", "generation_config.json"
REPORT, MAX_REPORT_BYTES = "quantization_report.json", 128 * 2**20
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = (
    "]~!b[", "]~b]", END_OF_TURN, "]!d~[", "]!p~[", "<think>", "</think>",
    "<minimax:tool_call>", "</minimax:tool_call>",
)  # fmt: skip
SAFE_TOKENIZER_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Those that take tokenizer.json as it is."""
ALGORITHM = "NVFP4"
OFFICIAL_SIZE = (3072, 62)
"""Hidden size and layers of M2, M2.1, M2.5 and M2.7."""
OFFICIAL_ROTATION = {"rotary_dim": 64, "rope_theta": 5_000_000, "head_dim": 128}
DTYPE, DTYPE_KEYS = "bfloat16", ("dtype", "torch_dtype")
"""What engines compute in; transformers 4 has the second name."""


@dataclass(slots=True)
class _Files:
    """The JSON objects of one folder; None where a file is absent or was reported."""

    folder: Path
    view: View
    found: Findings

    def there(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
        if not self.there(name) or name in self.view.refused:
            return None
        try:
            value = parse(read_bytes(self.folder / name, limit), name)
            if not isinstance(value, dict):
                raise CheckpointError(f"{name}: expected a JSON object, found {type(value).__name__}")
        except CheckpointError as fault:
            self.found.add("M27-F001", fault.message, file=name)
            return None
        return value


def read_configs(view: View, found: Findings) -> None:
    """Read config.json and hf_quant_config.json into the view and report what is wrong with them.

    Raises:
        CheckpointError: config.json says that this is another model, or the FP8 original.
    """
    files = _Files(view.folder, view, found)
    raw = files.read(CONFIG)
    if raw is None and not files.there(CONFIG):
        found.add("M27-F001", f"{CONFIG} is missing", file=CONFIG)
    if raw is not None:
        _refuse_foreign(raw, view)
        view.raw_config = raw
        _read_model(raw, view, found)
        section = raw.get("quantization_config")
        view.section = section if isinstance(section, dict) else None
    hf = files.read(HF_QUANT)
    quantization = None if hf is None else hf.get("quantization")
    view.hf_quant = quantization if isinstance(quantization, dict) else None
    if hf is not None and view.hf_quant is None:
        found.add("M27-F001", f"{HF_QUANT}: `quantization` is missing or not an object", file=HF_QUANT)
    elif hf is None and not files.there(HF_QUANT):
        found.add("M27-F006", f"{HF_QUANT} is missing", file=HF_QUANT)

    report = files.read(REPORT, MAX_REPORT_BYTES)
    recipe = None if report is None else report.get("recipe")
    kv_cache = recipe.get("kv_cache") if isinstance(recipe, dict) else None
    view.recipe_kv = kv_cache if isinstance(kv_cache, str) else None
    algorithm = recipe.get("algorithm") if isinstance(recipe, dict) else None
    if algorithm == "mse" or algorithm == "awmse" or algorithm == "gptq":
        view.block_scales = algorithm
    if report is not None and algorithm == "gptq":
        view.recorded_sqnr_db = _recorded_sqnr_db(report)


def _recorded_sqnr_db(report: dict[str, Any]) -> dict[int, dict[str, dict[int, float]]]:
    """Each matrix' figure by layer, projection and expert, as far as the file has numbers where they belong."""
    layers = report.get("layers")
    found: dict[int, dict[str, dict[int, float]]] = {}
    for number, layer in enumerate(layers if isinstance(layers, list) else ()):
        figures = layer.get("sqnr_db") if isinstance(layer, dict) else None
        for projection, values in figures.items() if isinstance(figures, dict) else ():
            numbers = enumerate(values if isinstance(values, list) else ())
            found.setdefault(number, {})[projection] = {
                expert: value for expert, value in numbers if isinstance(value, float)
            }
    return found


def check_configs(view: View, found: Findings) -> None:
    """Check the quantization sections and the small files of the folder."""
    files = _Files(view.folder, view, found)
    if view.raw_config:
        _check_section(view, found)
        _check_agreement(view, found)
        _check_claims(view, found)
        _check_dtype(view.raw_config, found)
    _check_tokenizer(files, view, found)


def _refuse_foreign(raw: dict[str, Any], view: View) -> None:
    if (kind := raw.get("model_type")) != MODEL_TYPE:
        raise CheckpointError(
            f"{escape(view.folder)}: model_type is '{escape(kind)}'; only '{MODEL_TYPE}' (MiniMax-M2.x) is verified",
            hint="name an NVFP4 checkpoint of MiniMax-M2.x",
        )
    section = raw.get("quantization_config")
    original = isinstance(section, dict) and section.get("quant_method") == "fp8"
    if original and not any(info.dtype == "U8" for info in view.tensors.values()):
        raise CheckpointError(
            f"{escape(view.folder)}: this is the FP8 original, not a quantized checkpoint",
            hint="quantize it first: m27quant quantize MODEL OUT",
        )


# -- the model -------------------------------------------------------------------------------------


def _read_model(raw: dict[str, Any], view: View, found: Findings) -> None:
    """The sizes; a rotation that is not told is reported and does not hide the rest."""
    value = {key: item for key, item in raw.items() if key != "quantization_config"}
    rope = value.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    head_dim = value.get("head_dim")
    if not any("rotary_dim" in place or "partial_rotary_factor" in place for place in (value, rope)):
        found.add(
            "M27-F003", f"{CONFIG}: neither rotary_dim nor partial_rotary_factor",
            file=CONFIG, expected="rotary_dim: half of head_dim", found="nothing",
        )  # fmt: skip
        value["partial_rotary_factor"] = 0.5
    if "rope_theta" not in value and "rope_theta" not in rope:
        found.add("M27-F004", f"{CONFIG}: no rope_theta", file=CONFIG, expected="rope_theta", found="nothing")
        value["rope_theta"] = 1e6
    factor = rope.get("partial_rotary_factor", value.get("partial_rotary_factor"))
    rotary = value.get("rotary_dim")
    if _number(factor) and _number(rotary) and _number(head_dim):
        implied = int(head_dim * factor)
        if rotary != implied:
            found.add(
                "M27-F026", f"{CONFIG}: rotary_dim {rotary}, but partial_rotary_factor {factor} of head_dim {head_dim}",
                file=CONFIG, expected=rotary, found=implied,
            )  # fmt: skip
    if (value.get("hidden_size"), value.get("num_hidden_layers")) == OFFICIAL_SIZE:
        for key, official in OFFICIAL_ROTATION.items():
            if (told := value.get(key, rope.get(key))) is not None and told != official:
                found.add(
                    "M27-F027", f"{CONFIG}: {key} is {_shown(told)}, M2 was trained with {official}",
                    file=CONFIG, expected=official, found=_shown(told),
                )  # fmt: skip
    thetas = {place["rope_theta"] for place in (value, rope) if _number(place.get("rope_theta"))}
    if len(thetas) > 1:
        found.add(
            "M27-F026", f"{CONFIG}: rope_theta is {' and '.join(map(str, sorted(thetas)))}", file=CONFIG
        )
    try:
        view.config = parse_config(value, CONFIG)
    except CheckpointError as fault:
        found.add("M27-F002", fault.message, file=CONFIG)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _check_claims(view: View, found: Findings) -> None:
    raw = view.raw_config
    claims = raw.get("use_mtp") is True or (
        _number(raw.get("num_mtp_modules")) and raw["num_mtp_modules"] > 0
    )
    unknown = view.tensors.keys() - view.expected.keys()
    if claims and view.config is not None and not any(".layers." in name for name in unknown):
        message = f"{CONFIG} promises multi-token prediction, for which there are no tensors"
        found.add("M27-F025", message, file=CONFIG)
    auto_map = raw.get("auto_map")
    if isinstance(auto_map, dict):
        for target in auto_map.values():
            module = f"{str(target).partition('.')[0]}.py"
            if module.removesuffix(".py").isidentifier() and not (view.folder / module[:255]).is_file():
                found.add(
                    "M27-F019", f"auto_map names {escape(module)}, which is not in the folder", file=module
                )


def _check_dtype(raw: dict[str, Any], found: Findings) -> None:
    """What the parts that are not quantized are loaded as and computed in."""
    told = {key: raw[key] for key in DTYPE_KEYS if raw.get(key) is not None}
    if not told:
        found.add("M27-F031", f"{CONFIG}: no dtype", file=CONFIG, expected=DTYPE, found="nothing")
    for key, value in told.items():
        if value != DTYPE:
            found.add(
                "M27-F030", f"{CONFIG}: {key} is {_shown(value)}, expected {DTYPE}",
                file=CONFIG, expected=DTYPE, found=_shown(value),
            )  # fmt: skip


# -- quantization sections -------------------------------------------------------------------------


def _check_section(view: View, found: Findings) -> None:
    section = view.section
    if section is None:
        found.add("M27-F005", f"{CONFIG} has no quantization_config", file=CONFIG)
        return

    def field(code: str, key: str, actual: object, expected: object, file: str = CONFIG) -> None:
        found.add(
            code, f"{file}: {key} is {_shown(actual)}, expected {_shown(expected)}",
            file=file, expected=_shown(expected), found=_shown(actual),
        )  # fmt: skip

    if section.get("quant_method") != "modelopt":
        field("M27-F007", "quant_method", section.get("quant_method"), "modelopt")
    elif view.is_mixed:
        field("M27-F029", "quant_algo", section.get("quant_algo"), ALGORITHM)
    elif section.get("quant_algo") != ALGORITHM and not (
        section.get("quant_algo") == "W4A16_NVFP4" and ".input_scale" in view.excused
    ):
        field("M27-F007", "quant_algo", section.get("quant_algo"), ALGORITHM)
    producer = section.get("producer")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        field(
            "M27-F012",
            "producer.name",
            producer.get("name") if isinstance(producer, dict) else producer,
            "modelopt",
        )
    _check_groups(section.get("config_groups"), field)
    scheme = section.get("kv_cache_scheme")
    if scheme is not None and not isinstance(scheme, dict):
        field("M27-F011", "kv_cache_scheme", scheme, {"dynamic": False, "num_bits": 8, "type": "float"})
    elif scheme is not None:
        if scheme.get("dynamic") is not False:
            field("M27-F010", "kv_cache_scheme.dynamic", scheme.get("dynamic"), False)
        if (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
            field("M27-F011", "kv_cache_scheme", [scheme.get("num_bits"), scheme.get("type")], [8, "float"])


def _check_groups(groups: Any, field: Any) -> None:
    """Each group: 4-bit static floats in blocks of 16, weights and activations."""
    if not isinstance(groups, dict) or not groups:
        field("M27-F014", "config_groups", groups, "one group")
        return
    for name, group in groups.items():
        group = group if isinstance(group, dict) else {}
        for part in ("weights", "input_activations"):
            key, values = f"config_groups.{escape(name)}.{part}", group.get(part)
            if part == "input_activations" and values is None:
                field("M27-F013", key, None, "4-bit float")
                continue
            values = values if isinstance(values, dict) else {}
            if values.get("group_size") != GROUP_SIZE:
                field("M27-F009", f"{key}.group_size", values.get("group_size"), GROUP_SIZE)
            if (values.get("num_bits"), values.get("type"), values.get("dynamic")) != (4, "float", False):
                found = [values.get(k) for k in ("num_bits", "type", "dynamic")]
                field("M27-F014", f"{key} (num_bits, type, dynamic)", found, [4, "float", False])


def _check_agreement(view: View, found: Findings) -> None:
    """config.json against hf_quant_config.json."""
    section, hf = view.section, view.hf_quant
    if section is None or hf is None:
        return

    def differ(key: str, ours: object, theirs: object) -> None:
        found.add(
            "M27-F008", f"{key}: {CONFIG} says {_shown(ours)}, {HF_QUANT} {_shown(theirs)}",
            file=HF_QUANT, tensor=None, expected=_shown(ours), found=_shown(theirs),
        )  # fmt: skip

    if section.get("quant_algo") != hf.get("quant_algo") and not found.any("M27-F007"):
        differ("quant_algo", section.get("quant_algo"), hf.get("quant_algo"))
    fp8 = "FP8" if section.get("kv_cache_scheme") is not None else None
    if fp8 != hf.get("kv_cache_quant_algo"):
        differ("FP8 cache", fp8, hf.get("kv_cache_quant_algo"))
    if hf.get("group_size") != GROUP_SIZE:
        found.add(
            "M27-F009", f"{HF_QUANT}: group_size is {_shown(hf.get('group_size'))}, expected {GROUP_SIZE}",
            file=HF_QUANT, expected=GROUP_SIZE, found=_shown(hf.get("group_size")),
        )  # fmt: skip
    ours, theirs = exclude_list(section, None), hf.get("exclude_modules")
    if isinstance(ours, list) and isinstance(theirs, list):
        a, b = {str(x) for x in ours}, {str(x) for x in theirs}
        # where config.json's list is wrong for an engine, that is the fault, and the difference a consequence
        if a != b and not found.any("M27-E001", "M27-E002", "M27-E003", "M27-E004"):
            one = min(a ^ b)
            where = CONFIG if one in a else HF_QUANT
            found.add(
                "M27-F008", f"exclude lists differ in {len(a ^ b)} entries: '{escape(one)}' is in {where} alone",
                file=HF_QUANT, expected=f"{len(a)} entries", found=f"{len(b)} entries",
            )  # fmt: skip
    elif theirs is None:
        differ("exclude list", f"{len(ours) if isinstance(ours, list) else 0} entries", None)


def _shown(value: object) -> str:
    """As JSON would have it, one line."""
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return escape(value)


# -- generation and tokenizer ----------------------------------------------------------------------


TEMPLATES = ("chat_template.jinja", "chat_template.json")


def _check_tokenizer(files: _Files, view: View, found: Findings) -> None:
    if not any(map(files.there, (TOKENIZER, TOKENIZER_CONFIG, *TEMPLATES))):
        found.add("M27-F033", "neither tokenizer nor chat template: weights alone", file=TOKENIZER)
        _check_stop(files, view, None, found)
        return
    tokenizer = files.read(TOKENIZER, MAX_SIDECAR_BYTES)
    ids = {} if tokenizer is None else _token_ids(tokenizer)
    if not files.there(TOKENIZER):
        found.add("M27-F021", f"{TOKENIZER} is missing", file=TOKENIZER)
    elif tokenizer is not None:
        for token in SPECIAL_TOKENS:
            if token not in ids:
                found.add(
                    "M27-F023", f"the tokenizer does not know '{token}'", file=TOKENIZER, expected=token
                )
        rows = view.config.vocab_size if view.config else None
        if rows is not None and ids and max(ids.values()) >= rows:
            found.add(
                "M27-F024", f"the tokenizer gives ids to {max(ids.values()):,}, '{EMBEDDING}' has {rows:,} rows",
                file=TOKENIZER, expected=f"ids below {rows}", found=max(ids.values()),
            )  # fmt: skip
    if files.there(TOKENIZER) and not files.there(TOKENIZER_CONFIG):
        found.add("M27-F032", f"{TOKENIZER_CONFIG} is missing", file=TOKENIZER_CONFIG)
    config = files.read(TOKENIZER_CONFIG) or {}
    if (kind := config.get("tokenizer_class")) not in SAFE_TOKENIZER_CLASSES:
        found.add(
            "M27-F020", f"tokenizer_class is {escape(kind)}",
            file=TOKENIZER_CONFIG, expected="PreTrainedTokenizerFast", found=kind,
        )  # fmt: skip
    if "chat_template" not in config and not any(map(files.there, TEMPLATES)):
        found.add(
            "M27-F022",
            "neither chat_template.jinja nor chat_template in tokenizer_config.json",
            file=TOKENIZER_CONFIG,
        )
    _check_stop(files, view, ids.get(END_OF_TURN), found)


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Added tokens and vocabulary, as far as they are what they should be."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = {k: v for k, v in vocab.items() if isinstance(v, int)} if isinstance(vocab, dict) else {}
    for token in added if isinstance(added, list) else ():
        if (
            isinstance(token, dict)
            and isinstance(token.get("id"), int)
            and isinstance(token.get("content"), str)
        ):
            ids[token["content"]] = token["id"]
    return ids


def _check_stop(files: _Files, view: View, end_of_turn: int | None, found: Findings) -> None:
    generation = files.read(GENERATION)
    eos = None if generation is None else generation.get("eos_token_id")
    if eos is None and (generation is not None or not files.there(GENERATION)):
        message = f"{GENERATION} names no eos_token_id"
        found.add("M27-F016", message, file=GENERATION, expected=end_of_turn, found="none")
    if end_of_turn is None:
        return
    for code, file, ids in (
        ("M27-F017", GENERATION, eos),
        ("M27-F018", CONFIG, view.raw_config.get("eos_token_id")),
    ):
        if ids is not None and end_of_turn not in (ids if isinstance(ids, list) else [ids]):
            found.add(
                code, f"{file} has eos_token_id {_shown(ids)}, the end of turn is {end_of_turn}",
                file=file, expected=end_of_turn, found=_shown(ids),
            )  # fmt: skip
