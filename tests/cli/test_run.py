"""`m27quant run`: prompts in every form, answers in every mode, files, chats, refusals."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from m27quant.cli.app import main
from tests.cli.conftest import PROGRAM

TINY = Path(__file__).parents[2] / "examples" / "tiny-m27"
SHORT = ("--max-tokens", "8", "--temperature", "0")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def run(*args: str) -> int:
    return main(["run", str(TINY), *args])


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert run(*args, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_prompt_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--prompt", "import os\nimport ", *SHORT)
    assert found["schema_version"] == 1
    assert found["finish_reason"] in ("stop", "length")
    assert found["usage"]["completion_tokens"] == len(found["token_ids"]) <= 8
    assert (found["tau"], found["m_accept"], found["c_k"]) == (1.0, 0.0, [])
    assert found["memory"]["weight_bytes"] > 0
    assert run("--prompt", "import os\nimport ", *SHORT) == 0
    human = capsys.readouterr()
    assert human.out == found["text"] + "\n"
    assert "memory on cpu" in human.err
    assert run("--prompt", "import os\nimport ", *SHORT, "-q") == 0
    assert capsys.readouterr() == (found["text"] + "\n", "")


def test_a_prompt_is_read_from_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = document(capsys, "--prompt", "import os\n", *SHORT)["text"]
    for arguments in (("--prompt", "-"), ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
        assert document(capsys, *arguments, *SHORT)["text"] == wanted


def test_a_seed_repeats_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "def f", "--max-tokens", "12", "--temperature", "1.0")
    texts = [document(capsys, *arguments, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_drafter_changes_nothing_but_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("--prompt", "a = 1\nb = 2\nc = 3\na = 1\nb = 2\n", "--max-tokens", "24", "--temperature", "0")
    plain = document(capsys, *prompt)
    drafted = document(capsys, *prompt, "--drafter", "ngram", "--num-draft-tokens", "4", "--check-lossless")
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["stats"]["num_drafted"] > 0
    assert drafted["tau"] == pytest.approx(1 + drafted["m_accept"]) == pytest.approx(1 + sum(drafted["c_k"]))
    assert drafted["comparison"]["is_lossless"] is True
    assert drafted["comparison"]["tokens_per_s_without_drafter"] > 0


def test_stats_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "x = 1\nx = 1\n", *SHORT, "--drafter", "ngram", "--stats") == 0
    said = capsys.readouterr()
    for word in ("tau", "C_k", "conditional", "first token after", "with and without drafter", "KV cache"):
        assert word in said.err
        assert word not in said.out


def test_messages_are_answered_in_the_chat_template(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Write a loop."}], "tools": []}))
    found = document(capsys, "--messages", str(path), *SHORT, "--no-thinking")
    assert found["message"]["role"] == "assistant"
    assert "reasoning_content" not in found["message"]
    thought = document(capsys, "--prompt", "Write a loop.", "--chat", *SHORT)
    assert thought["message"]["content"] == ""
    assert [p["message"] for p in thought["message"]["problems"]] == ["the thoughts were not closed"]
    other = document(capsys, "--prompt", "Write a loop.", "--system-prompt", "Be brief.", *SHORT)
    assert other["usage"]["prompt_tokens"] != thought["usage"]["prompt_tokens"]


def test_sampling_and_logprobs(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--prompt", "import ", *SHORT, "--logprobs", "2", "--stop", "\n")
    assert all(len(entry["top"]) == 2 for entry in found["logprobs"])
    assert "\n" not in found["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompt", "a", "--messages", "m.json"), 2, "exclude each other"),
        (("--prompt", "a", "--check-lossless"), 2, "--drafter"),
        (("--prompt", "a", "--num-steps", "2"), 2, "no drafter"),
        (("--input", "x.jsonl"), 2, "go together"),
        (("--prompt", "a", "--resume"), 2, "--output"),
        (("--prompt", "a", "--temperature", "-1"), 2, "temperature"),
        (("--prompt", "a", "--top-p", "0"), 2, "top_p"),
        (("--prompt", "a", "--activations", "int8"), 2, "activations"),
        (("--prompt", "a", "--drafter", "ngram", "--drafter-tap-offset", "2"), 2, "auto, 0 or 1"),
        (("--prompt", "a", "--drafter", "ngram", "--eagle-topk", "2"), 2, "eagle_topk"),
        (("--prompt", "a", "--no-thinking"), 2, "--chat"),
        (("--prompt", ""), 2, "prompt is empty"),
        (("--prompt", "a " * 3000), 2, "tokens; with an answer at most"),
        (("--messages", "no-such.json"), 3, "no-such.json"),
        (("--prompt", "a", "--drafter", "./no-such"), 3, "no-such"),
        (("--prompt", "a", "--device", "cuda:7"), 4, "cuda:7"),
        (("--prompt", "a", "--max-memory", "1MiB"), 4, "memory"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    assert said in capsys.readouterr().err


def test_nothing_to_answer_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run() == 2
    assert "nothing to answer" in capsys.readouterr().err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_many_prompts_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"prompt": "import os\n"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": ""},
        {"prompt": "def f(x):\n"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--input", str(source), "--output", str(target), *SHORT, "--json") == 1  # one has no answer
    said = capsys.readouterr()
    assert json.loads(said.out)["failed"] == 1
    assert "1 of 4 rows" in said.err
    found = lines(target)
    assert [set(row) - {"message", "error"} for row in found] == [
        {"text", "token_ids", "finish_reason", "usage"}
    ] * 4
    assert found[2]["finish_reason"] == "error"
    assert found[0]["text"] == document(capsys, "--prompt", "import os\n", *SHORT)["text"]
    assert found[1]["message"]["role"] == "assistant"
    assert run("--input", str(source), "--output", str(target), *SHORT) == 5
    assert "--overwrite" in capsys.readouterr().err


def test_a_row_that_is_none_is_named_before_anything_is_answered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"messages": [{"role": "robot", "content": "x"}]}\n')
    assert run("--input", str(source), "--output", str(target), *SHORT) == 2
    assert "line 2" in capsys.readouterr().err
    assert not target.exists()


def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"def f{n}(x):\n"}) + "\n" for n in range(6)))
    settings = ("--max-tokens", "24", "--temperature", "1", "--max-num-seqs", "2", "--no-progress")

    def command(target: Path, *more: str) -> list[str]:
        return [
            str(PROGRAM),
            "run",
            str(TINY),
            "--input",
            str(source),
            "--output",
            str(target),
            *settings,
            *more,
        ]

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=120)
    partial = Path(f"{killed}.partial")
    with subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (partial.exists() and b'"answer"' in partial.read_bytes()) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if not killed.exists():  # it may have been quicker
        assert subprocess.run(command(killed), capture_output=True, timeout=120).returncode == 5
        subprocess.run(command(killed, "--resume"), check=True, capture_output=True, timeout=120)
    assert killed.read_bytes() == whole.read_bytes()
    assert not partial.exists()


class Shell:
    """The program on a terminal."""

    def __init__(self, *args: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [PROGRAM, "run", TINY, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text: str, timeout_s: float = 60) -> str:
        """What comes up to and with `text`."""
        deadline, before = time.monotonic() + timeout_s, len(self.seen)
        while text not in self.seen[before:]:
            assert time.monotonic() < deadline, self.seen
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                break
        return self.seen[before:]

    def say(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            os.close(self.master)


def test_a_chat_on_a_terminal() -> None:
    shell = Shell("--temperature", "0", "--max-tokens", "200", "--no-thinking", "--ignore-eos")
    shell.until(">>> ")
    shell.say("/stats\n")
    assert "nothing was answered yet" in shell.until(">>> ")
    shell.say("/nonsense\n")
    assert "no command" in shell.until(">>> ")
    shell.say("Write\\\n")
    shell.until("... ")
    shell.say("a loop\n")
    time.sleep(0.3)
    shell.say("\x03")  # stops the answer, not the chat
    shell.until(">>> ")
    shell.say("/reset\n")
    assert "a new chat" in shell.until(">>> ")
    shell.say("\x04")
    assert shell.close() == 0
