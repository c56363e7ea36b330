"""Text token by token is the text at once; a stop string is found wherever it lies, and nothing behind it shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import CheckpointError
from m27quant.runtime.detokenize import Detokenizer

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = Tokenizer(REPOSITORY / "examples/tiny-m27")


@given(st.lists(st.integers(0, 2047), max_size=60), st.booleans())
def test_any_tokens_give_the_text_that_they_give_at_once(ids: list[int], skip: bool) -> None:
    growing = Detokenizer(TOKENIZER, (), skip_special_tokens=skip)
    shown = ""
    for token in ids:
        assert not growing.add(token)
        assert growing.text.startswith(shown)
        shown = growing.text
    growing.finish()
    assert growing.text == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=6), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Of what a token completes at once the one that begins first counts."""
    try:
        ids = TOKENIZER.rendered(text)
    except CheckpointError:
        return  # half a surrogate
    growing = Detokenizer(TOKENIZER, stop, skip_special_tokens=False)
    shown, used = "", 0
    for token in ids:
        used += 1
        stopped = growing.add(token)
        assert growing.text.startswith(shown)
        shown = growing.text
        if stopped:
            break
    growing.finish()
    whole = TOKENIZER.decode(ids[:used], skip_special_tokens=False)
    starts = [at for s in stop if (at := whole.find(s)) >= 0]
    assert growing.text == (whole[: min(starts)] if starts else whole)
    if used < len(ids) or (starts and used):
        before = TOKENIZER.decode(ids[: used - 1], skip_special_tokens=False).rstrip("\ufffd")
        assert not any(s in before for s in stop)


@pytest.mark.parametrize("emoji", ["🦜", "é", "語言模型", "🏴‍☠️"])
def test_a_character_of_several_tokens_comes_whole(emoji: str) -> None:
    ids = TOKENIZER.rendered(f"a{emoji}b")
    assert len(ids) > 2
    growing = Detokenizer(TOKENIZER, (), skip_special_tokens=False)
    seen = []
    for token in ids:
        growing.add(token)
        seen.append(growing.text)
    assert all("\ufffd" not in text for text in seen)
    assert seen[-1] == f"a{emoji}b"


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = TOKENIZER.rendered("a]~b]b")
    for skip, text in ((True, "ab"), (False, "a]~b]b")):
        growing = Detokenizer(TOKENIZER, (), skip_special_tokens=skip)
        for token in ids:
            growing.add(token)
        assert growing.text == text


def test_bytes_without_an_end_are_replaced_at_the_end() -> None:
    half = TOKENIZER.rendered("é")[:1]
    if len(TOKENIZER.rendered("é")) == 1:
        half = TOKENIZER.rendered("🦜")[:1]
    growing = Detokenizer(TOKENIZER, (), skip_special_tokens=False)
    growing.add(half[0])
    assert growing.text == ""
    growing.finish()
    assert growing.text == "\ufffd"


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    text = (REPOSITORY / "examples/tiny-m27/tokenizer.json").read_text()
    assert text.count('"decoder"') == 1
    import json

    content = json.loads(text)
    content["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    growing = Detokenizer(Tokenizer(tmp_path), (), skip_special_tokens=False)
    with pytest.raises(CheckpointError, match="byte-level"):
        growing.add(5)
