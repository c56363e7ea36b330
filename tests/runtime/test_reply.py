"""What the model writes, read whole and in every possible cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m27quant.runtime.reply import CALLS, CALLS_END, Delta, Problem, Reply, ReplyParser, ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "limit": {"type": "number"},
                "exact": {"type": "boolean"},
                "tags": {"type": "array"},
                "where": {"type": "object"},
                "unit": {"type": ["string", "null"]},
                "id": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                "level": {"enum": [1, 2, 3]},
            },
        },
    },
}


def call(name: str, **parameters: str) -> str:
    body = "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in parameters.items())
    return f'<invoke name="{name}">\n{body}</invoke>\n'


def block(*calls: str) -> str:
    return f"{CALLS}\n{''.join(calls)}{CALLS_END}"


def read(*pieces: str, thinking: bool = True, tools: list | None = None) -> Reply:
    parser = ReplyParser(tools, thinking=thinking)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    reply = parser.reply
    assert "".join(e.text for e in events if isinstance(e, Delta) and e.kind == "thinking") == reply.thinking
    assert "".join(e.text for e in events if isinstance(e, Delta) and e.kind == "content") == reply.content
    assert [e for e in events if isinstance(e, ToolCall)] == reply.tool_calls
    assert [e for e in events if isinstance(e, Problem)] == reply.problems
    return reply


def test_thoughts_text_and_two_calls() -> None:
    text = "I look.\n\nThen I call.\n</think>\n\nLet me see.\n" + block(
        call("get_weather", city="Paris", days="3"), call("get_weather", city="Rome")
    )
    reply = read(text, tools=[WEATHER])
    assert reply == Reply(
        "I look.\n\nThen I call.",
        "Let me see.",
        [
            ToolCall("get_weather", {"city": "Paris", "days": 3}),
            ToolCall("get_weather", {"city": "Rome"}),
        ],
        [],
    )


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "\n<think>\n"])
def test_the_thoughts_may_be_opened_again(opening: str) -> None:
    assert read(f"{opening}yes\n</think>\n\nno") == Reply("yes", "no")


def test_without_thinking_the_text_comes_at_once() -> None:
    parser = ReplyParser(thinking=False)
    assert parser.feed("Hello") == [Delta("content", "Hello")]
    assert parser.feed(" there ") == [Delta("content", " there")]
    assert parser.feed("<") == []  # may become a tool call
    assert parser.feed("3") == [Delta("content", " <3")]
    assert parser.finish() == []
    assert parser.reply == Reply("", "Hello there <3")


def test_thoughts_that_the_prompt_had_not_opened() -> None:
    assert read("<think>a</think>b", thinking=False) == Reply("a", "b")


def test_the_tag_within_text_is_text() -> None:
    assert read("write <think> first", thinking=False) == Reply("", "write <think> first")
    assert read("write ", "<think> first", thinking=False) == Reply("", "write <think> first")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"days": "3"}, 3),
        ({"days": "3.0"}, 3),
        ({"days": "-12"}, -12),
        ({"limit": "0.5"}, 0.5),
        ({"limit": "1e3"}, 1000.0),
        ({"exact": "true"}, True),
        ({"exact": "False"}, False),
        ({"tags": '["a", 1]'}, ["a", 1]),
        ({"where": '{"x": {"y": null}}'}, {"x": {"y": None}}),
        ({"city": "12"}, "12"),
        ({"city": "true"}, "true"),
        ({"city": " spaced "}, " spaced "),
        ({"city": "\ntwo\nlines\n"}, "two\nlines"),
        ({"city": 'a < b && "c" </p>'}, 'a < b && "c" </p>'),
        ({"unit": "null"}, None),
        ({"unit": "C"}, "C"),
        ({"id": "7"}, 7),
        ({"id": "x7"}, "x7"),
        ({"level": "2"}, 2),
        ({"unknown": "5"}, "5"),
    ],
)
def test_values_have_the_types_of_the_schema(text: dict[str, str], value: object) -> None:
    reply = read("</think>" + block(call("get_weather", **text)), tools=[WEATHER])
    (found,) = reply.tool_calls[0].arguments.values()
    assert found == value
    assert type(found) is type(value)
    assert reply.problems == []


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"days": "many"}, "many"),
        ({"days": "1.5"}, "1.5"),
        ({"days": "true"}, "true"),
        ({"limit": "NaN"}, "NaN"),
        ({"tags": "[1,"}, "[1,"),
        ({"where": "[" * 100_000}, "[" * 100_000),
        ({"days": "9" * 10_000}, "9" * 10_000),
    ],
)
def test_a_value_of_another_type_is_kept_as_text_and_reported(parameters: dict[str, str], kept: str) -> None:
    reply = read("</think>" + block(call("get_weather", **parameters)), tools=[WEATHER])
    assert list(reply.tool_calls[0].arguments.values()) == [kept]
    assert [problem.text for problem in reply.problems] == [kept]


def test_an_unknown_tool_is_reported() -> None:
    reply = read(block(call("rm")), thinking=False, tools=[WEATHER])
    assert reply.tool_calls == [ToolCall("rm", {})]
    assert "rm" in reply.problems[0].message
    assert read(block(call("rm")), thinking=False).problems == []  # nothing is known of the tools


@pytest.mark.parametrize(
    ("text", "calls", "lost"),
    [
        (f"{CALLS}\n<invoke name='a'>\n</invoke>", 1, ""),  # the block's end is missing
        (f'{CALLS}\n{call("a")}<invoke name="b"><parameter name="k">v', 1, "k"),
        (f"{CALLS}\n<invoke>\n</invoke>\n{CALLS_END}", 0, "<invoke>"),
        (f"{CALLS}\nnothing{CALLS_END}", 0, "nothing"),
        (f"{CALLS}\nwhy{call('a')}{CALLS_END}", 1, "why"),
        (f'{CALLS}<invoke name="a">stray<parameter name="k">v</parameter></invoke>{CALLS_END}', 1, "stray"),
        (f'{CALLS}<invoke name="a"><parameter name="k">v</invoke>{CALLS_END}', 1, "v"),
        (f'{CALLS}<invoke name="a">{CALLS_END} and on', 0, "a"),
    ],
)
def test_malformed_blocks_are_reported_and_nothing_is_lost(text: str, calls: int, lost: str) -> None:
    reply = read(text, thinking=False)
    assert len(reply.tool_calls) == calls
    assert reply.problems
    assert any(lost in problem.text for problem in reply.problems)


def test_text_after_a_block_is_text() -> None:
    reply = read("a\n" + block(call("f")) + "\nb\n" + block(call("g")), thinking=False)
    assert [c.name for c in reply.tool_calls] == ["f", "g"]
    assert reply.content == "a\nb"


def test_a_call_inside_of_the_thoughts_ends_them() -> None:
    reply = read("hm\n" + block(call("f")))
    assert (reply.thinking, reply.content, [c.name for c in reply.tool_calls]) == ("hm", "", ["f"])
    assert "inside of the thoughts" in reply.problems[0].message


def test_thoughts_without_an_end_are_reported() -> None:
    reply = read("on and on")
    assert reply.thinking == "on and on"
    assert [p.message for p in reply.problems] == ["the thoughts were not closed"]
    assert read("").problems


def test_a_call_is_handed_out_as_soon_as_it_is_whole() -> None:
    parser = ReplyParser(thinking=False)
    assert parser.feed(f"{CALLS}\n{call('a').rstrip()[:-1]}") == []
    assert parser.feed(">") == [ToolCall("a", {})]


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        CALLS,
        CALLS_END,
        '<invoke name="get_weather">',
        "<invoke name=>",
        "</invoke>",
        '<parameter name="days">',
        "3",
        "</parameter>",
        " ",
        "\n",
        "<",
        "</",
        "a",
        "é",
        "\u2028",
        "<thin",
        "<minimax:tool_cal",
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join), st.booleans(), st.data())
def test_every_cut_gives_the_same_reply(text: str, thinking: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(text, thinking=thinking, tools=[WEATHER])
    assert read(*pieces, thinking=thinking, tools=[WEATHER]) == whole
    assert read(*text, thinking=thinking, tools=[WEATHER]) == whole


@given(st.text(max_size=60))
def test_plain_text_passes_but_for_its_margins(text: str) -> None:
    if "<" not in text:
        assert read(text, thinking=False).content == text.strip()


def test_without_calls_their_text_is_text() -> None:
    text = 'a <minimax:tool_call>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>'
    parser = ReplyParser(thinking=False, calls=False)
    for character in text:
        parser.feed(character)
    parser.finish()
    assert parser.reply.content == text
    assert not parser.reply.tool_calls
