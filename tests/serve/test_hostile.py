"""Whatever comes in is answered by an error object that names what is wrong, and never by a 5xx."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m27quant.serve.server import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
GO_ON: dict[str, Any] = {"prompt": "import ", "max_tokens": 1}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


def post(http: httpx.Client, path: str, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"nonsense", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff{}", None),
        (b"[" * 100_000, None),
        (b'{"prompt":' * 900 + b"1" + b"}" * 900, "prompt"),
        (b'{"prompt": "a", "prompt": "b"}', None),
        (b'{"prompt": "a", "temperature": NaN}', None),
        (b'{"prompt": "a", "temperature": 1e999}', None),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "a", "\\ud800": 1}', None),
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [1, -1]}, "prompt.1"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [True]}, "prompt.0"),
        (GO_ON | {"temperature": "hot"}, "temperature"),
        (GO_ON | {"temperature": True}, "temperature"),
        (GO_ON | {"temperature": 10**400}, "temperature"),
        (GO_ON | {"top_p": 0}, "top_p"),
        (GO_ON | {"top_k": 10**30}, "top_k"),
        (GO_ON | {"max_tokens": 0}, "max_tokens"),
        (GO_ON | {"max_tokens": 1.5}, "max_tokens"),
        (GO_ON | {"n": 10**9}, "n"),
        (GO_ON | {"n": 1000}, "n"),
        (GO_ON | {"seed": 2**70}, "seed"),
        (GO_ON | {"stop": ""}, "stop"),
        (GO_ON | {"stop": ["a"] * 100}, "stop"),
        (GO_ON | {"stop_token_ids": [10**6]}, "stop_token_ids"),
        (GO_ON | {"logprobs": 1000}, "logprobs"),
        (GO_ON | {"echo": True, "logprobs": 1}, "echo"),
        (GO_ON | {"best_of": 3}, "best_of"),
        (GO_ON | {"logit_bias": {"5": 1}}, "logit_bias"),
        (GO_ON | {"stream_options": {"include_usage": True}}, "stream_options"),
        (GO_ON | {"temprature": 1}, "temprature"),
    ],
)
def test_bad_completions_are_named(
    http: httpx.Client, body: bytes | dict[str, Any], param: str | None
) -> None:
    answer = post(http, COMPLETIONS, body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (COMPLETIONS, {"prompt": []}, "at least 1 item"),
        (COMPLETIONS, {"stop": ["a"] * 17}, "at most 16 items"),
        (COMPLETIONS, {"suffix": "x"}, "leave it out"),
        (COMPLETIONS, {"logit_bias": {"5": 1}}, "leave it out"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "only text"),
    ],
)
def test_the_words_are_those_of_what_was_meant(
    http: httpx.Client, path: str, change: dict[str, Any], words: str
) -> None:
    answer = post(http, path, (GO_ON if path == COMPLETIONS else HELLO) | change)
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


def test_head_is_get_without_a_body(http: httpx.Client) -> None:
    for path in ("/", "/health", "/v1/models"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == http.get(path).headers["content-type"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
DEEP: Any = {}
for _ in range(100):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": "Hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "tools.0.function.name"),
        ({"tools": ["f"]}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs.a"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"top_logprobs": 100}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"functions": []}, "functions"),
    ],
)  # fmt: skip
def test_bad_chats_are_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = post(http, CHAT, HELLO | change)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_what_is_strange_but_good_is_answered(http: httpx.Client) -> None:
    for change in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, *HELLO["messages"]]},
        {"stop": ["\x00", "never"], "seed": -(2**63), "top_k": -1, "user": "me", "tool_choice": "none"},
    ):
        answer = post(http, CHAT, HELLO | change)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/%00%ff/../etc/passwd", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/health", 405),
        ("PUT", COMPLETIONS, 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/a/b%0Ac", 404),
    ],
)
def test_unknown_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_bodies_of_another_kind_are_refused(http: httpx.Client) -> None:
    body = json.dumps(GO_ON)
    for headers in (
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ):
        answer = http.post(COMPLETIONS, content=body, headers=headers)
        assert answer.status_code == 415
        error_of(answer)
    assert post(http, COMPLETIONS, GO_ON, **{"content-type": "application/json; charset=utf-8"}).is_success


def test_what_is_no_http_gets_an_error_object_too(server: Server) -> None:
    host, port = urlsplit(server.address).hostname, urlsplit(server.address).port
    assert host is not None
    for raw in (b"\x16\x03\x01 TLS\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, port or 0), timeout=10) as connection:
            connection.sendall(raw)
            answer = connection.makefile("rb").read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["code"] == "invalid_http"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "text", "function"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(
        ["role", "content", "type", "text", "name", "function", "parameters", "arguments"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field_is_answered_or_refused(http: httpx.Client, data: st.DataObject) -> None:
    from m27quant.serve.protocol import ChatRequest, CompletionRequest

    path, kind, base = data.draw(
        st.sampled_from([(CHAT, ChatRequest, HELLO), (COMPLETIONS, CompletionRequest, GO_ON)])
    )
    names = st.sampled_from(sorted(set(kind.model_fields) - {"max_tokens", "max_completion_tokens"}))
    changes = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    answer = post(http, path, base | changes)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error_of(answer)
