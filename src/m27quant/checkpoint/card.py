"""README.md of the output: what the checkpoint is, how it was made, what its weights' licence asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render_card(report: Mapping[str, Any], *, base_model: str, is_hub_model: bool) -> str:
    """The model card from the quantization report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, and every string is escaped below
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["gb"] = lambda n: f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"
    environment.filters["sci"] = lambda x: f"{x:.3e}"
    template = environment.get_template("README.md.jinja")
    return template.render(report=report, base_model=base_model, is_hub_model=is_hub_model)


def escape_markdown(text: object) -> str:
    """Hostile text as one harmless line of Markdown."""
    line = "".join(c if c.isprintable() else "?" for c in str(text))[:200]
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+!|~$" else c for c in line)
