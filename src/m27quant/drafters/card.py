"""The model card."""

from __future__ import annotations

from typing import Any

CURVE = "training.svg"


def render(plan: Any, config: dict[str, Any], result: dict[str, Any], *, command: str | None) -> str:
    return "# drafter\n"
