"""compose.yaml and kubernetes.yaml: YAML that loads, paths of the container, and no secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from m27quant.errors import UsageError
from m27quant.serve.compose import DRAFTER, MODEL, compose_file, kubernetes_manifest
from m27quant.serve.launch import LaunchOptions, plan_launch
from tests.serve.test_golden import quickly


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m27quant.serve.launch.verify_checkpoint", quickly)


def launch(model: Path, **options: Any) -> Any:
    return plan_launch(model, LaunchOptions(**{"engine": "vllm", "gpu": "h200", "tp": 2} | options))


def test_compose(m27: Path) -> None:
    planned = launch(m27, drafter=str(m27.parent / "dflash"), has_key=True, host="127.0.0.1", port=9000)
    document = yaml.safe_load(compose_file(planned))
    (service,) = document["services"].values()
    assert service["image"] == "vllm/vllm-openai:v0.33.0"
    assert service["entrypoint"] == ["vllm", "serve"]
    command = service["command"]
    assert command[0] == MODEL
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[command.index("--served-model-name") + 1] == "m27"
    assert f'"model":"{DRAFTER}"' in command[command.index("--speculative-config") + 1]
    assert service["ports"] == ["127.0.0.1:9000:9000"]
    assert [(v["source"], v["target"], v["read_only"]) for v in service["volumes"]] == [
        (str(m27), MODEL, True), (str(m27.parent / "dflash"), DRAFTER, True),
    ]  # fmt: skip
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (2, ["gpu"])
    assert "/health" in service["healthcheck"]["test"][-1]
    assert service["environment"]["VLLM_API_KEY"].startswith("${M27QUANT_API_KEY:?")
    assert str(m27) not in " ".join(command)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_kubernetes(engine: str, m27: Path) -> None:
    planned = launch(m27, engine=engine, drafter=str(m27.parent / "eagle3"), has_key=True)
    deployment, service = yaml.safe_load_all(kubernetes_manifest(planned, image="registry/own:1"))
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "registry/own:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    variable = "VLLM_API_KEY" if engine == "vllm" else "M27QUANT_API_KEY"
    env = {entry["name"]: entry for entry in container["env"]}
    assert env[variable]["valueFrom"]["secretKeyRef"] == {"name": "m27quant", "key": "api-key"}
    if engine == "sglang":
        assert container["args"][container["args"].index("--api-key") + 1] == "$(M27QUANT_API_KEY)"
        assert DRAFTER in container["args"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in spec["volumes"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_what_the_hub_gives_is_kept(m27: Path) -> None:
    planned = launch(m27)
    planned = replace(planned, model="org/name")
    (service,) = yaml.safe_load(compose_file(planned))["services"].values()
    assert [(v["type"], v["target"]) for v in service["volumes"]] == [
        ("volume", service["environment"]["HF_HOME"])
    ]
    deployment, *_ = [
        d for d in yaml.safe_load_all(kubernetes_manifest(planned)) if d["kind"] == "Deployment"
    ]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["HF_HOME"] in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_strange_names(m27: Path, tmp_path: Path) -> None:
    """What YAML, compose and Kubernetes would each take for something of their own."""
    model = tmp_path / "- a: ${HOME} $(X) #1"
    model.symlink_to(m27)
    planned = launch(model)
    service = yaml.safe_load(compose_file(planned))["services"]["m27"]
    assert service["volumes"][0]["source"] == str(model).replace("$", "$$")
    assert "- a: $${HOME} $$(X) #1" in service["command"]
    deployment, _ = yaml.safe_load_all(kubernetes_manifest(planned))
    spec = deployment["spec"]["template"]["spec"]
    assert spec["volumes"][0]["hostPath"]["path"] == str(model)
    assert "- a: ${HOME} $$(X) #1" in spec["containers"][0]["args"]
    assert deployment["metadata"]["name"] == "a-home-x-1"


def test_one_machine_alone(m27: Path) -> None:
    with pytest.raises(UsageError, match="for one machine, and 2 of gb10"):
        compose_file(launch(m27, gpu="gb10"))
    with pytest.raises(UsageError, match="--port 0"):
        kubernetes_manifest(launch(m27, port=0))
