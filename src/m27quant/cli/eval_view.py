"""An evaluation in a terminal: every figure of every row below the other, tests of pairs, texts."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from m27quant.cli.output import clean, grid
from m27quant.evaluation.result import Evaluation
from m27quant.report import evaluation_words as words


def human(result: Evaluation) -> Group:
    """Narrow enough for 80 columns: a line for each figure and row."""
    rows = result.candidates
    parts: list[RenderableType] = [_figures(result)]
    layers = [
        (row.label, row.mode, words.worst_layer(row), words.least_router(row), str(row.non_finite))
        for row in rows
    ]
    heads = ("candidate", "mode", "least SQNR", "least router agreement", "not finite")
    parts += ["", grid(heads, layers)]
    if result.reference_health is not None:
        parts += ["", *_texts(result)]
    heads_of_tasks, of_tasks = words.task_rows(result)
    if of_tasks:
        parts += ["", grid(heads_of_tasks, of_tasks)]
    parts += [Text(clean(reason)) for reason in words.untold_tasks(result)]
    if result.pairs:
        tests = [
            (
                pair.metric, pair.a, pair.b, f"{pair.difference:+.3g}",
                words.probability(pair.p), words.outcome(pair),
            )
            for pair in result.pairs
        ]  # fmt: skip
        parts += ["", grid(("by", "a", "b", "a - b", "p", "outcome"), tests)]
    parts += ["", *(Text(clean(line)) for line in (*_basis(result), *result.failures))]
    return Group(*parts)


def _figures(result: Evaluation) -> RenderableType:
    cells = []
    for name, figure in words.FIGURES.items():
        title = figure.title
        for row in result.candidates:
            estimate = words.estimate_of(row, name)
            if estimate is not None:
                cells.append((title, row.label, *figure.show(estimate)))
                title = ""
    return grid(("figure", "candidate", "value", "95 % interval"), cells)


def _texts(result: Evaluation) -> list[RenderableType]:
    """Health of all models; why there is none, where it was not measured."""
    told = [(words.base_name(result.reference), words.health_shares(result.reference_health))]
    told += [(row.label, words.health_shares(row.health)) for row in result.candidates]
    known = [(name, shares) for name, shares in told if not isinstance(shares, str)]
    cells = [
        (sign if name == known[0][0] else "", name, *shares[n])
        for n, sign in enumerate(words.HEALTH.values())
        for name, shares in known
    ]
    parts: list[RenderableType] = [grid(("texts", "model", "share", "95 % interval"), cells)] if cells else []
    parts += [Text(clean(f"{name}: no texts: {why}")) for name, why in told if isinstance(why, str)]
    return parts


def _basis(result: Evaluation) -> list[str]:
    perplexity = words.PERPLEXITY.show(result.reference_perplexity)
    return [
        f"reference: {clean(result.reference)}, perplexity {perplexity[0]} ({perplexity[1]})",
        f"{words.counts(result)}; {clean(', '.join(result.dataset))}",
    ]
