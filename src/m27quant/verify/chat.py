"""The chat template, where there is one: text that Jinja can compile."""

from __future__ import annotations

from m27quant.checkpoint.sidecars import MAX_SIDECAR_BYTES
from m27quant.checkpoint.strict_json import parse, read_bytes
from m27quant.errors import CheckpointError, EnvironmentFault, escape
from m27quant.verify.collect import Findings
from m27quant.verify.view import View

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE = 2**20
"""Characters; M2's has 6,000."""


def check_chat_template(view: View, found: Findings) -> None:
    """Engines take chat_template.jinja, else what tokenizer_config.json holds; absent ones are a config check's."""
    file, text = _template(view)
    if text is None:
        return
    fault = "is empty" if not text.strip() else _fault(text)
    if fault is not None:
        found.add("M27-F028", f"{file}: the chat template {fault}", file=file, found=fault)


def _template(view: View) -> tuple[str, str | None]:
    path = view.folder / TEMPLATE
    try:
        if path.is_file() and TEMPLATE not in view.refused:
            return TEMPLATE, read_bytes(path, MAX_SIDECAR_BYTES).decode("utf-8", "replace")
        path = view.folder / TOKENIZER_CONFIG
        if path.is_file() and TOKENIZER_CONFIG not in view.refused:
            config = parse(read_bytes(path, MAX_SIDECAR_BYTES), TOKENIZER_CONFIG)
            template = config.get("chat_template") if isinstance(config, dict) else None
            return TOKENIZER_CONFIG, template if isinstance(template, str) else None
    except (CheckpointError, EnvironmentFault, OSError):
        pass  # reported by the check that reads the file
    return TEMPLATE, None


def _fault(text: str) -> str | None:
    """Why Jinja refuses it, as the engines' sandbox is set up."""
    if len(text) > MAX_TEMPLATE:
        return f"has {len(text):,} characters"
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' `{% generation %}` block."""

        tags = {"generation"}  # noqa: RUF012 - declared by jinja2 as it is

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    try:
        environment.parse(text)
    except TemplateSyntaxError as fault:
        return f"is no Jinja, line {fault.lineno}: {escape(fault.message)}"
    except RecursionError:
        return "is too deeply nested"
    return None
