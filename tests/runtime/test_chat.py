"""Messages to prompts, with the template of the embedded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m27quant.checkpoint.tokenizer import Tokenizer
from m27quant.errors import M27Error
from m27quant.runtime.chat import chat_prompt

TINY = Path(__file__).parents[2] / "examples" / "tiny-m27"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def test_thinking_on_leaves_the_thoughts_open(tokenizer: Tokenizer) -> None:
    prompt = chat_prompt(tokenizer, [USER])
    assert prompt.text.endswith("]~b]user\nHi[e~[\n]~b]ai\n<think>\n")
    assert prompt.thinking
    assert prompt.token_ids.count(tokenizer.token_id("<think>")) == 1
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text


def test_thinking_off_closes_them(tokenizer: Tokenizer) -> None:
    prompt = chat_prompt(tokenizer, [USER], thinking=False)
    assert prompt.text.endswith("<think>\n\n</think>\n\n")
    assert not prompt.thinking


def test_a_template_that_heeds_enable_thinking_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ 'off' if not enable_thinking else '<think>' }}")
    tokenizer = Tokenizer(tmp_path)
    assert chat_prompt(tokenizer, [USER], thinking=False).text == "off"
    assert chat_prompt(tokenizer, [USER]).text == "<think>"


def test_tools_and_their_replies(tokenizer: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I add."},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    text = chat_prompt(tokenizer, messages, tools=[tool]).text
    assert '<tool>{"name": "add"' in text
    assert '<parameter name="a">1</parameter>\n<parameter name="b">x</parameter>' in text
    assert "<think>\nI add.\n</think>" in text
    assert "<response>3</response>" in text


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("Hi", "list"),
        (["Hi"], "message 0 is str"),
        ([USER, {"content": "x"}], "message 1 has the role"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text parts"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}], "object"),
        ([{"role": "assistant", "tool_calls": [{}]}], "function name"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer: Tokenizer, messages: Any, said: str) -> None:
    with pytest.raises(M27Error, match=said) as fault:
        chat_prompt(tokenizer, messages)
    assert fault.value.exit_code == 2


def test_a_tool_without_a_name_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(M27Error, match="tool 1 has no function name"):
        chat_prompt(tokenizer, [USER], tools=[{"name": "f"}, {"type": "function"}])
