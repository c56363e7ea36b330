"""Whatever the bytes: a recipe, or a RecipeError that prints as one safe line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from m27quant.errors import RecipeError
from m27quant.recipes import BUILTIN, loader
from m27quant.recipes.strict_yaml import MAX_NODES, Map, Seq, Value, parse
from tests.recipes.common import EXPERTS, MODULES, entry, parsed, recipe_text

BUILTIN_TEXTS = [(Path(loader.__file__).parent / f"{name}.yaml").read_text() for name in BUILTIN]
TOKENS = [
    *("~", "no", "1e-3", ".nan", "0x1", "-1", "&a", "*a", "*nvfp4", "<<:", "!!python/name:os.system"),
    *(
        "[",
        "{",
        "}",
        "]",
        "-",
        "? ",
        "|",
        "'",
        '"',
        "%YAML 1.2",
        "---",
        "...",
        "\t",
        "\x00",
        "\ufeff",
        '"\\U00110000"',
    ),
    *("$import", "imports:", "quantize:"),
]

keys = st.text(max_size=8) | st.integers(-3, 3) | st.sampled_from(["cfg", "enable", "$import"])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TOKENS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner),
    max_leaves=12,
)


def survives(data: bytes) -> None:
    error = refusal(data)
    if error is not None:
        assert error.exit_code == 2
        assert error.message.isprintable()
        assert error.hint is None or error.hint.isprintable()


def refusal(data: bytes) -> RecipeError | None:
    try:
        parsed(data).resolve(MODULES)
    except RecipeError as error:
        return error
    return None


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    survives(data)


@given(st.text(alphabet=st.sampled_from(list("[]{}:,-&*!|>'\"%@`#? \n\tabx01.~<=$")), max_size=200))
def test_any_yaml_punctuation(text: str) -> None:
    survives(text.encode())


@settings(max_examples=200)
@given(st.sampled_from(BUILTIN_TEXTS), st.data())
def test_damaged_builtin_recipes(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = begin + data.draw(st.integers(0, 12))
        text = text[:begin] + data.draw(st.sampled_from(TOKENS) | st.text(max_size=4)) + text[end:]
    survives(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200)
@given(
    plain,
    st.sampled_from(["top", "metadata", "quantize", "entry", "cfg", "algorithm", "imports", "calibration"]),
)
def test_any_value_anywhere(value: object, where: str) -> None:
    document = yaml.safe_load(BUILTIN_TEXTS[0])
    entries = document["quantize"]["quant_cfg"]
    match where:
        case "top":
            document = value
        case "entry":
            entries[1] = value
        case "cfg":
            entries[1]["cfg"] = value
        case "algorithm":
            document["quantize"]["algorithm"] = value
        case key:
            document[key] = value
    survives(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.text(alphabet="*?[]!-abw1.0_k\\", min_size=1, max_size=40), st.booleans())
def test_any_pattern(pattern: str, enable: bool) -> None:
    quoted = pattern.replace("'", "''")
    survives(recipe_text(*EXPERTS, entry(quoted, enable=str(enable).lower())).encode())


@given(st.text(max_size=12) | st.from_regex(r"[-+]?[0-9_.:oxeE+-]{1,10}", fullmatch=True))
def test_a_plain_scalar_is_what_pyyaml_reads_or_refused(text: str) -> None:
    """modelopt reads recipes with PyYAML: the two must never differ silently."""
    try:
        (document,) = parse(f"- {text}\n".encode(), "r.yaml")
    except (RecipeError, UnicodeEncodeError):
        return
    assert document == yaml.safe_load(f"- {text}\n")


def _plain(value: Value) -> object:
    if isinstance(value, Map):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, Seq) else value


@given(plain)
def test_what_is_accepted_is_what_pyyaml_reads(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    try:
        (document,) = parse(text.encode("utf-8"), "r.yaml")
    except (RecipeError, UnicodeEncodeError):
        return
    assert _plain(document) == yaml.safe_load(text)


@given(st.integers(2, 40), st.integers(2, 40))
def test_alias_bombs_never_grow(width: int, depth: int) -> None:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    nodes = sum(width**i for i in range(2, depth + 1))
    if nodes > MAX_NODES:
        with pytest.raises(RecipeError, match="aliases"):
            parse("\n".join(lines).encode(), "r.yaml")
