"""`m27quant env`: what is installed, what the machine offers, what will be used, but not whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli import options
from m27quant.cli.output import Output, grid, pairs
from m27quant.cli.units import format_size

if TYPE_CHECKING:
    from m27quant.environment import Environment


def env(
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    no_progress: options.NoProgress = False,
) -> None:
    """Show versions, hardware, limits and kernel backends, without names of users, hosts or tokens."""
    from m27quant.environment import describe_environment

    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    facts = describe_environment()
    for advice in facts.advice:
        output.warning(advice)
    output.result(facts.document(), human=_render(facts), quiet=facts.m27quant)


def _render(facts: Environment) -> RenderableType:
    cpu, memory = facts.cpu, facts.memory
    available, total = (format_size(memory[f"{name}_bytes"]) for name in ("available", "total"))
    physical = cpu["physical"] or "unknown"
    machine = {
        "system": facts.system,
        "cpu": cpu["model"],
        "cores": f"{cpu['usable']} usable of {cpu['logical']} ({physical} physical)",
        "simd": cpu["simd"],
        "memory": f"{available} available of {total}",
    }
    limits = {
        f"limit on {name.removesuffix('_bytes')}".replace("_", " "): _limit(name, v)
        for name, v in facts.limits.items()
    }
    devices = [(d.device, d.name, format_size(d.memory_bytes), d.compute_capability) for d in facts.devices]
    kernels = [(k["op"], k["device"], k["backend"], k["reason"]) for k in facts.kernels]
    versions = {"m27quant": facts.m27quant, "python": facts.python, **facts.packages}
    sections: dict[str, RenderableType] = {
        "versions": pairs(_with_none(versions)),
        "machine": pairs(machine | limits),
        "hub": pairs(_with_none(facts.hub)),
        "devices": grid(("device", "name", "memory", "compute capability"), devices) if devices else "none",
        "kernels": grid(("op", "device", "backend", "why"), kernels) if kernels else "none",
    }
    return Group(*(Group(Text(title, style="bold"), body, "") for title, body in sections.items()))


def _with_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "none" if value is None else value for name, value in values.items()}


def _limit(name: str, value: int | float | None) -> str:
    if value is None:
        return "none"
    return format_size(value) if name.endswith("_bytes") else str(value)
