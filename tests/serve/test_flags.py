"""The flags as data: known to the pinned engines, used, and documented."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from m27quant.serve.book import serving
from m27quant.serve.engines_data import GPUS_PER_NODE, V2_RUNNER, VERSIONS
from m27quant.verify.engines_data import ATTENTION, BACKENDS, GPUS
from tests.serve.check_flags import FOUND, unknown_flags

OPTIONS: dict[str, Any] = json.loads(FOUND.read_text())
GOLDEN = "".join(path.read_text() for path in sorted(Path(__file__).with_name("golden").glob("*.txt")))


@pytest.mark.parametrize("engine", VERSIONS.values(), ids=VERSIONS)
def test_the_pinned_engines_know_every_flag(engine: Any) -> None:
    found = OPTIONS[engine.name]
    assert found["version"] == engine.version, "run `python -m tests.serve.check_flags`"
    assert found["program"]
    assert unknown_flags(engine, found) == []


@pytest.mark.parametrize("engine", VERSIONS.values(), ids=VERSIONS)
def test_a_flag_that_is_gone_would_be_told(engine: Any) -> None:
    tools = dataclasses.replace(engine.flags["tools"], name="--calculate-kv-scales")
    backend = dataclasses.replace(engine.flags["moe.marlin"], values=("flashinfer_nothing",))
    changed = dataclasses.replace(engine, flags=engine.flags | {"tools": tools, "moe.marlin": backend})
    unknown = unknown_flags(changed, OPTIONS[engine.name])
    assert "--calculate-kv-scales" in unknown
    assert f"{backend.name} flashinfer_nothing" in unknown


def test_what_the_speculative_config_says_is_known() -> None:
    found = OPTIONS["vllm"]
    configs = [json.loads(text) for text in re.findall(r"--speculative-config '({.*?})'", GOLDEN)]
    assert configs
    for config in configs:
        assert config.keys() <= set(found["speculative_config"])
        assert config["method"] in found["choices"]["speculative method"]
        assert config.get("attention_backend", "FLASH_ATTN") in found["choices"]["--attention-backend"]
        assert config.get("kv_cache_dtype", "auto") in found["choices"]["--kv-cache-dtype"]
    assert {V2_RUNNER[0], VERSIONS["vllm"].key_variable} <= set(found["environment"])


def test_every_backend_has_a_reason() -> None:
    """What verify's tables pick, the flags can say."""
    for name, engine in VERSIONS.items():
        for backend in BACKENDS[name]:
            assert f"moe.{backend.name}" in engine.flags
        for attention in ATTENTION[name].values():
            assert f"attention.{attention}" in engine.flags
    assert GPUS_PER_NODE.keys() <= GPUS.keys()


def test_reasons_are_sentences_of_their_own() -> None:
    for engine in VERSIONS.values():
        for flag in engine.flags.values():
            assert flag.name.startswith("--")
            assert flag.why
            assert flag.when
            assert not flag.why.endswith(".")


def test_the_written_flags_are_up_to_date(repository: Path) -> None:
    written = (repository / "docs/serving.md").read_text(encoding="utf-8")
    assert written == serving(), "run `make docs`"
    for engine in VERSIONS.values():
        for flag in engine.flags.values():
            assert f"| `{' '.join([flag.name, *flag.values])}` |" in written
