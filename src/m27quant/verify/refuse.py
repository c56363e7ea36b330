"""Stop where a verification found errors: what must not go on with a faulty checkpoint asks this."""

from __future__ import annotations

from collections.abc import Collection

from m27quant.errors import FindingsError, escape
from m27quant.verify.findings import Severity, VerifyResult

SHOWN = 5


def refuse_errors(
    result: VerifyResult, unfit: str, *, solved: Collection[str] = (), name: str | None = None
) -> None:
    """Raise `FindingsError` that names the errors, save those whose codes are `solved`.

    Args:
        result: the finished verification.
        unfit: what the checkpoint is not fit for, behind its name: "not fit to be served".
        solved: codes that are taken care of.
        name: what the checkpoint is called in the message; as in the result where it is None.
    """
    errors = [f for f in result.findings if f.severity is Severity.ERROR and f.check.code not in solved]
    if not errors:
        return
    shown = "; ".join(f"{f.check.code} {f.message}" for f in errors[:SHOWN])
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    named = escape(name or result.checkpoint, 4096)
    raise FindingsError(
        f"{named}: {unfit}: {shown}{more}",
        hint=f"`m27quant verify {named}` tells all of them, `m27quant explain {errors[0].check.code}` what to do",
    )
