"""`m27quant push` and `m27quant pull` against a Hub in memory: what goes, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from m27quant.cli.app import main
from tests.fake_hub import FakeHub

Call = Callable[..., tuple[int, str, str]]
REPO = "org/M2.7-NVFP4"
LAST = {"config.json", "model.safetensors.index.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    hub.install(monkeypatch)
    return hub


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*args: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def copy(nvfp4: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(nvfp4, tmp_path / "copy")


def break_it(folder: Path) -> None:
    """A config that engines would misread."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))


def http_error(status: int) -> Exception:
    fault = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    Exception.__init__(fault, f"{status} of the Hub")
    fault.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return fault


# -- push ------------------------------------------------------------------------------------------


def test_a_dry_run_tells_all_and_asks_the_hub_nothing(nvfp4: Path, hub: FakeHub, call: Call) -> None:
    code, out, err = call("push", nvfp4, REPO, "--dry-run", "--json", "--offline", "--token", "hf_secret")
    assert code == 0, err
    told = json.loads(out)
    expected = {p.name: p for p in nvfp4.iterdir() if p.is_file()}
    assert {f["name"] for f in told["files"]} == expected.keys()
    for file in told["files"]:
        data = expected[file["name"]].read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert told["left_out"].keys() == {".m27quant"} & {p.name for p in nvfp4.iterdir()}
    assert told["verified"] == "default"
    assert told["commit"] is None
    assert hub.calls == []
    assert "hf_secret" not in out + err


def test_what_makes_it_a_checkpoint_lands_last(nvfp4: Path, hub: FakeHub, call: Call) -> None:
    code, out, err = call("push", nvfp4, REPO, "--private", "--no-verify", "--json", "--token", "hf_secret")
    assert code == 0, err
    assert "nobody has checked" in err
    assert hub.private[REPO] is True
    *before, (_, whole) = [names for _, names in enumerate(hub.snapshots)]
    assert not any(LAST & set(names) for _, names in before)
    assert set(whole) >= LAST | {"README.md", "tokenizer.json"}
    assert ".m27quant" not in str(whole)
    assert json.loads(out)["commit"] == hub.heads[REPO, "main"]
    assert hub.tokens == ["hf_secret"]
    assert "hf_secret" not in out + err


def test_a_pull_request_and_a_branch(nvfp4: Path, hub: FakeHub, call: Call) -> None:
    hub.commit(REPO, "main", {".gitattributes": b""})
    code, out, err = call("push", nvfp4, REPO, "--no-verify", "--create-pr", "--json")
    assert code == 0, err
    assert json.loads(out)["pull_request"].endswith("/discussions/1")
    assert set(hub.branches[REPO]["refs/pr/1"]) >= LAST
    assert set(hub.branches[REPO]["main"]) == {".gitattributes"}
    assert (
        call("push", nvfp4, REPO, "--no-verify", "--branch", "v1", "-q")[1].strip() == hub.heads[REPO, "v1"]
    )


@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_errors_are_named_and_nothing_goes(copy: Path, flags: list[str], hub: FakeHub, call: Call) -> None:
    break_it(copy)
    code, out, err = call("push", copy, REPO, *flags)
    assert (code, out) == (1, "")
    assert "not fit to be pushed: M27-E" in err
    assert hub.calls == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (".env", "x", "no part of a checkpoint: .env"),
        ("optimizer.pt", "x", "optimizer.pt"),
        ("sub/README.md", "x", "no part of a checkpoint: sub"),
        ("model-extra.safetensors", "x", "model-extra.safetensors"),
        ("tokenizer_config.json", '{"token": "hf_' + "a1" * 17 + '"}', "looks like a Hub token, in line 1"),
        ("chat_template.jinja", "x\n-----BEGIN RSA PRIVATE KEY-----", "looks like a private key, in line 2"),
        ("LICENSE", "AKIA" + "ABCD1234" * 2, "looks like an AWS key"),
        ("README.md", "---\nbase_model: org/x\n---\n[a](gone.png)", "'gone.png' leads to nothing"),
        ("README.md", "---\nbase_model: org/x\n---\n[a](https://nowhere)", "'https://nowhere' names no host"),
        ("README.md", "---\nbase_model: ../x\n---\n", "base_model '../x' is no Hub id"),
        ("README.md", "---\n: [\n---\n", "front matter is no YAML"),
        ("README.md", "# hello", "no front matter"),
    ],
)
def test_strangers_secrets_and_cards(
    name: str, text: str, says: str, copy: Path, hub: FakeHub, call: Call
) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(text)
    code, out, err = call("push", copy, REPO, "--no-verify", "--dry-run")
    assert (code, out) == (1, "")
    assert says in err
    assert "a1a1a1" not in err
    assert "hint: " in err


def test_no_card_and_a_link_outwards(copy: Path, hub: FakeHub, call: Call) -> None:
    card = copy / "README.md"
    text = card.read_text()
    card.unlink()
    assert "no model card" in call("push", copy, REPO, "--no-verify", "--dry-run")[2]
    outside = copy.parent / "other.md"
    outside.write_text(text)
    card.symlink_to(outside)
    code, _, err = call("push", copy, REPO, "--no-verify", "--dry-run")
    assert code == 3
    assert "a link that leaves the folder" in err


def test_a_repository_that_is_not_ours(nvfp4: Path, hub: FakeHub, call: Call) -> None:
    hub.commit(REPO, "main", {"model-00001-of-00002.safetensors": b""})
    code, _, err = call("push", nvfp4, REPO, "--no-verify")
    assert code == 5
    assert "holds 1 weight files that are not this checkpoint's" in err
    code, _, err = call("push", nvfp4, REPO, "--no-verify", "--private")
    assert code == 5
    assert "the repository is public" in err
    assert "upload_folder" not in hub.calls


@pytest.mark.parametrize(
    ("status", "says"), [(403, "refuses to be written to"), (412, "has committed while")]
)
def test_a_hub_that_refuses(status: int, says: str, nvfp4: Path, hub: FakeHub, call: Call) -> None:
    def fault(name: str) -> None:
        if name == "create_commit":
            raise http_error(status)

    hub.fault = fault
    code, _, err = call("push", nvfp4, REPO, "--no-verify")
    assert code == 4
    assert says in err
    assert not LAST & set(hub.branches[REPO]["main"])
    hub.fault = lambda name: None
    assert call("push", nvfp4, REPO, "--no-verify")[0] == 0  # and goes on
    assert set(hub.branches[REPO]["main"]) >= LAST


@pytest.mark.parametrize(
    "args", [["x"], ["org/name/x"], ["org/name", "--offline"], ["a/b", "--full", "--no-verify"]]
)
def test_wrong_usage(args: list[str], nvfp4: Path, hub: FakeHub, call: Call) -> None:
    if "--full" not in args:
        args = [*args, "--no-verify"]
    assert call("push", nvfp4, *args)[0] == 2
    assert hub.calls == []


# -- pull ------------------------------------------------------------------------------------------


@pytest.fixture
def published(nvfp4: Path, hub: FakeHub) -> str:
    """The commit of a repository that holds the checkpoint and more."""
    files = {p.name: p.read_bytes() for p in nvfp4.iterdir() if p.is_file()}
    return hub.commit(REPO, "main", files | {"demo.png": b"png", "weights.bin": b"pickle"})


def test_there_and_back(nvfp4: Path, published: str, hub: FakeHub, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = call("pull", REPO, out, "--json", "--token", "hf_secret")
    assert code == 0, err
    assert json.loads(said)["commit"] == published
    assert "hf_secret" not in said + err
    for path in nvfp4.iterdir():
        if path.is_file():
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert not (out / "weights.bin").exists()
    record = json.loads((out / ".m27quant/pull.json").read_text())
    assert (record["repo_id"], record["commit"], record["finished"]) == (REPO, published, True)
    assert [p.name for p in (out / ".m27quant").iterdir()] == ["pull.json"]
    assert call("push", out, "org/again", "--dry-run", "--no-verify")[0] == 0
    code, _, err = call("pull", REPO, out)
    assert code == 5
    assert "there already" in err


def test_a_faulty_one_is_put_in_no_place(published: str, hub: FakeHub, call: Call, tmp_path: Path) -> None:
    config = json.loads(hub.branches[REPO]["main"]["config.json"])
    config["quantization_config"]["ignore"] = []
    hub.commit(REPO, "main", {"config.json": json.dumps(config).encode()})
    out = tmp_path / "out"
    code, said, err = call("pull", REPO, out)
    assert (code, said) == (1, "")
    assert f"{REPO}@{hub.heads[REPO, 'main']}: not fit to be used" in err
    assert "M27-E" in err
    assert not [p for p in out.rglob("*") if p.name in LAST]
    code, _, err = call("pull", REPO, out, "--no-verify")
    assert code == 0
    assert "nobody has checked" in err
    assert (out / "config.json").exists()


@pytest.mark.parametrize("at", ["model-00003-of-00010.safetensors", "config.json"])
def test_a_pull_that_was_cut_short_goes_on(
    at: str, published: str, hub: FakeHub, call: Call, tmp_path: Path
) -> None:
    def fault(name: str) -> None:
        if name == at:
            raise ConnectionResetError(104, "Connection reset by peer")

    hub.fault = fault
    out = tmp_path / "out"
    assert call("pull", REPO, out)[0] == 4
    assert not any((out / name).exists() for name in LAST)
    hub.fault = lambda name: None
    newer = hub.commit(REPO, "main", {})
    code, _, err = call("pull", REPO, out)
    assert code == 5
    assert f"an unfinished pull of {REPO} at {published}" in err
    hub.heads[REPO, "main"] = published
    assert newer != published
    assert call("pull", REPO, out)[0] == 0
    assert call("verify", out, "--quick")[0] == 0


def test_one_that_died_while_it_moved_files(
    published: str, hub: FakeHub, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m27quant import pull

    moved = []

    def die(source: Path, target: Path) -> None:
        if len(moved) == 5:
            raise KeyboardInterrupt
        moved.append(target.name)
        source.rename(target)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pull, "move_durably", die)
        assert call("pull", REPO, out)[0] == 130
    assert not LAST & {p.name for p in out.iterdir()}
    assert call("pull", REPO, out)[0] == 0
    assert call("verify", out, "--quick")[0] == 0


def test_what_arrives_is_what_the_hub_says(published: str, hub: FakeHub, call: Call, tmp_path: Path) -> None:
    hub.lies = True
    code, _, err = call("pull", REPO, tmp_path / "out")
    assert code == 3
    assert "bytes arrived, the Hub says" in err
    assert not (tmp_path / "out/config.json").exists()


def test_folders_of_somebody_else(published: str, hub: FakeHub, call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    assert call("pull", REPO, tmp_path / "out")[0] == 5
    (tmp_path / "file").write_text("x")
    assert call("pull", REPO, tmp_path / "file")[0] == 5
    assert call("pull", "not-an-id", tmp_path / "new")[0] == 2
    assert call("pull", f"{REPO}@a", tmp_path / "new", "--revision", "b")[0] == 2
    assert not (tmp_path / "new").exists()
    hub.commit("org/empty", "main", {"README.md": b"x"})
    code, _, err = call("pull", "org/empty", tmp_path / "new")
    assert code == 3
    assert "holds no checkpoint" in err


def test_offline_takes_what_the_cache_has(call: Call, tmp_path: Path) -> None:
    code, _, err = call("pull", REPO, tmp_path / "out", "--offline")
    assert code == 4
    assert "not in the local cache" in err
    assert not (tmp_path / "out").exists()
