"""Servers of every kind: what they count is read, what they do wrong is counted and named, nothing is tried twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m27quant.bench.reading import Source
from m27quant.bench.requests import BenchOptions
from m27quant.bench.result import BenchResult, Cell
from m27quant.bench.run import bench_server
from m27quant.drafters.metrics import AcceptanceStats
from m27quant.errors import EnvironmentFault, Interrupted, UsageError
from tests.bench.stub import STEPS, TOKENS, Behaviour, serving

EXPECTED = AcceptanceStats.of_steps(STEPS, [3] * len(STEPS))


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return str(path)


def options(task: str, **changes: Any) -> BenchOptions:
    values: dict[str, Any] = {"tasks": (task,), "concurrency": (2,), "num_prompts": (4,), "max_tokens": 9}
    return BenchOptions(**(values | changes))


def measured(behaviour: Behaviour, task: str, **changes: Any) -> tuple[Cell, BenchResult]:
    with serving(behaviour) as (url, _):
        result = bench_server(url, options(task, **changes))
    (cell,) = result.cells
    return cell, result


def test_what_is_asked(task: str) -> None:
    with serving(Behaviour(key="s3cret")) as (url, seen):  # an address without /v1 does as well
        result = bench_server(url.removesuffix("/v1"), options(task, top_k=1), api_key="s3cret")
    assert len(seen.bodies) == 2 + 4
    assert seen.keys == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(result.to_json())
    assert {json.dumps(b["messages"]) for b in seen.bodies} == {
        json.dumps([{"role": "user", "content": text}]) for text in "ab"
    }
    first = seen.bodies[0]
    assert {k: v for k, v in first.items() if k not in ("messages", "seed")} == {
        "model": "tiny", "max_tokens": 9, "temperature": 0.0, "top_k": 1, "stream": True,
        "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip
    assert len({b["seed"] for b in seen.bodies}) == 6


@pytest.mark.parametrize(
    ("flavour", "source", "has_counts"),
    [
        ("m27quant", "usage", True),
        ("vllm-requests", "vllm usage", True),
        ("vllm", "counters", True),
        ("sglang-usage", "sglang usage", False),
    ],
)
def test_acceptance_is_read_where_it_is_told(
    flavour: str, source: Source, has_counts: bool, task: str
) -> None:
    cell, result = measured(Behaviour(flavour), task)
    assert cell.acceptance.source == source
    assert cell.acceptance.tau == EXPECTED.tau
    assert cell.output_tokens == 4 * TOKENS
    assert result.notices == []
    if has_counts:
        assert cell.acceptance.stats == EXPECTED + EXPECTED + EXPECTED + EXPECTED
    if cell.zlab_server is not None:
        assert cell.zlab_server == pytest.approx(TOKENS / len(STEPS))


def test_an_average_is_taken_where_there_is_no_more(task: str) -> None:
    cell, _ = measured(Behaviour("sglang"), task)
    assert (cell.acceptance.source, cell.acceptance.tau, cell.acceptance.stats) == (
        "sglang average",
        2.25,
        None,
    )
    cell, _ = measured(Behaviour("plain"), task)
    assert (cell.acceptance.source, cell.acceptance.tau) == ("none", None)
    assert cell.tokens_per_s > 0


def test_counters_that_hold_others_requests_are_told_of(task: str) -> None:
    _, result = measured(Behaviour("vllm", others=1), task)
    assert len(result.notices) == 1
    assert f"wrote {8 * TOKENS} tokens while {4 * TOKENS} were asked for" in result.notices[0]


def test_latency_begins_with_the_first_token_and_not_with_the_role(task: str) -> None:
    cell, _ = measured(Behaviour(pause_s=0.02), task, concurrency=(1,), num_prompts=(1,))
    assert cell.ttft_s is not None
    assert cell.itl_s is not None
    assert cell.ttft_s.mean >= 0.02
    assert cell.itl_s.mean >= 0.02 * len(STEPS) / (TOKENS - 1) * 0.9
    assert cell.finish_reasons == {"length": 1}


def test_so_many_are_in_flight_and_no_more(task: str) -> None:
    with serving(Behaviour(pause_s=0.02)) as (url, seen):
        bench_server(url, options(task, concurrency=(3,), num_prompts=(9,)))
    assert seen.most_in_flight == 3


def test_a_plain_server_beside_it_gives_the_speed_up(task: str) -> None:
    with serving(Behaviour("m27quant")) as (url, _), serving(Behaviour()) as (plain, seen):
        result = bench_server(url, options(task), baseline_url=plain)
    assert [c.setting for c in result.cells] == [None, "as served"]
    assert len(seen.bodies) == 6
    (speed,) = result.speeds()
    assert speed.measured == pytest.approx(result.cells[1].tokens_per_s / result.cells[0].tokens_per_s)
    assert speed.predicted is None
    assert result.advice == []


def without_usage(events: list[Any]) -> list[Any]:
    return events[:-1]


def with_an_error(events: list[Any]) -> list[Any]:
    return [*events[:2], {"error": {"message": "out of \x1b[31mmemory"}}]


FAULTS = {
    "HTTP 500: it broke": Behaviour(fault=lambda n: (500, {"error": {"message": "it broke"}})),
    "HTTP 400: no": Behaviour(fault=lambda n: (400, {"message": "no"})),
    "HTTP 503: <html>": Behaviour(fault=lambda n: (503, "<html>")),
    "HTTP 307: http://example.com/": Behaviour(fault=lambda n: (307, "http://example.com/")),
    "HTTP 401: Incorrect API key": Behaviour(key="other"),
    "HTTP 403: key *** is blocked": Behaviour(fault=lambda n: (403, {"error": "key s3cret is blocked"})),
    "sent no usage": Behaviour(events=without_usage),
    r"error in the stream: out of \x1b[31mmemory": Behaviour(events=with_an_error),
    "ended without [DONE]": Behaviour(events=lambda e: [*e[:3], b""]),
    "not JSON": Behaviour(events=lambda e: [b"data: {\n\n"]),
    "not an object": Behaviour(events=lambda e: [b"data: [1]\n\n"]),
    "longer than 4,194,304 bytes": Behaviour(events=lambda e: [b"data: " + b"x" * 2**22 + b"\n\n"]),
    "completion_tokens is -3": Behaviour(
        events=lambda e: [{"choices": [], "usage": {"completion_tokens": -3}}]
    ),
    "cannot be of 1 steps": Behaviour(
        events=lambda e: [
            {"usage": {"completion_tokens": 3, "m27quant": {"verify_steps": 1, "accepted": [2]}}}
        ]
    ),
    "accepted drafts are no list": Behaviour(
        events=lambda e: [{"usage": {"completion_tokens": 3, "m27quant": {"verify_steps": 1, "accepted": 3}}}]
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_goes_wrong_is_named_and_not_tried_again(message: str, task: str) -> None:
    with serving(FAULTS[message]) as (url, seen), pytest.raises(EnvironmentFault) as caught:
        bench_server(url, options(task), api_key="s3cret")
    assert "none of 4 requests was answered" in caught.value.message
    assert message in caught.value.message
    assert "s3cret" not in caught.value.message
    assert len(seen.bodies) == 6


def test_some_that_fail_leave_the_others(task: str) -> None:
    behaviour = Behaviour("m27quant", fault=lambda n: (500, {"error": "odd"}) if n % 2 else None)
    cell, result = measured(behaviour, task, concurrency=(1,), num_prompts=(4,))
    assert cell.errors == {"HTTP 500: odd": 2}
    assert cell.output_tokens == 2 * TOKENS
    assert cell.acceptance.stats == EXPECTED + EXPECTED
    assert (result.num_errors, result.complete) == (2, True)


def test_a_server_that_falls_silent_is_given_up(task: str) -> None:
    with serving(Behaviour(pause_s=5)) as (url, _), pytest.raises(EnvironmentFault, match="timed out"):
        bench_server(url, options(task, num_prompts=(1,), concurrency=(1,)), timeout_s=0.2)


def test_there_has_to_be_a_server_and_one_model(task: str) -> None:
    with serving(Behaviour(models=["a", "b\x00"])) as (url, seen):
        with pytest.raises(UsageError, match=r"several models: a, b\\x00"):
            bench_server(url, options(task))
        assert bench_server(url, options(task), model="b").options["model"] == "b"
        assert seen.bodies[0]["model"] == "b"
    with pytest.raises(EnvironmentFault, match="Connection refused") as caught:
        bench_server(url, options(task))
    assert caught.value.hint
    with serving(Behaviour(models=[])) as (url, _), pytest.raises(EnvironmentFault, match="names no model"):
        bench_server(url, options(task))
    with serving(Behaviour()) as (url, _), pytest.raises(EnvironmentFault, match="HTTP 404"):
        bench_server(f"{url}/v2", options(task))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "file:///etc/passwd",
        "http://",
        "http://a:x",
        "http://a b",
    ],
)
def test_addresses_that_are_none(url: str, task: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        bench_server(url, options(task))


@pytest.mark.parametrize("key", ["", "s3cret\n", "s3cret\r\nHost: b", "s3crét"])
def test_a_key_that_is_none_is_refused_and_not_shown(key: str, task: str) -> None:
    with pytest.raises(UsageError, match="the API key has characters") as caught:
        bench_server("http://127.0.0.1:1/v1", options(task), api_key=key)
    assert "s3cr" not in f"{caught.value.message}{caught.value.hint}"
    with pytest.raises(UsageError, match="holds a name or a password, which results would show"):
        bench_server("http://me:s3cret@127.0.0.1:1/v1", options(task))


def test_what_stops_it_keeps_the_cells_before(task: str) -> None:
    """The second concurrency is stopped in its midst; its requests end, and the first one's cell is whole."""
    kept: list[BenchResult] = []

    def stop() -> None:
        if kept:
            raise Interrupted("stopped by SIGINT")

    with serving(Behaviour(pause_s=0.01)) as (url, seen), pytest.raises(Interrupted):
        bench_server(url, options(task, concurrency=(1, 2)), stop=stop, on_cell=kept.append)
    assert [c.concurrency for c in kept[-1].cells] == [1]
    assert not kept[-1].complete
    assert len(seen.bodies) <= 5 + 2
