"""Which replies hold a valid tool call."""

from __future__ import annotations

import pytest

from m27quant.evaluation.tool_prompts import ASKED, TOOLS, is_valid_call


def call(name: str, **arguments: str) -> str:
    parameters = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in arguments.items())
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{parameters}</invoke>\n</minimax:tool_call>'


GOOD = call("get_weather", city="Paris", days="3")


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (GOOD, True),
        ("Let me look.\n" + GOOD, True),
        (call("get_weather", city="Oslo") + call("get_weather", city="Lima"), True),
        ("It will be sunny.", False),
        ("", False),
        (call("get_weather", days="3"), False),  # what it requires is not there
        (call("get_weather", city="Paris", days="three"), False),
        (call("forecast", city="Paris"), False),
        (GOOD.removesuffix("</minimax:tool_call>"), False),
        (GOOD.replace("</invoke>", ""), False),
        (GOOD.replace('"days"', '"days" x'), False),
    ],
)
def test_validity(text: str, valid: bool) -> None:
    assert is_valid_call(text, TOOLS, thinking=False) is valid


def test_thoughts_have_to_end_before_the_call() -> None:
    assert is_valid_call(f"Paris, then.\n</think>\n{GOOD}", TOOLS, thinking=True)
    assert not is_valid_call(f"Paris, then.\n{GOOD}", TOOLS, thinking=True)


def test_there_are_questions_for_every_tool() -> None:
    assert len(set(ASKED)) == len(ASKED) == 8
    assert len({tool["function"]["name"] for tool in TOOLS}) == 3
