"""Results as aligned lines for a terminal and as a short markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Lines = Sequence[tuple[str, str]]


def table(title: str, lines: Lines) -> str:
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines), ""])


def markdown(results: Mapping[str, Any], sections: Mapping[str, Lines]) -> str:
    m = results["machine"]
    devices = ", ".join(d["name"] for d in m["devices"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    page = [
        f"# Quantizing at full width, {results['date']}, on {results['device']}",
        "",
        f"{m['cpu']['model']}, {m['cpu']['usable']} cores, {m['threads']} threads, "
        f"{m['memory_bytes'] / 2**30:.0f} GiB; "
        f"{devices}; {m['system']}, {m['python']}; {versions}. Load before: {m['load_before']}.",
        "",
        f"Synthetic model: {results['model']['layers']} layers of {results['model']['experts']} experts, "
        f"{results['model']['bytes'] / 1e9:.2f} GB.",
    ]
    for title, lines in sections.items():
        page += [
            "",
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in lines),
        ]
    return "\n".join(page) + "\n"
