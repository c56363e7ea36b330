"""What an evaluation says in words and cells: for its page, the terminal and cards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m27quant.evaluation.result import CandidateResult, Estimate, Evaluation, Metric, Pair

Row = tuple[str, str]
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of candidates, and how it is read."""

    title: str
    note: str
    less_is_better: bool
    digits: int
    percent: bool = False

    def show(self, estimate: Estimate) -> tuple[str, str]:
        """(the value, "low to high")."""
        return self.number(estimate.value), f"{self.number(estimate.low)} to {self.number(estimate.high)}"

    def number(self, value: float) -> str:
        """With as many digits as intervals usually leave."""
        if not math.isfinite(value):
            return "none" if math.isnan(value) else "inf"
        return f"{value:.{self.digits}%}" if self.percent else f"{value:.{self.digits}f}"


FIGURES: Mapping[str, Figure] = {
    "kl_mean": Figure(
        "KL divergence, mean", "Nats a token by which next-token distributions leave the reference's.", True, 4
    ),
    "kl_p99": Figure("KL divergence, 99th percentile", "One token of a hundred is above.", True, 4),
    "perplexity_ratio": Figure(
        "Perplexity ratio", "To the reference's on the same tokens; 1 is as good.", True, 4
    ),
    "top1": Figure("Top-1 agreement", "Tokens with the same likeliest next token.", False, 1, percent=True),
    "top8": Figure(
        "Top-8 agreement", "Share of the reference's eight likeliest that are among the row's.", False, 1, percent=True
    ),
    "greedy": Figure("Greedy text in common", "Tokens until greedy text leaves the reference's.", False, 1),
}  # fmt: skip
"""By their names in `CandidateResult`; greedy is `greedy["tokens"]`."""
TASK = Figure("", "", False, 4)
SHARE = Figure("", "", True, 1, percent=True)
PERPLEXITY = Figure("Perplexity", "", True, 4)

TESTED: Mapping[Metric, tuple[str, bool]] = {
    "kl": ("KL divergence", True),
    "nll": ("negative log-likelihood", True),
    "top1": ("top-1 agreement", False),
    "top8": ("top-8 agreement", False),
    "greedy": ("greedy tokens in common", False),
}
"""Of pairs: in words, and whether less is better."""

HEALTH = {
    "spurious_spaces": "spurious spaces a word",
    "repetition": "repeated 8-grams",
    "broken_characters": "broken characters",
    "valid_tool_calls": "valid tool calls",
}


def base_name(name: str) -> str:
    """Of a folder its last part, of a Hub id all of it."""
    return Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name


def estimate_of(row: CandidateResult, name: str) -> Estimate | None:
    """A figure of a row, None where it was not measured."""
    if name != "greedy":
        found: Estimate = getattr(row, name)
        return found
    tokens = (row.greedy or {}).get("tokens")
    return None if tokens is None else Estimate(**tokens)


def verdict(result: Evaluation) -> tuple[str, str, str]:
    """(class, word, sentence)."""
    if not result.ok:
        more = len(result.failures) - 1
        return "error", "Failed", result.failures[0] + (f"; and {more} more" if more else "")
    return "good", "Measured", "No figure is beyond a limit that was given, and all logits are numbers."


def counts(result: Evaluation) -> str:
    """What it rests on, in one line."""
    return (
        f"{result.num_tokens:,} tokens in {result.num_windows:,} windows of at most {result.seq_len:,}; "
        f"{len(result.candidates):,} {'row' if len(result.candidates) == 1 else 'rows'}"
    )


def data(result: Evaluation) -> list[Row]:
    """On what it was measured."""
    perplexity = PERPLEXITY.show(result.reference_perplexity)
    return [
        ("Reference", result.reference),
        ("Its perplexity", f"{perplexity[0]} ({perplexity[1]})"),
        ("Text", ", ".join(result.dataset)),
        ("Tokens", f"{result.num_tokens:,} in {result.num_windows:,} windows of at most {result.seq_len:,}"),
        ("SHA-256 of the tokens", result.digest),
        ("Seed of draws", str(result.seed)),
    ]


def outcome(pair: Pair, a: str = "a", b: str = "b") -> str:
    """Which of two is better, if that is shown; under the names that they are given."""
    if math.isnan(pair.p):
        return "not a number"
    if pair.p >= SIGNIFICANT or pair.difference == 0:
        return "no difference shown"
    less = TESTED[pair.metric][1]
    return f"{a if (pair.difference < 0) == less else b} is better"


def probability(p: float) -> str:
    """A p-value as it is told."""
    return "none" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.3f}"


def greedy_cells(row: CandidateResult) -> tuple[str, str, str, str]:
    """Tokens in common, their interval, texts that stayed identical, by whose text; or why there are none."""
    found = row.greedy or {"not_measured": "no texts were asked for"}
    if "not_measured" in found:
        return "none", "", "", str(found["not_measured"])
    tokens, between = FIGURES["greedy"].show(Estimate(**found["tokens"]))
    same = found["identical"]
    identical = f"{same['value']:.0%} ({same['low']:.0%} to {same['high']:.0%})"
    return f"{tokens} of {found['max_tokens']}", between, identical, f"by {found['compared_by']}"


def health_shares(health: Mapping[str, Any] | None) -> list[tuple[str, str]] | str:
    """(share, "low to high") for each of HEALTH; or one sentence, why there are none."""
    if health is None:
        return "no texts were asked for"
    if "not_measured" in health:
        return str(health["not_measured"])
    estimates = (health.get(name) for name in HEALTH)
    return [("no chat template for tools", "") if e is None else SHARE.show(Estimate(**e)) for e in estimates]


def health_cells(health: Mapping[str, Any] | None) -> list[str] | str:
    """The same, a cell for each."""
    shares = health_shares(health)
    if isinstance(shares, str):
        return shares
    return [f"{share} ({between})" if between else share for share, between in shares]


def task_names(result: Evaluation) -> list[tuple[str, str]]:
    """(task, metric) of all models, in lm-eval's order."""
    told = [result.reference_tasks, *(row.tasks for row in result.candidates)]
    found = {
        (task, metric): None
        for tasks in told
        if tasks is not None and "not_measured" not in tasks
        for task, figures in tasks.items()
        for metric in figures["metrics"]
    }
    return [*found]


def task_cell(tasks: Mapping[str, Any] | None, task: str, metric: str) -> str:
    """A figure with its interval; nothing where it was not measured."""
    if tasks is None or "not_measured" in tasks or task not in tasks:
        return ""
    estimate = tasks[task]["metrics"].get(metric)
    return "" if estimate is None else "{} ({})".format(*TASK.show(Estimate(**estimate)))


def task_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row for each task and metric, a column for each model that was asked; empty without tasks."""
    asked = [(base_name(result.reference), result.reference_tasks)]
    asked += [(row.label, row.tasks) for row in result.candidates]
    asked = [(name, tasks) for name, tasks in asked if tasks is not None]
    rows = [
        [
            task_title(task, metric),
            *(task_cell(tasks, task, metric) for _, tasks in asked),
        ]
        for task, metric in task_names(result)
    ]
    return ["task", *(name for name, _ in asked)], rows


def untold_tasks(result: Evaluation) -> list[str]:
    """Why models were not asked."""
    asked = [(base_name(result.reference), result.reference_tasks)]
    asked += [(row.label, row.tasks) for row in result.candidates]
    return [
        f"{name}: no tasks: {tasks['not_measured']}"
        for name, tasks in asked
        if tasks is not None and "not_measured" in tasks
    ]


def task_title(task: str, metric: str) -> str:
    """In words; lm-eval's filter is told where it has a name."""
    name, _, filtered = metric.partition(",")
    return f"{task}: {name}" + ("" if filtered in ("", "none") else f" ({filtered})")


def worst_layer(row: CandidateResult) -> str:
    """The layer behind which the hidden states are furthest from the reference's."""
    values = [e.value for e in row.layer_sqnr_db]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "equal" if values and all(v == math.inf for v in values) else "none"
    return f"{min(finite):.2f} dB (layer {values.index(min(finite))})"


def least_router(row: CandidateResult) -> str:
    """The layer whose routing differs most."""
    values = [e.value for e in row.router]
    finite = [v for v in values if math.isfinite(v)]
    return f"{min(finite):.1%} (layer {values.index(min(finite))})" if finite else "none"
