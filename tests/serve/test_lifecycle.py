"""Keys, limits, a full queue, clients that go away, timeouts, faults of the engine, and the end."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from m27quant import LLM
from m27quant.errors import EnvironmentFault, UsageError
from m27quant.serve import server as server_module
from m27quant.serve.server import Server, ServerOptions
from tests.serve.conftest import assert_nothing_left, serving

LONG: dict[str, Any] = {"prompt": "def ", "max_tokens": 1500, "ignore_eos": True, "seed": 1}
SHORT: dict[str, Any] = {"prompt": "def ", "max_tokens": 2, "temperature": 0}
COMPLETIONS = "/v1/completions"


@contextmanager
def client_of(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_idle(llm: LLM) -> bool:
    return llm.engine.scheduler.is_idle


def test_a_key_opens_v1_and_only_the_right_one(tiny: LLM) -> None:
    with serving(tiny, api_key="sesame") as server, client_of(server) as http:
        assert http.get("/health").json() == {"status": "ok"}
        for sent in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer sesame x"},
        ):
            answer = http.post(COMPLETIONS, json=SHORT, headers=sent)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
        assert http.get("/v1/nothing").status_code == 401
        assert http.post(COMPLETIONS, json=SHORT, headers={"Authorization": "Bearer sesame"}).is_success


def test_pages_of_other_origins_are_kept_out(tiny: LLM, server: Server, http: httpx.Client) -> None:
    refused = http.get("/v1/models", headers={"Host": "rebound.example"})
    assert refused.status_code == 403
    assert error_of(refused)["code"] == "wrong_host"
    for name in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert http.get("/v1/models", headers={"Host": name}).is_success
    foreign = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in http.options(COMPLETIONS, headers=foreign).headers
    del server
    with (
        serving(tiny, cors_origins=("http://page.example",)) as open_server,
        client_of(open_server) as opened,
    ):
        allowed = opened.options(COMPLETIONS, headers=foreign)
        assert allowed.headers["access-control-allow-origin"] == "http://page.example"


def test_requests_have_limits(tiny: LLM) -> None:
    with (
        serving(tiny, max_tokens=4, max_choices=3, max_body_bytes=1000) as server,
        client_of(server) as http,
    ):
        assert error_of(http.post(COMPLETIONS, json=SHORT | {"max_tokens": 5}))["param"] == "max_tokens"
        assert error_of(http.post(COMPLETIONS, json=SHORT | {"n": 4}))["param"] == "n"
        assert error_of(http.post(COMPLETIONS, json=SHORT | {"prompt": ["a", "b"], "n": 2}))["param"] == "n"
        large = http.post(COMPLETIONS, json=SHORT | {"prompt": "a" * 1000})
        assert large.status_code == 413
        assert error_of(large)["code"] == "request_too_large"
        pieces = http.post(
            COMPLETIONS, content=(b"x" * 100 for _ in range(20)), headers={"content-type": "application/json"}
        )
        assert pieces.status_code == 413
        unlimited = http.post(COMPLETIONS, json={"prompt": "def ", "ignore_eos": True}).json()
        assert unlimited["usage"]["completion_tokens"] == 4


def test_a_completion_that_says_nothing_of_it_has_16_tokens(http: httpx.Client) -> None:
    for said, count in (({}, 16), ({"max_tokens": None, "stop": "never"}, 40)):
        asked = {"prompt": [300] * (2048 - 40), "ignore_eos": True, **said}
        assert http.post(COMPLETIONS, json=asked).json()["usage"]["completion_tokens"] == count


def test_a_full_queue_refuses_and_recovers(tiny: LLM) -> None:
    most = tiny.options.max_num_seqs
    with serving(tiny, max_queue=1) as server, client_of(server) as http:
        with http.stream("POST", COMPLETIONS, json=LONG | {"n": most, "stream": True}) as running:
            chunks = running.iter_bytes()
            next(chunks)
            with contextlib.suppress(httpx.ReadTimeout):  # waits behind the others, and is given up
                http.post(COMPLETIONS, json=SHORT, timeout=0.3)
            refused = http.post(COMPLETIONS, json=SHORT | {"n": 2})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert error_of(refused)["type"] == "rate_limit_error"
            never = http.post(COMPLETIONS, json=SHORT | {"n": most + 2})  # however long one waits
            assert (never.status_code, error_of(never)["param"]) == (400, "n")
        until(lambda: is_idle(tiny))
        assert http.post(COMPLETIONS, json=SHORT | {"n": 2}).is_success


def test_who_goes_away_is_not_computed_for(tiny: LLM, server: Server, http: httpx.Client) -> None:
    for asked in (LONG | {"stream": True}, LONG | {"n": 3}):
        before = tiny.engine.totals.num_output_tokens
        with (
            contextlib.suppress(httpx.ReadTimeout),
            http.stream("POST", COMPLETIONS, json=asked, timeout=0.5) as answer,
        ):
            next(answer.iter_bytes())  # of the whole answer there is nothing to read yet
        until(lambda: is_idle(tiny))
        assert tiny.engine.totals.num_output_tokens - before < 1500
        until(lambda: not server.service.worker.num_live)
        assert_nothing_left(tiny)


def test_requests_of_several_clients_run_together(tiny: LLM, http: httpx.Client) -> None:
    alone = http.post(COMPLETIONS, json=SHORT | {"max_tokens": 40}).json()["choices"]
    steps = tiny.engine.totals.num_steps
    texts: list[Any] = []

    def ask() -> None:
        texts.append(http.post(COMPLETIONS, json=SHORT | {"max_tokens": 40}).json()["choices"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 6
    assert tiny.engine.totals.num_steps - steps < 6 * 40


def test_what_takes_too_long_is_ended(tiny: LLM) -> None:
    with serving(tiny, request_timeout_s=2) as server, client_of(server) as http:
        late = http.post(COMPLETIONS, json=LONG | {"n": 16})
        assert late.status_code == 408
        assert error_of(late)["code"] == "request_timeout"
        begun = http.post(COMPLETIONS, json=LONG | {"n": 16, "stream": True}).text.strip().split("\n\n")
        assert begun[-1] == "data: [DONE]"
        assert "request_timeout" in begun[-2]
        until(lambda: is_idle(tiny))


def test_a_body_has_to_come_in_time(tiny: LLM) -> None:
    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)
        yield b"}"

    with serving(tiny, body_timeout_s=0.2) as server, client_of(server) as http:
        late = http.post(COMPLETIONS, content=slowly(), headers={"content-type": "application/json"})
        assert late.status_code == 408
        error_of(late)
        with socket.create_connection(
            ("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=10
        ) as silent:
            assert silent.recv(1) == b"", "who says nothing is hung up on"


def test_a_fault_of_the_engine_is_told_and_survived(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a kernel broke")

    with serving(tiny) as server, client_of(server) as http:
        with monkeypatch.context() as broken:
            broken.setattr(tiny.engine, "step", fail)
            answer = http.post(COMPLETIONS, json=SHORT)
            assert answer.status_code == 500
            assert "kernel" not in answer.text
            assert error_of(answer)["code"] == "internal_error"
            assert http.get("/health").status_code == 500
        assert http.post(COMPLETIONS, json=SHORT).is_success
        assert http.get("/health").is_success


def metrics_of(http: httpx.Client) -> dict[str, float]:
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {
        name.removeprefix("m27quant:"): float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines)
    }


def test_drafts_are_counted_in_usage_and_metrics_alike(repository: Path) -> None:
    import m27quant

    tiny = repository / "examples/tiny-m27"
    llm = m27quant.load(tiny, drafter="ngram", max_num_seqs=4, kv_cache_memory=2**24)
    params = m27quant.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    own = llm.generate("a = [1, 2, 3, 1, 2, 3, 1, 2,", params)[0]
    with serving(llm) as server, client_of(server) as http:
        asked = {
            "prompt": "a = [1, 2, 3, 1, 2, 3, 1, 2,",
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = http.post(COMPLETIONS, json=asked).json()
        figures = metrics_of(http)
    assert answer["choices"][0]["text"] == own.text
    usage, expected = answer["usage"], own.stats.acceptance
    accepted, steps = usage["m27quant"]["accepted"], usage["m27quant"]["verify_steps"]
    assert steps == expected.num_steps
    assert [count / steps for count in accepted] == expected.c_k
    assert 1 + sum(accepted) / steps == expected.tau > 1
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == expected.num_accepted == sum(accepted)
    assert details["rejected_prediction_tokens"] == expected.num_drafted - expected.num_accepted
    assert figures["spec_decode_num_accepted_tokens_total"] == sum(accepted)
    assert figures["spec_decode_num_draft_tokens_total"] == expected.num_drafted
    position = 'spec_decode_num_accepted_tokens_per_pos_total{{position="{}"}}'
    assert [figures[position.format(k)] for k in range(len(accepted))] == accepted
    between = figures['inter_token_latency_seconds_bucket{le="+Inf"}']
    assert figures["generation_tokens_total"] == 60 == between + 1
    assert figures["time_to_first_token_seconds_count"] == 1
    assert figures['request_success_total{finished_reason="length"}'] == 1
    assert (
        figures["num_requests_running"]
        == figures["num_requests_waiting"]
        == figures["kv_cache_usage_perc"]
        == 0
    )
    assert figures['http_requests_total{path="/v1/completions",status="200"}'] == 1


def test_the_end_lets_answers_finish_and_refuses_new_ones(tiny: LLM) -> None:
    with serving(tiny) as server, client_of(server) as http:
        with http.stream("POST", COMPLETIONS, json=LONG | {"max_tokens": 150, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            server.stop()
            until(lambda: server.service.is_draining)
            refused = http.post(COMPLETIONS, json=SHORT)
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "shutting_down"
            assert http.get("/health").status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_it_ends_where_nobody_reads_what_it_says(tiny: LLM) -> None:
    def say(line: str) -> None:
        if "finishing" in line:
            raise BrokenPipeError

    server = Server(tiny, ServerOptions(port=0), "model", say=say)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server._uvicorn.started)
    server.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_signal_lets_answers_finish_and_ends_with_0(repository: Path) -> None:
    command = [
        sys.executable, "-m", "m27quant", "serve", "examples/tiny-m27", "--engine", "builtin", "--port", "0",
        "--no-verify",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=repository) as process:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "listening on http" in line)
        with (
            httpx.Client(base_url=address, timeout=60, trust_env=False) as http,
            http.stream("POST", COMPLETIONS, json=LONG | {"max_tokens": 100, "stream": True}) as running,
        ):
            lines = running.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0


def test_a_second_signal_ends_at_once(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(server_module.os, "_exit", codes.append)
    with serving(tiny) as server:
        server._signalled(signal.SIGTERM, None)
        assert not codes
        server._signalled(signal.SIGTERM, None)
        assert codes == [128 + signal.SIGTERM]


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(EnvironmentFault, match="cannot be bound"):
        server_module.serve("never/loaded", server=ServerOptions(port=port))
    for options in ({"port": 70000}, {"max_queue": -1}, {"api_key": " "}, {"request_timeout_s": 0}):
        with pytest.raises(UsageError):
            ServerOptions(**options)
    monkeypatch.setattr(server_module, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="fastapi and uvicorn") as missing:
        server_module.serve("never/loaded")
    assert missing.value.hint == "pip install 'm27quant[serve]'"
