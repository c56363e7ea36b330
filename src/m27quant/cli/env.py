"""`m27quant env`: what is installed, what the machine offers, what will be used. Nothing that tells whose it is."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import options
from m27quant.cli.output import Output, grid, pairs
from m27quant.cli.units import format_size


def env(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show versions, hardware, limits and kernel backends, without names of users, hosts or tokens."""
    from m27quant.environment import describe_environment

    output = Output.open(json=json, quiet=quiet)
    facts = describe_environment()
    for advice in facts.advice:
        output.warning(advice)
    output.result(facts.document(), human=_render(facts.document()), quiet=facts.m27quant)


def _render(facts: dict[str, Any]) -> RenderableType:
    cpu, memory = facts["cpu"], facts["memory"]
    sections: dict[str, dict[str, Any]] = {
        "versions": {"m27quant": facts["m27quant"], "python": facts["python"], **facts["packages"]},
        "machine": {
            "system": facts["system"],
            "cpu": cpu["model"],
            "cores": f"{cpu['usable']} usable of {cpu['logical']} ({cpu['physical'] or 'unknown'} physical)",
            "simd": cpu["simd"],
            "memory": f"{format_size(memory['available_bytes'])} available of {format_size(memory['total_bytes'])}",
            **{f"limit {name}": _limit(name, value) for name, value in facts["limits"].items()},
        },
        "hub": facts["hub"],
    }
    parts: list[RenderableType] = []
    for title, values in sections.items():
        parts += [
            Text(title, style="bold"),
            pairs({k: "none" if v is None else v for k, v in values.items()}),
        ]
        parts.append("")
    parts.append(Text("devices", style="bold"))
    if facts["devices"]:
        parts.append(
            grid(
                ("device", "name", "memory", "compute capability"),
                [
                    (d["device"], d["name"], format_size(d["memory_bytes"]), d["compute_capability"])
                    for d in facts["devices"]
                ],
            )
        )
    else:
        parts.append(Text("cpu only"))
    if facts["kernels"]:
        parts += ["", Text("kernels", style="bold")]
        rows = [(k["op"], k["device"], k["backend"], k["reason"]) for k in facts["kernels"]]
        parts.append(grid(("op", "device", "backend", "why"), rows))
    return Group(*parts)


def _limit(name: str, value: int | float | None) -> str:
    if value is None:
        return "none"
    return format_size(value) if name.endswith("_bytes") else str(value)
