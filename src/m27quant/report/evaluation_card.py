"""An evaluation in a checkpoint's own files: a section of its card, and an entry of its quantization report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import m27quant
from m27quant.checkpoint.card import escape_markdown, with_section
from m27quant.checkpoint.durable import write_durably
from m27quant.checkpoint.sidecars import to_json
from m27quant.checkpoint.strict_json import read_object
from m27quant.checkpoint.workspace import REPORT
from m27quant.evaluation.result import CandidateResult, Evaluation
from m27quant.report import evaluation_words as words
from m27quant.report.document import plain
from m27quant.report.evaluation_words import FIGURES, HEALTH
from m27quant.report.recorded import MAX_BYTES

NAME, HEADING = "evaluation", "Against its source"


def write_to(folder: Path, result: Evaluation) -> None:
    """Put one checkpoint's figures into its README.md and, where there is one, its quantization_report.json.

    Figures of an earlier evaluation are replaced.

    Args:
        folder: the checkpoint's, with a README.md.
        result: its own rows alone; see `Evaluation.of`.

    Raises:
        CheckpointError: a quantization_report.json that is damaged.
        EnvironmentFault: a file that cannot be written.
    """
    card, report = folder / "README.md", folder / REPORT
    if report.is_file():
        content = read_object(report, MAX_BYTES)
        write_durably(report, to_json({**content, NAME: entry(result)}))
    text = card.read_text(encoding="utf-8", errors="replace")
    write_durably(card, with_section(text, NAME, HEADING, section(result)).encode("utf-8"))


def entry(result: Evaluation) -> dict[str, Any]:
    """What a quantization report keeps: the JSON document without the folders of this machine."""
    document = result.document()
    document["reference"]["checkpoint"] = words.base_name(result.reference)
    document["data"]["dataset"] = [words.base_name(name) for name in result.dataset]
    for row in document["candidates"]:
        del row["checkpoint"]
        row["name"] = words.base_name(row["name"])
    producer = {"name": "m27quant", "version": m27quant.__version__}
    kept: dict[str, Any] = plain({"producer": producer, **document})
    return kept


def section(result: Evaluation) -> str:
    """Tables and how they were measured, in Markdown."""
    text = ", ".join(escape_markdown(words.base_name(name)) for name in result.dataset)
    perplexity = words.PERPLEXITY.show(result.reference_perplexity)
    parts = [
        f"Against {escape_markdown(words.base_name(result.reference))} on {result.num_tokens:,} tokens of {text} "
        f"({result.num_windows:,} windows of at most {result.seq_len:,}), computed in F32; in brackets 95 % intervals, "
        f"by bootstrap over windows. The source's perplexity is {perplexity[0]} ({perplexity[1]}).",
        _figures(result.candidates),
    ]
    if result.reference_health is not None:
        parts += [_texts(result)]
    heads, of_tasks = words.task_rows(replace(result, reference_tasks=None))
    if of_tasks:
        modes = {row.label: row.mode for row in result.candidates}
        cells = [[escape_markdown(name), *figures] for name, *figures in of_tasks]
        parts += ["By lm-eval:", _table(["task", *(modes[label] for label in heads[1:])], cells)]
    parts.append(
        f"Measured by `m27quant eval` {m27quant.__version__}; SHA-256 of the tokens {result.digest[:16]}."
    )
    return "\n\n".join(parts)


def _figures(rows: Sequence[CandidateResult]) -> str:
    lines = []
    for name, figure in FIGURES.items():
        found = [words.estimate_of(row, name) for row in rows]
        if any(estimate is not None for estimate in found):
            cells = ["" if e is None else "{} ({})".format(*figure.show(e)) for e in found]
            lines.append([figure.title, *cells])
    lines.append(["Least SQNR of hidden states", *(words.worst_layer(row) for row in rows)])
    lines.append(["Least router agreement", *(words.least_router(row) for row in rows)])
    return _table(["", *(row.mode for row in rows)], lines)


def _texts(result: Evaluation) -> str:
    told = [("source", words.health_cells(result.reference_health))]
    told += [(row.mode, words.health_cells(row.health)) for row in result.candidates]
    lines = [
        [name, *cells]
        if not isinstance(cells, str)
        else [name, f"not measured: {escape_markdown(cells)}", *[""] * (len(HEALTH) - 1)]
        for name, cells in told
    ]
    return _table(["texts of", *HEALTH.values()], lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
