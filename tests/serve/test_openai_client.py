"""The official client: a conversation with tools, streams, stops, seeds, log probabilities, many answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from m27quant import LLM, SamplingParams
from m27quant.runtime.chat import chat_prompt
from m27quant.serve.server import Server
from tests.serve.conftest import MODEL

QUESTION: list[Any] = [{"role": "user", "content": "Write a function that reads lines"}]
SHORT: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_completion_tokens": 40}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
        },
    },
}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def own_answer(llm: LLM, params: SamplingParams, **chat: Any) -> Any:
    """What the model says without a server: for the time between two requests the test may use it."""
    assert llm.tokenizer is not None
    return llm.generate([chat_prompt(llm.tokenizer, QUESTION, **chat).token_ids], params)[0]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_greedy_answers_are_the_engines(client: openai.OpenAI, tiny: LLM) -> None:
    answer = client.chat.completions.create(**SHORT, temperature=0, extra_body={"return_token_ids": True})
    expected = own_answer(tiny, SamplingParams(temperature=0, max_tokens=40))
    (choice,) = answer.choices
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected.token_ids
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.model == MODEL
    assert choice.finish_reason == expected.finish_reason


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**SHORT, seed=7, logprobs=True, top_logprobs=2)
    thoughts, content, tokens = "", "", []
    with client.chat.completions.create(
        **SHORT, seed=7, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        tokens += (choice.logprobs.content or []) if choice.logprobs else []
        assert chunk.usage is None
    message = whole.choices[0].message
    assert (content, thoughts) == (message.content, getattr(message, "reasoning_content", ""))
    assert thoughts
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_log_probabilities_are_of_the_tokens_of_the_text(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt="import os\nimport ", max_tokens=12, temperature=0, logprobs=3, echo=False
    ).choices[0]
    assert found.logprobs is not None
    assert found.logprobs.tokens is not None
    assert "".join(found.logprobs.tokens) == found.text
    offsets = found.logprobs.text_offset
    assert offsets is not None
    assert all(
        found.text[at:].startswith(token) for at, token in zip(offsets, found.logprobs.tokens, strict=True)
    )
    assert found.logprobs.top_logprobs is not None
    assert found.logprobs.token_logprobs is not None
    for best, logprob in zip(found.logprobs.top_logprobs, found.logprobs.token_logprobs, strict=True):
        assert len(best) == 3
        assert max(best.values()) == pytest.approx(logprob)  # greedy takes the likeliest


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(**settings: Any) -> list[Any]:
        return [c.text for c in client.completions.create(model=MODEL, prompt="def ", **settings).choices]

    sampled = {"max_tokens": 24, "temperature": 1.0, "n": 3}
    first = texts(**sampled, seed=11)
    assert texts(**sampled, seed=11) == first
    assert len(set(first)) == 3
    assert texts(max_tokens=24, temperature=1.0, seed=12) == first[1:2], "choice k has the seed plus k"
    assert texts(**sampled, seed=100) != first


def test_stops_end_the_text_before_them(client: openai.OpenAI, tiny: LLM) -> None:
    text = tiny.generate("import os\n", SamplingParams(temperature=0, max_tokens=40))[0].text
    stop = text[10:13]
    found = client.completions.create(
        model=MODEL, prompt="import os\n", temperature=0, max_tokens=40, stop=stop
    )
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].text == text[: text.index(stop)]
    with client.completions.create(
        model=MODEL, prompt="import os\n", temperature=0, max_tokens=40, stop=[stop, "\x00"], stream=True
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text[: text.index(stop)]


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    prompts = ["import os\n", "def main():\n"]
    found = client.completions.create(
        model=MODEL, prompt=prompts, n=2, temperature=0, max_tokens=6, echo=True
    )
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert [c.text.startswith(prompts[c.index // 2]) for c in found.choices] == [True] * 4
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    assert found.usage is not None
    single = [
        client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=6).usage for p in prompts
    ]
    assert found.usage.prompt_tokens == sum(usage.prompt_tokens for usage in single if usage)
    assert found.usage.completion_tokens == 2 * sum(usage.completion_tokens for usage in single if usage)


def test_thinking_can_be_left_out(client: openai.OpenAI, tiny: LLM) -> None:
    answer = client.chat.completions.create(
        **SHORT, temperature=0, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    expected = own_answer(tiny, SamplingParams(temperature=0, max_tokens=40), thinking=False)
    message = answer.choices[0].message
    assert getattr(message, "reasoning_content", None) is None
    assert message.content == expected.text.strip()
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    """The answer to a call is part of the next prompt, and the next answer is an answer."""
    messages = [*QUESTION]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "read_file", "arguments": '{"path": "a.py"}'},
    }
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "def a(): pass"})
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[TOOL], max_tokens=8, temperature=0
    )
    assert answer.usage is not None
    plain = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[TOOL], max_tokens=8)
    assert plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    again: Any = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "Go on"}]
    assert client.chat.completions.create(model=MODEL, messages=again, tools=[TOOL], max_tokens=4).choices


def test_faults_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**SHORT, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="another", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 3000)
    assert long.value.code == "context_length_exceeded"
    assert json.dumps(refused.value.body)


WRITE: Any = {"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "read_file"}}])
def test_a_call_that_has_to_come_comes(client: openai.OpenAI, tiny: LLM, choice: Any, thinking: bool) -> None:
    extra = {"return_token_ids": True, "chat_template_kwargs": {"enable_thinking": thinking}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[TOOL, WRITE], tool_choice=choice, max_tokens=160, seed=3,
        extra_body=extra,
    )  # fmt: skip
    (found,) = answer.choices
    assert found.model_extra is not None
    assert tiny.tokenizer is not None
    text = tiny.tokenizer.decode(found.model_extra["token_ids"])
    names = ["read_file"] if choice != "required" else ["read_file", "write"]
    begins = tuple(f'<minimax:tool_call>\n<invoke name="{name}">\n' for name in names)
    if thinking:
        _, end, text = text.partition("</think>")
        assert end or found.finish_reason == "length", "nothing stops the thoughts but their end"
    assert text.lstrip().startswith(begins)
    if "</minimax:tool_call>" not in text:
        assert found.finish_reason == "length"
    for call in found.message.tool_calls or ():
        assert call.type == "function"


def test_no_call_comes_where_none_may(client: openai.OpenAI) -> None:
    none = client.chat.completions.create(**SHORT, temperature=0, tools=[TOOL], tool_choice="none")
    plain = client.chat.completions.create(**SHORT, temperature=0)
    assert none.usage is not None
    assert plain.usage is not None
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert none.choices[0].message.content == plain.choices[0].message.content
