"""Findings as they are met, folded by check, layer and role: a fault in every expert is one line, not 47,616."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from m27quant.errors import escape
from m27quant.verify.checks import CHECKS, FAMILIES
from m27quant.verify.findings import Finding, Severity

MAX_EXAMPLES = 5
MAX_LAYERS, MAX_ROLES = 4, 8
"""More layers of one role, or roles of one check, than these are folded into one finding."""

_IN_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.*)", re.DOTALL)
_IN_EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.([0-9]{1,6})\.(.*)", re.DOTALL)
_ORDER = {
    severity: number for number, severity in enumerate((Severity.ERROR, Severity.WARNING, Severity.NOTE))
}
_FAMILY = {family: number for number, family in enumerate(FAMILIES.values())}


def place(name: str) -> tuple[int | None, int | None, str]:
    """(layer, expert, role) of a tensor name; the role is what its like in other layers and experts share."""
    if (match := _IN_LAYER.fullmatch(name)) is None:
        return None, None, name
    layer, rest = int(match[1]), match[2]
    if (match := _IN_EXPERT.fullmatch(rest)) is None:
        return layer, None, rest
    return layer, int(match[1]), f"experts.{match[2]}"


@dataclass(slots=True)
class _Group:
    worst: Finding
    badness: float
    count: int
    examples: list[str] = field(default_factory=list)

    def absorb(self, other: _Group) -> None:
        self.count += other.count
        if other.badness > self.badness:
            self.worst, self.badness = other.worst, other.badness
        self.examples += other.examples[: MAX_EXAMPLES - len(self.examples)]


class Findings:
    """Where checks put what they find."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int | None, str], _Group] = {}

    def any(self, *codes: str) -> bool:
        """Whether one of these checks has found something."""
        return any(code in codes for code, _, _ in self._groups)

    def add(
        self,
        code: str,
        message: str,
        *,
        tensor: str | None = None,
        file: str | None = None,
        expected: object = None,
        found: object = None,
        badness: float = 0.0,
    ) -> None:
        """Note one place.  Of those folded together the one of the greatest `badness` is shown (the first, if equal).

        `message` is shown as it is: what came from the checkpoint must be escaped in it.
        """
        layer, expert, role = place(tensor) if tensor is not None else (None, None, file or message)
        key = (code, layer, role)
        group = self._groups.get(key)
        if group is not None and badness <= group.badness:
            group.count += 1
            if len(group.examples) < MAX_EXAMPLES:
                group.examples.append(escape(tensor or file))
            return
        finding = Finding(
            check=CHECKS[code],
            message=message,
            file=None if file is None else escape(file),
            tensor=None if tensor is None else escape(tensor),
            layer=layer,
            expert=expert,
            expected=None if expected is None else escape(expected),
            found=None if found is None else escape(found),
        )
        fresh = _Group(finding, badness, 1, [escape(tensor or file)] if tensor or file else [])
        if group is None:
            self._groups[key] = fresh
        else:
            group.absorb(fresh)

    def codes(self) -> set[str]:
        """Of all that was found so far."""
        return {code for code, _, _ in self._groups}

    def finish(self) -> list[Finding]:
        """One finding for each group, the gravest first."""
        groups = _fold(_fold(self._groups, MAX_LAYERS, by_role=True), MAX_ROLES, by_role=False)
        findings = [
            replace(
                g.worst,
                count=g.count,
                examples=tuple(x for x in g.examples if x not in (g.worst.tensor, g.worst.file)),
            )
            for g in groups.values()
        ]
        return sorted(findings, key=_rank)


def _fold(
    groups: dict[tuple[str, int | None, str], _Group], most: int, *, by_role: bool
) -> dict[tuple[str, int | None, str], _Group]:
    """Fold groups of one check (and one role) into one, where there are more than `most`."""
    kin: dict[tuple[str, str], list[tuple[str, int | None, str]]] = {}
    for key in groups:
        kin.setdefault((key[0], key[2] if by_role else ""), []).append(key)
    result: dict[tuple[str, int | None, str], _Group] = {}
    for (code, role), keys in kin.items():
        if len(keys) <= most:
            result |= {key: groups[key] for key in keys}
            continue
        first, *rest = (groups[key] for key in keys)
        for other in rest:
            first.absorb(other)
        result[code, None, role] = first
    return result


def _rank(f: Finding) -> tuple[int, int, str, int, int]:
    return (
        _ORDER[f.severity],
        _FAMILY[f.check.family],
        f.check.code,
        -f.count,
        -1 if f.layer is None else f.layer,
    )
