"""The chat page in a real browser, by keyboard alone: answers, thoughts, tool calls, figures, stop, themes, keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from m27quant import LLM
from m27quant.serve.server import Server
from tests.serve.browser import ENTER, ESCAPE, TAB, Browser, browser, missing
from tests.serve.conftest import serving

SHOTS = os.environ.get("SCREENSHOTS")
"""A folder to leave pictures in."""
IDLE = "document.getElementById('stop').hidden"
FIGURES = "document.querySelector('.figures')?.textContent.includes('tokens')"

needs_browser = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def shot(page: Browser, name: str) -> None:
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png")


def set_up(page: Browser, server: Server, width: int = 900) -> None:
    page.size(width, 760)
    page.open(f"{server.address}/")
    page.run("localStorage.clear(); sessionStorage.clear()")
    page.open(f"{server.address}/")


def test_it_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    for path in ("/", "/chat.js", "/chat.css"):
        found = http.get(path)
        assert found.is_success
        assert "http:" not in found.text
        assert "https:" not in found.text
        assert found.headers["x-content-type-options"] == "nosniff"


@needs_browser
def test_a_question_is_answered_by_keyboard_alone(page: Browser, server: Server) -> None:
    set_up(page, server)
    page.wait("document.getElementById('model').textContent")
    assert page.text("#model") == "tiny-m27"
    assert page.focus() == "question"
    page.run(
        "document.getElementById('max-tokens').value = 60; document.getElementById('temperature').value = 0"
    )
    page.keys("Write a function that reads lines" + ENTER)
    page.wait(f"{IDLE} && {FIGURES}")
    assert page.text("article.user .text") == "Write a function that reads lines"
    assert page.text(".assistant .text")
    assert page.text(".assistant summary").startswith("Thought for")
    assert not page.run("return document.querySelector('.assistant details').open"), (
        "thoughts fold when they end"
    )
    figures = page.text(".figures")
    assert "first token after" in figures
    assert "tokens/s" in figures
    shot(page, "light")
    page.run("document.querySelector('.assistant summary').focus()")
    page.keys(ENTER)
    assert page.text(".thoughts")
    shot(page, "thoughts")


@needs_browser
def test_escape_stops_an_answer_and_what_was_said_stays(page: Browser, server: Server) -> None:
    set_up(page, server)
    page.keys("Tell me everything" + ENTER)
    page.wait("document.querySelector('.thoughts, .assistant .text p')")
    page.keys(ESCAPE)
    page.wait(IDLE)
    assert (
        "stopped" in page.text(".figures") or "cut" in page.text(".figures") or page.text(".assistant .text")
    )
    worker = server.service.worker
    page.wait("true")
    assert worker.num_live <= 1
    page.keys("And now" + ENTER)  # the chat goes on
    page.wait("document.querySelectorAll('article.assistant').length == 2")
    page.keys(ESCAPE)
    page.wait(IDLE)


CALL = """
window.asked = [];
window.fetch = async (url, options) => {
  window.asked.push(JSON.parse(options.body));
  const chunk = (delta, more) => `data: ${JSON.stringify({choices: [{index: 0, delta, ...more}],
    usage: {prompt_tokens: 9, completion_tokens: 40, completion_tokens_details:
    {accepted_prediction_tokens: 24, rejected_prediction_tokens: 8}, m27quant: {verify_steps: 16}}})}\\n\\n`;
  const call = {index: 0, id: "call_1", type: "function",
    function: {name: "read_file", arguments: '{"path": "<b>a.py</b>", "lines": 3}'}};
  return new Response(window.asked.length > 1 ? chunk({content: "```python\\nx = 1\\n```\\nDone."}) :
    chunk({reasoning_content: "A file has to be read."}) + chunk({tool_calls: [call]}) +
    chunk({}, {finish_reason: "tool_calls"}) + "data: [DONE]\\n\\n");
};
"""


@needs_browser
def test_a_tool_call_is_shown_and_takes_its_result(page: Browser, server: Server) -> None:
    set_up(page, server)
    page.run(CALL)
    page.keys("Read a.py" + ENTER)
    page.wait("document.querySelector('.call')")
    assert page.text(".call h3") == "Calls read_file"
    assert "<b>a.py</b>" in page.text(".call pre"), "text of the model is text"
    assert "24 of 32 drafts accepted, 2.50 tokens a step" in page.text(".figures")
    shot(page, "call")
    page.run("document.querySelector('.call input').focus()")
    page.keys("x = 1" + ENTER)
    page.wait("window.asked.length == 2")
    sent = page.run("return window.asked[1].messages")
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[2] == {"role": "tool", "tool_call_id": "call_1", "content": "x = 1"}
    assert sent[1]["tool_calls"][0]["function"]["name"] == "read_file"
    page.wait("document.querySelectorAll('.assistant .text')[1]?.querySelector('pre')")


@needs_browser
def test_dark_and_narrow(page: Browser, server: Server) -> None:
    set_up(page, server, width=360)
    page.run(CALL)
    page.keys("Read a.py" + ENTER)
    page.wait("document.querySelector('.call')")
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.run("document.getElementById('theme').focus()")
    page.keys(ENTER)
    assert page.run(background) != light
    page.run("document.getElementById('show-settings').focus()")
    page.keys(ENTER)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), (
        "nothing is cut off at the side"
    )
    inside = "b.offsetParent === null || b.getBoundingClientRect().right <= innerWidth"
    assert page.run(f"return [...document.querySelectorAll('button, input')].every(b => {inside})")
    shot(page, "narrow")
    page.keys(TAB)
    page.keys(TAB)
    assert page.run("return document.activeElement.matches('#settings *')"), "tab goes on into the settings"
    page.open(f"{server.address}/")
    assert page.run(background) != light, "the choice is kept"
    page.size(900, 760)
    shot(page, "dark")


@needs_browser
def test_a_key_is_asked_for_and_used(page: Browser, tiny: LLM, server: Server) -> None:
    del server  # one thread at a time has the model: this module's server is idle meanwhile
    with serving(tiny, api_key="sesame") as guarded:
        set_up(page, guarded)
        page.wait("document.getElementById('notice').textContent.includes('API key')")
        assert page.focus() == "key"
        shot(page, "key")
        page.keys("sesame" + TAB)
        page.wait("document.getElementById('model').textContent == 'tiny-m27'")
        assert page.text("#notice") == ""
