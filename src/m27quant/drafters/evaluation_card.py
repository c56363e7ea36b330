"""What a drafter's card says of an evaluation: Markdown, every figure from the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m27quant.checkpoint.card import escape_markdown
from m27quant.drafters.evaluation import EvalResult, EvalRow
from m27quant.drafters.metrics import AcceptanceStats

SHOWN = 8
"""Of C_k."""


def section(result: EvalResult) -> str:
    """The tables of one drafter, and how they were measured."""
    o, rows = result.options, result.rows
    how = "greedy text" if not o.temperature else f"text, sampled at temperature {o.temperature:g},"
    ends = "; end tokens do not end it" if o.ignore_eos else ""
    exact = "batch-invariant kernels" if result.invariant else "kernels that are not batch-invariant"
    parts = [
        f"The target's own {how} of up to {o.max_tokens} tokens behind {result.num_prompts} prompts "
        f"({escape_markdown(Path(result.dataset).name)}), {exact}{ends}. tau is tokens per forward pass of the target, "
        "its own included: 1 + m\\_accept, over all steps of all prompts. C\\_k is the share of steps whose first k "
        "drafts were all accepted. Prompt lookup (`--drafter ngram`) is measured on the same text with as many drafts.",
        _generation(rows),
        _repeats(rows),
    ]
    if any(row.proxy is not None for row in rows):
        parts += [
            f"Teacher-forced, along the text that does follow the prompts: a block behind every {o.stride} tokens; "
            "m\\_accept is the mean leading run of right first choices, without a bonus token, C\\_k the share of "
            "blocks whose first k are right, the loss the mean of -log q in nats over all places of all blocks.",
            _proxy(rows),
        ]
    if result.command is not None:
        parts.append(f"    {result.command}")
    return "\n\n".join(parts)


def _generation(rows: Sequence[EvalRow]) -> str:
    several = any(row.difference is not None for row in rows)
    heads = ["setting", "target", "tau", "m\\_accept", "C\\_1 .. C\\_k", "prompt lookup: tau"]
    lines = []
    for row in rows:
        stats = row.generation
        cells = [
            row.setting, _target(row), f"**{stats.tau:.3f}**", f"{stats.m_accept:.3f}", _c_k(stats),
            f"{row.ngram.tau:.3f}",
        ]  # fmt: skip
        lines.append([*cells, _difference(row)] if several else cells)
    return _table([*heads, "difference of tau"] if several else heads, lines)


def _proxy(rows: Sequence[EvalRow]) -> str:
    lines, seen = [], set()
    for row in rows:
        proxy = row.proxy
        if proxy is None or (key := (len(proxy.losses), row.target)) in seen:
            continue
        seen.add(key)
        lines.append([
            row.setting, _target(row), f"{proxy.blocks:,}", f"{proxy.stats.m_accept:.3f}", _c_k(proxy.stats),
            f"{proxy.val_loss:.3f}",
        ])  # fmt: skip
    return _table(["setting", "target", "blocks", "m\\_accept", "C\\_1 .. C\\_k", "val loss"], lines)


def _repeats(rows: Sequence[EvalRow]) -> str:
    shares = {_target(row): row.repeated_8grams for row in rows}
    if len(shares) == 1:
        (share,) = shares.values()
        return (
            f"{share:.1%} of the generated tokens end an 8-gram that had occurred before in prompt or text."
        )
    each = ", ".join(f"{share:.1%} ({target})" for target, share in shares.items())
    return f"Generated tokens that end an 8-gram that had occurred before in prompt or text: {each}."


def _target(row: EvalRow) -> str:
    return f"{escape_markdown(Path(row.target.name).name)}, {row.target.describe()}"


def _difference(row: EvalRow) -> str:
    if row.difference is None:
        return ""
    d = row.difference
    return f"{d.value:+.3f} ± {d.standard_error:.3f}"


def _c_k(stats: AcceptanceStats) -> str:
    shown = " ".join(f"{c:.3f}" for c in stats.c_k[:SHOWN])
    return shown + (" ..." if len(stats.c_k) > SHOWN else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
