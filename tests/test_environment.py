"""What `m27quant env` tells, and what it must not."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from pathlib import Path

import jsonschema
import pytest

from m27quant.environment import PACKAGES, anonymous, describe_environment
from tests.cli.conftest import Run, m27quant  # noqa: F401 - a fixture

SCHEMA = {
    "type": "object",
    "required": [
        "schema_version", "m27quant", "python", "system", "packages", "cpu", "memory", "limits", "devices",
        "kernels", "hub", "advice",
    ],
    "additionalProperties": False,
    "properties": {
        "schema_version": {"const": 1},
        "m27quant": {"type": "string"},
        "python": {"type": "string"},
        "system": {"type": "string"},
        "packages": {"required": list(PACKAGES), "additionalProperties": {"type": ["string", "null"]}},
        "cpu": {
            "type": "object",
            "required": ["model", "logical", "physical", "usable", "simd"],
            "properties": {"logical": {"minimum": 1}, "usable": {"minimum": 1}, "simd": {"type": "array"}},
        },
        "memory": {"type": "object", "required": ["total_bytes", "available_bytes"]},
        "limits": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
        "devices": {
            "type": "array",
            "items": {"required": ["device", "name", "memory_bytes", "compute_capability"]},
        },
        "kernels": {"type": "array", "items": {"required": ["op", "device", "backend", "reason"]}},
        "hub": {"type": "object", "required": ["HF_HOME", "HF_HUB_OFFLINE", "token"]},
        "advice": {"type": "array", "items": {"type": "string"}},
    },
}  # fmt: skip
TOKEN = "hf_" + "s3cr3t" * 5


def test_the_document_has_its_schema(m27quant: Run) -> None:  # noqa: F811
    process = m27quant("env", "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["packages"]["torch"]
    assert {kernel["op"] for kernel in document["kernels"]} >= {"fp8_dequant", "nvfp4_pack"}


def test_people_see_the_same_facts(m27quant: Run) -> None:  # noqa: F811
    process = m27quant("env")
    assert process.returncode == 0, process.stderr
    assert platform.python_version() in process.stdout
    for heading in ("versions", "machine", "hub", "devices", "kernels"):
        assert f"{heading}\n" in process.stdout


def test_no_token_and_no_host(m27quant: Run) -> None:  # noqa: F811
    process = m27quant("env", "--json", env={"HF_TOKEN": TOKEN})
    assert TOKEN not in process.stdout
    assert json.loads(process.stdout)["hub"]["token"] == "set"
    host = socket.gethostname()
    assert f'"{host}"' not in process.stdout


def test_no_user_name_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/ada")))
    assert anonymous("/home/ada") == "~"
    assert anonymous("/home/ada/.cache/hf") == "~/.cache/hf"
    assert anonymous("/home/adam/.cache") == "/home/adam/.cache"
    assert anonymous("/scratch/ada/hf") == "/scratch/<user>/hf"
    assert anonymous("/scratch/ada") == "/scratch/<user>"
    monkeypatch.setenv("HF_HOME", "/data/ada/hub")
    assert describe_environment().hub["HF_HOME"] == "/data/<user>/hub"


def test_a_forced_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M27QUANT_KERNELS", "reference")
    kernels = describe_environment().kernels
    assert {kernel["backend"] for kernel in kernels} == {"reference"}
    assert {kernel["reason"] for kernel in kernels} == {"M27QUANT_KERNELS=reference"}
