"""What `--outputs` measured, as lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]
Row = tuple[str, str]


def outputs_rows(facts: Facts) -> list[Row]:
    """Names and values, the machine first; one row where the checkpoint could not be run."""
    if "not_run" in facts:
        return [("not run", str(facts["not_run"]))]
    rows = [
        ("kernel", str(facts["kernel"])),
        ("on", f"{facts['device']}, {facts['activations']} activations, {facts['kv_cache']} KV cache"),
    ]
    layers: Sequence[Facts] = facts["layers"]
    for name, key, unit in (
        ("kernel against F64", "kernel_db", " dB"),
        ("w2's input over its range", "range_ratio", ""),
        ("experts against the source", "source_db", " dB"),
    ):
        if values := {layer["layer"]: layer[key] for layer in layers if layer[key] is not None}:
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            rows.append((name, f"{values[low]:.3g} (layer {low}) to {values[high]:.3g} (layer {high}){unit}"))
    rows.append(("texts", _health(facts["texts"])))
    if "source_texts" in facts:
        rows.append(("the source's texts", _health(facts["source_texts"])))
    if "source_not_run" in facts:
        rows.append(("source not run", str(facts["source_not_run"])))
    if drafter := facts.get("drafter"):
        rows += _drafter(drafter)
    return rows


def _health(texts: Facts) -> str:
    return (
        f"{texts['repetition']:.1%} repeated 8-grams, {texts['spurious_spaces']:.2%} spurious spaces per word, "
        f"{texts['broken_characters']:.2%} broken characters"
    )


def _drafter(drafter: Facts) -> list[Row]:
    same = "same texts as without it" if drafter["is_lossless"] else "other texts than without it"
    rows = [
        (
            "drafter",
            f"tau {drafter['tau']:.2f}, m_accept {drafter['m_accept']:.2f}, {same} ({drafter['num_prompts']} prompts)",
        ),
        (
            "speed",
            f"{drafter['tokens_per_s']:.1f} tokens/s, {drafter['tokens_per_s_without_drafter']:.1f} without drafter",
        ),
    ]
    if shifts := drafter["m_accept_by_shift"]:
        shown = ", ".join(f"{shift}: {mean:.2f}" for shift, mean in shifts.items())
        rows.append(("m_accept, taps shifted by", shown))
    return rows
