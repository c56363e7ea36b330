"""YAML that PyYAML reads happily and a recipe must not."""

from __future__ import annotations

import time

import pytest
import yaml

from m27quant.errors import RecipeError
from m27quant.recipes.strict_yaml import MAX_BYTES, MAX_DEPTH, Map, Place, parse, scalar


def refused(text: str | bytes) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text.encode() if isinstance(text, str) else text, "r.yaml")
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    "text", ["~", "null", "", "true", "False", "0", "-7", "1000", "1.5", "-2.0", "1.0e-3", "5."]
)
def test_unambiguous_scalars_mean_what_pyyaml_reads(text: str) -> None:
    value = scalar(text, Place("r.yaml", 1))
    assert value == yaml.safe_load(text)
    assert type(value) is type(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text", ["max", "3.0.0", "e4m3", "a b", "*x", "y", "n", "nan", "inf", "1_a", "v1", "-", "org/x"]
)
def test_plain_text_stays_text(text: str) -> None:
    assert scalar(text, Place("r.yaml", 1)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("no", "yes", "on", "Off", "NO", "010", "08", "0o10", "0x10", "0b1", "1_000", "1:30", "1:30.5"),
        *("1e-3", "1e3", "1.0e3", "2024-01-01", "="),
    ],
)
def test_scalars_that_readers_disagree_about_are_refused(text: str) -> None:
    error = refused(f"a: 1\nb: {text}")
    assert error.message.startswith(f"r.yaml:2: `{text}` means different things")
    assert error.hint is not None
    assert parse(f"b: '{text}'".encode(), "r.yaml") == [{"b": text}]  # quoted, it is text


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.INF", "+.inf", "1.0e+999"])
def test_not_finite_is_refused(text: str) -> None:
    assert refused(f"a: {text}").message == f"r.yaml:1: `{text}` is not a finite decimal number"


def test_huge_integer_is_refused() -> None:
    assert "too large" in refused(f"a: {'9' * 5000}").message


def test_duplicate_keys_name_both_lines() -> None:
    error = refused("a: 1\nb:\n  c: 1\n  'c': 2\n")
    assert error.message == "r.yaml:4: key `c` appears twice"
    assert error.hint == "it is first set in line 3"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!x y",
        "! 5",
        "!",
        "!!str no",
        "!!set {a}",
        "!!int '1'",
    ],
)
def test_tags_are_refused(text: str) -> None:
    assert "is not allowed in a recipe" in refused(f"a: {text}").message


def test_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    started = time.process_time()
    assert "values once aliases are expanded" in refused("\n".join(lines)).message
    assert time.process_time() - started < 1


def test_alias_within_itself_is_refused() -> None:
    assert "has no anchor before it" in refused("a: &a [*a]").message


def test_aliases_share_what_they_name() -> None:
    (document,) = parse(b"a: &x {b: [1, 2]}\nc: *x\n", "r.yaml")
    assert document == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_merge_keys_are_refused() -> None:
    assert "merge keys" in refused("a: &a {b: 1}\nc:\n  <<: *a\n").message


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_depth_is_bounded(opening: str) -> None:
    assert f"deeper than {MAX_DEPTH} levels" in refused(opening * 5000).message


def test_size_is_bounded() -> None:
    assert (
        refused(b"a: " + b"x" * MAX_BYTES).message
        == f"r.yaml:1: a recipe of more than {MAX_BYTES} bytes is not read"
    )


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b"a: 1\nb: \xff\n", 2, "not UTF-8 text"),
        (b"a: 1\nb: '\x07'\n", 1, "not valid YAML"),
        (b"a: 1\n b: 2\n", 2, "not valid YAML"),
        (b"a: [1, 2\n", 2, "not valid YAML"),
        (b"\ta: 1\n", 1, "not valid YAML"),
        (b"? [1]\n: 2\n", 1, "a key must be text or a whole number"),
        (b"true: 2\n", 1, "a key must be text or a whole number"),
        (b'a: "\\UFFFFFFFF"', 1, "an impossible number"),
        (b'a: "\\U00110000"', 1, "an impossible number"),
        (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1\n", 1, "an impossible number"),
        (b"a: *nothing\n", 1, "alias `*nothing` has no anchor before it"),
    ],
)
def test_damaged_files_name_the_line(data: bytes, line: int, words: str) -> None:
    error = refused(data)
    assert error.message.startswith(f"r.yaml:{line}: ")
    assert words in error.message


def test_hostile_file_names_and_values_are_escaped() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: !\u202ex y".encode(), "\x1b[31mr.yaml")
    assert "\x1b" not in caught.value.message
    assert "\u202e" not in caught.value.message


def test_every_key_knows_its_line() -> None:
    (document,) = parse(b"a:\n  b: 1\n  c:\n  - x\n  - y\n", "r.yaml")
    assert isinstance(document, Map)
    inner = document["a"]
    assert isinstance(inner, Map)
    assert [inner.places[k].line for k in inner] == [2, 3]
