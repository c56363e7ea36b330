"""`push` and `pull` through the real huggingface_hub, against a Hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.hub_server import REPO, hub_server


def test_there_and_back(nvfp4: Path, m27quant: Any, tmp_path: Path) -> None:
    last = {"config.json", "model.safetensors.index.json"}
    with hub_server() as hub:
        env = {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret",
        }  # fmt: skip
        pushed = m27quant("push", str(nvfp4), REPO, "--no-verify", "--json", env=env)
        assert pushed.returncode == 0, pushed.stderr
        assert json.loads(pushed.stdout)["commit"] == hub.head
        *weights, finish = hub.commits
        assert set(finish) == last
        assert not any(last & set(names) for names in weights)
        out = tmp_path / "out"
        pulled = m27quant("pull", f"{REPO}@main", str(out), "-q", env=env)
        assert pulled.returncode == 0, pulled.stderr
        assert pulled.stdout.strip() == hub.head
    assert "hf_secret" not in pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr
    files = {p.name: p.read_bytes() for p in nvfp4.iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == files
    assert json.loads((out / ".m27quant/pull.json").read_text())["commit"] == hub.head
