"""`m27quant explain`: what a check means, what each engine does with it, how to mend it."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from m27quant.cli import options
from m27quant.cli.output import Output
from m27quant.errors import UsageError, escape

Code = Annotated[
    str | None,
    typer.Argument(
        metavar="[CODE]", help="A check, as in M27-T001; without it all are listed.", show_default=False
    ),
]


def explain(code: Code = None, json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Explain a check of `m27quant verify`: its meaning, what each engine does, how to mend it.

    Examples:
      m27quant explain M27-C001
    """
    from m27quant.report.checks import page
    from m27quant.verify.checks import CHECKS

    output = Output.open(json=json, quiet=quiet)
    if code is None:
        rows = [{"code": c.code, "severity": c.severity.value, "title": c.title} for c in CHECKS.values()]
        columns = {"code": "code", "severity": "severity", "title": "what"}
        output.table(rows, columns=columns, key="checks")
        return
    check = CHECKS[known_code(code, list(CHECKS))]
    document = {
        "code": check.code,
        "family": check.family,
        "severity": check.severity.value,
        "title": check.title,
        "meaning": check.meaning,
        "engines": check.engines,
        "next_step": check.mend,
    }
    output.result(document, human=page(check), quiet=check.title)


def known_code(code: str, codes: list[str]) -> str:
    """The code that `code` means, whatever its case, with or without `M27-`.

    Raises:
        UsageError: there is none; the hint names the closest.
    """
    wanted = code.strip().upper()
    wanted = wanted if wanted.startswith("M27-") else f"M27-{wanted}"
    if wanted in codes:
        return wanted
    short = {known.removeprefix("M27-"): known for known in codes}
    close = difflib.get_close_matches(wanted.removeprefix("M27-"), short, n=3, cutoff=0.5)
    hint = (
        f"closest: {', '.join(short[name] for name in close)}"
        if close
        else "see `m27quant explain` for all codes"
    )
    raise UsageError(f"there is no check '{escape(code)}'", hint=hint)
