"""Faults that break several names at once, told as the one that they are: a tensor renamed, a prefix, a lost layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from m27quant.checkpoint import names
from m27quant.checkpoint.names import TensorSpec
from m27quant.errors import escape
from m27quant.verify.collect import Findings, place
from m27quant.verify.view import View

_PREFIXED = re.compile(r"(.+?\.)((?:model|lm_head)\..+)", re.DOTALL)
Key = tuple[int | None, int | None, str, tuple[int, ...]]
"""Layer, expert, dtype and shape."""


def recognize_renames(view: View, unknown: list[str], found: Findings) -> set[str]:
    """Report a prefix before all names, layers that are gone, and unknown tensors that can only be a missing one.

    `unknown` are those that no tool is known to write.  Returns the names, expected and
    actual, that nobody needs to report again.
    """
    absent = [n for n in view.expected if n not in view.tensors and n not in view.lost]
    if not absent:
        return set()
    return _prefix(view, absent, unknown, found) or _lost_layers(view, absent, found) | _pairs(
        view, absent, unknown, found
    )


def _prefix(view: View, absent: list[str], unknown: list[str], found: Findings) -> set[str]:
    """All names but few stand behind one prefix, such as `language_model.`."""
    matches = [m for name in unknown if (m := _PREFIXED.fullmatch(name)) and m[2] in view.expected]
    prefixes = {m[1] for m in matches}
    if len(prefixes) != 1 or 2 * len(matches) < len(view.tensors):
        return set()
    (prefix,) = prefixes
    first = matches[0]
    found.add(
        "M27-T005", f"'{escape(first[0])}': {len(matches):,} names begin with '{escape(prefix)}'",
        tensor=first[0], expected=first[2], found=escape(first[0]),
    )  # fmt: skip
    return {m[0] for m in matches} | set(absent)


def _lost_layers(view: View, absent: list[str], found: Findings) -> set[str]:
    """Layers of which not one tensor is there."""
    assert view.config is not None
    there = {place(name)[0] for name in view.tensors} | {place(name)[0] for name in view.lost}
    gone = {layer for layer in range(view.config.num_hidden_layers) if layer not in there}
    if not gone:
        return set()
    lost = [name for name in absent if place(name)[0] in gone]
    for layer in sorted(gone):
        prefix = names.layer_prefix(layer)
        count = sum(place(name)[0] == layer for name in lost)
        found.add(
            "M27-T002", f"layer {layer} is missing altogether: {count:,} tensors, '{prefix}.*'",
            tensor=f"{prefix}.input_layernorm.weight", expected=f"{count:,} tensors", found="nothing",
        )  # fmt: skip
    return set(lost)


def _pairs(view: View, absent: list[str], unknown: list[str], found: Findings) -> set[str]:
    """One unknown tensor for one that is missing: same layer and expert, type and shape, no other choice."""
    missing, strange = _by_key(view.expected[n] for n in absent), defaultdict(list)
    for name in unknown:
        info = view.tensors[name]
        layer, expert, _ = place(name)
        strange[layer, expert, info.dtype, tuple(info.shape)].append(name)
    known: set[str] = set()
    for key, (expected, *more) in missing.items():
        if more or len(strange[key]) != 1:
            continue
        (name,) = strange[key]
        code = "M27-T001" if ".experts." in expected else "M27-T002"
        found.add(
            code, f"'{expected}' is missing; '{escape(name)}' has its type and shape: renamed?",
            tensor=expected, expected=expected, found=escape(name),
        )  # fmt: skip
        known |= {expected, name}
    return known


def _by_key(specs: Iterable[TensorSpec]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = defaultdict(list)
    for spec in specs:
        layer, expert, _ = place(spec.name)
        groups[layer, expert, spec.dtype, tuple(spec.shape)].append(spec.name)
    return groups
