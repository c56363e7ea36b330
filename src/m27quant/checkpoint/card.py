"""README.md of the output: what the checkpoint is, how it was made, what its weights' licence asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
MAX_FRONT_MATTER = 64 * 2**10


def render_card(
    report: Mapping[str, Any], *, base_model: str, is_hub_model: bool, licence: Mapping[str, str]
) -> str:
    """The model card from the quantization report; `licence` is the source's, see `licence_of`."""
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
    return template.render(
        report=report,
        base_model=base_model,
        is_hub_model=is_hub_model,
        licence=licence,
        licence_name=licence.get("license_name") or licence.get("license"),
    )


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of the source's model card says: `license`, `license_name`, `license_link`."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FRONT_MATTER).decode("utf-8", "replace")
    except OSError:
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.findall(
        r"^(license(?:_name|_link)?):[ \t]*([\w./:-]+)[ \t]*$", front[1] if front else "", re.M
    )
    return dict(found)


def with_section(card: str, name: str, heading: str, section: str) -> str:
    """`card` with `section` (Markdown) in the place of an earlier one of this name.

    A card that has no such place gets one, under `heading`, before the licence, or at its end.
    """
    begin, end = f"<!-- m27quant:{name} -->", f"<!-- /m27quant:{name} -->"
    marked = f"{begin}\n{section.strip()}\n{end}"
    found = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if found.search(card):
        return found.sub(lambda _: marked, card, count=1)
    whole = f"## {heading}\n\n{marked}\n"
    if licence := re.search(r"^## Licence$", card, re.M):
        return f"{card[: licence.start()]}{whole}\n{card[licence.start() :]}"
    return f"{card.rstrip()}\n\n{whole}"


def escape_markdown(text: object) -> str:
    """Hostile text as one harmless line of Markdown."""
    line = "".join(c if c.isprintable() else "?" for c in str(text))[:200]
    return "".join("\\" + c if c in "\\`*_{}[]<>()#+!|~$" else c for c in line)
