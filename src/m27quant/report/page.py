"""What every page is: one self-contained file.

It loads nothing, which its own content security policy enforces: one script, known by its hash, no address at all.
Every string passes through `line` and Jinja's escaping, and the page is ASCII, so that no reader's encoding matters.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import m27quant
from m27quant.report.plots import number
from m27quant.report.text import line, plural, size

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "m27quant report"
"""Names the page's author in its head; a file that has it may be replaced."""


def fill(template: str, **values: Any) -> str:
    """The page as ASCII HTML: a template that extends page.html.jinja, which says what it needs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    environment.filters |= {"size": size, "number": number, "plural": plural}
    script = (TEMPLATES / "report.js").read_text(encoding="ascii")
    text = environment.get_template(template).render(
        generator=GENERATOR,
        version=m27quant.__version__,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="ascii")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _safe(value: object) -> object:
    return line(value) if isinstance(value, str) and not isinstance(value, Markup) else value
