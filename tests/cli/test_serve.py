"""`m27quant serve`: what stdout holds, what a shell makes of it, what is refused, and what is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from m27quant.cli import serve_builtin
from m27quant.cli.app import main

Call = Callable[..., tuple[int, str, str]]
B200 = ["--gpu", "b200", "--tp", "2"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def broken(nvfp4: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(nvfp4, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vllm and sglang that tell how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "sglang"):
        program = folder / name
        program.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\necho "key=$VLLM_API_KEY"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_stdout_is_the_command_alone(engine: str, nvfp4: Path, engines: Path, call: Call) -> None:
    code, out, err = call("serve", nvfp4, "--engine", engine, *B200, "--print")
    assert code == 0, err
    said = subprocess.run(["sh", "-c", out], capture_output=True, text=True, check=True).stdout.splitlines()
    assert str(nvfp4) in said
    assert "--tool-call-parser" in said
    told = {line.split()[0]: line for line in err.splitlines() if line.startswith("  --")}
    assert told.keys() == {word for word in said if word.startswith("--") and word != "--model-path"}
    assert all(len(line.split()) > 2 for line in told.values())
    code, quiet, err = call("serve", nvfp4, "--engine", engine, *B200, "--print", "-q")
    assert (code, quiet, err) == (0, out, "")
    document = json.loads(call("serve", nvfp4, "--engine", engine, *B200, "--print", "--json")[1])
    assert document["shell"] == out.rstrip("\n")
    assert document["flags"][0]["why"]


def test_the_key_never_stands_in_a_command(
    nvfp4: Path, engines: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M27QUANT_API_KEY", "geheim")
    for engine in ("vllm", "sglang"):
        for mode in ([], ["--json"]):
            code, out, err = call("serve", nvfp4, "--engine", engine, *B200, "--print", *mode)
            assert code == 0
            assert "geheim" not in out + err
    out = call("serve", nvfp4, "--engine", "vllm", *B200, "--print")[1]
    said = subprocess.run(["sh", "-c", out], capture_output=True, text=True, check=True).stdout
    assert said.endswith("key=geheim\n")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "builtin"])
def test_errors_are_named(engine: str, broken: Path, call: Call) -> None:
    gpus = [] if engine == "builtin" else B200
    for way in (["--print"], ["--print", "--quick"], []):
        code, out, err = call("serve", broken, "--engine", engine, *gpus, *way)
        assert (code, out) == (1, "")
        assert "not fit to be served: M27-E" in err
    code, out, err = call("serve", broken, "--engine", engine, "--print")  # no GPU here: this goes first
    assert (code, out) == (1, "")
    assert "M27-E" in err
    code, out, err = call("serve", broken, "--engine", engine, *gpus, "--print", "--json")
    assert (code, out) == (1, "")
    assert json.loads(err.splitlines()[-1])["error"]["exit_code"] == 1


def test_the_engine_takes_the_process_over(nvfp4: Path, engines: Path, m27quant: Any) -> None:
    done = m27quant(
        "serve",
        str(nvfp4),
        "--engine",
        "vllm",
        *B200,
        "--api-key",
        "geheim",
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"serve\n{nvfp4}\n--host\n127.0.0.1\n")
    assert done.stdout.endswith("key=geheim\n")


def test_an_engine_that_is_not_here(nvfp4: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = call("serve", nvfp4, "--engine", "sglang", *B200)
    assert (code, out) == (4, "")
    assert "pip install sglang==0.5.23" in err
    assert call("serve", nvfp4, "--engine", "vllm")[0] == 2  # and no GPU to be found


def test_another_version_is_said(
    nvfp4: Path, engines: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = engines / "python3"
    python.write_text("#!/bin/sh\necho 0.99.1\n")
    python.chmod(0o755)
    (engines / "vllm").write_text(f"#!{python}\n")
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    code, _, err = call("serve", nvfp4, "--engine", "vllm", *B200)
    assert code == 0
    assert "the flags are those of vllm 0.33.0; 0.99.1 is installed" in err
    ((program, argv, environment),) = started
    assert (program, argv[0]) == (str(engines / "vllm"), str(engines / "vllm"))
    assert environment["PATH"] == os.environ["PATH"]


def test_files_for_containers(nvfp4: Path, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "deploy" / "here"
    wanted = ["serve", nvfp4, "--engine", "vllm", *B200, "--compose", folder, "--api-key", "geheim"]
    code, out, err = call(*wanted)
    assert code == 0, err
    assert out.split() == [str(folder / "compose.yaml"), str(folder / "kubernetes.yaml")]
    for name in ("compose.yaml", "kubernetes.yaml"):
        text = (folder / name).read_text()
        assert "geheim" not in text
        assert list(yaml.safe_load_all(text))
    code, _, err = call(*wanted)
    assert code == 5
    assert "there already" in err
    assert call(*wanted, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "vllm", "--max-queue", "3"], "--max-queue is for --engine builtin"),
        (["--engine", "vllm", "--device", "cpu"], "--device is for --engine builtin"),
        (["--engine", "sglang", "--drafter", "ngram"], "--drafter is for --engine builtin"),
        (["--engine", "sglang", "--no-verify"], "--no-verify is for --engine builtin"),
        (["--engine", "vllm", "--image", "x"], "--image is for --compose"),
        (["--engine", "builtin", "--gpu", "b200"], "--gpu is for vLLM and SGLang"),
        (["--engine", "builtin", "--compose", "x"], "--compose is for vLLM and SGLang"),
        (["--engine", "vllm", "--num-steps", "3"], "options for a drafter, but no drafter"),
        (["--engine", "vllm", "--print", "--compose", "x"], "exclude each other"),
        (["--engine", "trt"], "none of vllm, sglang, builtin"),
        ([], "--engine"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], says: str, nvfp4: Path, call: Call) -> None:
    code, out, err = call("serve", nvfp4, *options)
    assert (code, out) == (2, "")
    assert says in err


def test_the_builtin_server_gets_what_was_asked(
    nvfp4: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m27quant.serve import server

    got: list[tuple[Any, ...]] = []
    monkeypatch.setattr(server, "serve", lambda *args, **options: got.append((args, options)))
    wanted = [
        "--engine",
        "builtin",
        "--port",
        "0",
        "--max-num-seqs",
        "4",
        "--max-queue",
        "7",
        "--device",
        "cpu",
    ]
    wanted += [
        "--api-key",
        "geheim",
        "--request-timeout",
        "2.5",
        "--no-chat-page",
        "--cors-origin",
        "*",
        "--fast",
    ]
    wanted += ["--drafter", "ngram", "--num-draft-tokens", "5"]
    code, out, err = call("serve", nvfp4, *wanted)
    assert (code, out) == (0, ""), err
    (((checkpoint, run, drafter, settings), options),) = got
    assert (checkpoint, drafter) == (str(nvfp4), "ngram")
    assert (run.max_num_seqs, run.device, run.invariant) == (4, "cpu", False)
    assert (settings.port, settings.api_key, settings.max_queue) == (0, "geheim", 7)
    assert (settings.request_timeout_s, settings.chat_page, settings.cors_origins) == (2.5, False, ("*",))
    assert options["drafter_options"].num_draft_tokens == 5
    assert options["check"] is False  # verify has run
    code, out, err = call("serve", nvfp4, *wanted, "--print")
    assert code == 0, err
    assert "geheim" not in out + err
    got.clear()
    monkeypatch.setenv("M27QUANT_API_KEY", "geheim")
    assert main(subprocess.run(["sh", "-c", f"m27quant() {{ printf '%s\\n' \"$@\"; }}\n{out}"],
                               capture_output=True, text=True, check=True).stdout.splitlines()) == 0  # fmt: skip
    (((_, run, drafter, again), _),) = got
    assert (run.max_num_seqs, run.device, run.invariant, again) == (4, "cpu", False, settings)


def test_sources_are_served_by_the_builtin_server_too(repository: Path, call: Call) -> None:
    code, out, err = call("serve", repository / "examples/tiny-m27", "--engine", "builtin", "--print")
    assert code == 0, err
    assert out.startswith("m27quant serve ")
    code, _, err = call("serve", repository / "examples/tiny-m27", "--engine", "vllm", *B200, "--print")
    assert code == 3
    assert "FP8 original" in err


def test_what_the_command_spells() -> None:
    """Each field has an option that the program knows."""
    from m27quant.cli.docs import contexts

    (context,) = [c for c in contexts() if c.command_path == "m27quant serve"]
    known = {name for p in context.command.params for name in (*p.opts, *p.secondary_opts)}
    assert set(serve_builtin.OPTIONS.values()) <= known


def test_a_source_that_lacks_a_tensor_is_not_served(repository: Path, tmp_path: Path, call: Call) -> None:
    folder = shutil.copytree(repository / "examples/tiny-m27", tmp_path / "source")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop("model.norm.weight")
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, err = call("serve", folder, "--engine", "builtin", "--print")
    assert (code, out) == (1, "")
    assert "model.norm.weight" in err
    assert call("serve", tmp_path / "nowhere", "--engine", "builtin", "--print")[0] == 3
