"""A launch as files for containers: compose.yaml for one machine, kubernetes.yaml for one node of a cluster.

Neither holds a secret: an API key comes from the environment (compose) or a Secret (Kubernetes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import yaml

from m27quant.errors import UsageError, escape
from m27quant.serve.flags import Choice, choose
from m27quant.serve.launch import KEY_VARIABLE, Launch

MODEL, DRAFTER = "/models/target", "/models/drafter"
"""Where the container finds them."""
CACHE = "/models/huggingface"
"""HF_HOME of the container, whoever it runs as; what it fetches from the Hub outlives it there."""
START_S, PROBE_S = 3600, 10
"""What loading 134 GB may take, from a slow disk and with kernels to compile; seconds between questions."""
SHARED_MEMORY = "32Gi"
SECRET = "m27quant"
"""Kubernetes' Secret that has the key."""
GRACE_S = 120


def compose_file(launch: Launch, image: str | None = None) -> str:
    """compose.yaml.

    Raises:
        UsageError: several machines serve.
    """
    _refuse_many(launch)
    s, key = launch.setup, f"${{{KEY_VARIABLE}:?set it to what clients have to send}}"
    port = str(s.port)
    service: dict[str, Any] = {
        "image": image or launch.engine.image,
        "entrypoint": list(_entrypoint(launch)),
        "command": [key if c is None else c.replace("$", "$$") for c in _arguments(launch)],
        "environment": dict(_environment(launch, key)),
        "ports": [f"{_published(s.host)}{port}:{port}"],
        "volumes": [
            {"type": "bind", "source": source.replace("$", "$$"), "target": target, "read_only": True}
            for source, target in _mounts(launch)
        ]
        + ([{"type": "volume", "source": "huggingface", "target": CACHE}] if _from_hub(launch) else []),
        "shm_size": SHARED_MEMORY.removesuffix("i").lower() + "b",
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": [{"driver": "nvidia", "count": _gpus(launch), "capabilities": ["gpu"]}]
                }
            }
        },
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _health_check(s.port)],
            "interval": f"{PROBE_S}s",
            "timeout": "5s",
            "retries": 6,
            "start_period": f"{START_S}s",
        },
        "stop_grace_period": f"{GRACE_S}s",
        "restart": "unless-stopped",
    }
    document: dict[str, Any] = {"services": {"m27": service}}
    if _from_hub(launch):
        document["volumes"] = {"huggingface": {}}
    return _header(launch, "docker compose up") + _dump([document])


def kubernetes_manifest(launch: Launch, image: str | None = None) -> str:
    """A Deployment and a Service.

    Raises:
        UsageError: several machines serve.
    """
    _refuse_many(launch)
    name = _name(launch)
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "m27quant"}
    port = launch.setup.port
    volumes: list[dict[str, Any]] = [
        {"name": f"model-{number}", "hostPath": {"path": source, "type": "Directory"}}
        for number, (source, _) in enumerate(_mounts(launch))
    ]
    mounts: list[dict[str, Any]] = [
        {"name": f"model-{number}", "mountPath": target, "readOnly": True}
        for number, (_, target) in enumerate(_mounts(launch))
    ]
    if _from_hub(launch):
        volumes.append({"name": "huggingface", "emptyDir": {}})
        mounts.append({"name": "huggingface", "mountPath": CACHE})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container: dict[str, Any] = {
        "name": launch.engine.name,
        "image": image or launch.engine.image,
        "command": list(_entrypoint(launch)),
        "args": [f"$({KEY_VARIABLE})" if c is None else c.replace("$(", "$$(") for c in _arguments(launch)],
        "env": [_variable(name, value) for name, value in _environment(launch, None)],
        "ports": [{"name": "http", "containerPort": port}],
        "resources": {"limits": {"nvidia.com/gpu": _gpus(launch)}},
        "startupProbe": _probe(failures=START_S // PROBE_S),
        "readinessProbe": _probe(failures=3),
        "livenessProbe": _probe(failures=6),
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # its GPUs are not there twice
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": GRACE_S,
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": port, "targetPort": "http"}]},
    }
    head = _header(launch, "kubectl apply -f kubernetes.yaml")
    if _mounts(launch):
        head += "# hostPath: the node has these folders; put a persistentVolumeClaim in their place where it has not.\n"
    if launch.setup.has_key:
        head += f"# The key: kubectl create secret generic {SECRET} --from-literal=api-key=...\n"
    return head + _dump([deployment, service])


# -- parts -----------------------------------------------------------------------------------------


def _refuse_many(launch: Launch) -> None:
    if launch.setup.nnodes > 1:
        raise UsageError(
            f"--compose is for one machine, and {launch.setup.nnodes} of {launch.setup.gpu.name} serve here",
            hint="take the commands with --print --node-rank 0, 1, ...",
        )
    if launch.setup.port == 0:
        raise UsageError("--port 0 is no port to publish", hint="name one")


def _from_hub(launch: Launch) -> bool:
    drafter = launch.setup.speculation
    return not launch.model.startswith("/") or (drafter is not None and not drafter.model.startswith("/"))


def _mounts(launch: Launch) -> list[tuple[str, str]]:
    """Folders of this machine, and where the container has them; what is on the Hub is none."""
    drafter = launch.setup.speculation
    pairs = [(launch.model, MODEL), *([(drafter.model, DRAFTER)] if drafter else [])]
    return [(source, target) for source, target in pairs if source.startswith("/")]


def _entrypoint(launch: Launch) -> Iterable[str]:
    return launch.engine.program[:2]


def _arguments(launch: Launch) -> list[str | None]:
    """Of the program; None stands for the API key."""
    moved = dict(_mounts(launch))
    # Within the container: all addresses, and not its path for a name.
    s = replace(launch.setup, host="0.0.0.0", served_name=launch.setup.served_name or _base(launch))
    if s.speculation is not None:
        drafter = moved.get(s.speculation.model, s.speculation.model)
        s = replace(s, speculation=replace(s.speculation, model=drafter))
    words: list[str | None] = [*launch.engine.program[2:], moved.get(launch.model, launch.model)]
    for choice in choose(s):
        words += [choice.flag.name, *_value(choice)]
    return words


def _value(choice: Choice) -> list[str | None]:
    if choice.variable is not None:
        return [None]
    return [] if choice.value is None else [choice.value]


def _environment(launch: Launch, key: str | None) -> Iterable[tuple[str, str | None]]:
    """Variables; the value of the key's is `key`."""
    yield from launch.environment.items()
    if launch.setup.has_key:
        yield launch.engine.key_variable or KEY_VARIABLE, key
    yield ("HF_HOME", CACHE) if _from_hub(launch) else ("HF_HUB_OFFLINE", "1")


def _variable(name: str, value: str | None) -> dict[str, Any]:
    if value is not None:
        return {"name": name, "value": value}
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": "api-key"}}}


def _gpus(launch: Launch) -> int:
    return max(launch.setup.tp, launch.setup.ep or 1)


def _published(host: str) -> str:
    """The address of this machine that the container's port appears at, in front of the port."""
    if host == "0.0.0.0":
        return ""
    return f"[{host}]:" if ":" in host else f"{'127.0.0.1' if host == 'localhost' else host}:"


def _health_check(port: int) -> str:
    return f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=4)"


def _probe(failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": PROBE_S,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _name(launch: Launch) -> str:
    """A DNS label from the served name or the model's."""
    wanted = launch.setup.served_name or _base(launch)
    name = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:50].strip("-")
    return name if name[:1].isalpha() else f"m27-{name}".rstrip("-")


def _base(launch: Launch) -> str:
    """The folder's name, or the Hub id as it is."""
    model = launch.model
    return (model.rstrip("/").rpartition("/")[2] or "model") if model.startswith("/") else model


def _header(launch: Launch, how: str) -> str:
    s = launch.setup
    return (
        f"# {launch.engine.shown} on {_gpus(launch)} x {s.gpu.name}, written by `m27quant serve --compose`.  {how}\n"
        f"# Why each flag: docs/serving.md of m27quant, or `m27quant serve --print`.\n"
        f"# Checked: {escape(launch.model)}\n"
    )


def _dump(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=False)


class _Dumper(yaml.SafeDumper):
    """Without anchors: a list that appears twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True
