"""What a checkpoint is and what was measured of it, as lines for people: flat facts, then a block for each part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from m27quant.report.outputs import outputs_rows
from m27quant.report.text import line, size

Facts = Mapping[str, Any]
Row = tuple[str, str]

BLOCKS = ("weights", "source", "drafter", "logits", "outputs")
"""Facts that are several lines of their own."""
SERVING = "serving_"
NAMES = {"gpu": "GPU", "moe": "MoE", "sqnr": "SQNR", "db": "dB", "id": "ID"}
LAYERS_A_LINE = 8


def flat(facts: Facts) -> list[Row]:
    """What a line is enough for; keys as words: `num_shards` is "shards"."""
    return [
        (_words(key), _value(value)) for key, value in facts.items() if value is not None and not _block(key)
    ]


def blocks(facts: Facts) -> Text:
    """The rest, each part under its heading."""
    text = Text()
    for key, value in facts.items():
        if key in BLOCKS and isinstance(value, Mapping) and value:
            text.append_text(_headed(key, _lines(key, value)))
    head, rows = serving_table(facts)
    if rows:
        text.append_text(_headed("serving", _grid(head, rows)))
    return text


def _lines(key: str, value: Facts) -> Text:
    if key == "logits":
        return _logits(value)
    return columns(outputs_rows(value) if key == "outputs" else measured_rows(value), "  ")


def columns(rows: Iterable[Row], indent: str = "") -> Text:
    """Names and values below each other; names are bold at the margin, dim further in."""
    safe = [(line(name), line(value)) for name, value in rows]
    width = max((len(name) for name, _ in safe), default=0)
    text = Text()
    for name, value in safe:
        text.append(indent).append(f"{name:<{width}}", style="dim" if indent else "bold").append(
            f"  {value}\n"
        )
    return text


def _block(key: str) -> bool:
    return key in BLOCKS or key.startswith(SERVING)


def _headed(heading: str, lines: Text) -> Text:
    return Text("\n").append(f"{heading}\n", style="bold").append_text(lines)


def _words(key: str) -> str:
    return key.removeprefix("num_").replace("_", " ")


def _named(key: str) -> str:
    """The words of a measurement, with names as they are written."""
    return " ".join(NAMES.get(word, word) for word in _words(key).split(" "))


def measured_rows(facts: Facts) -> list[Row]:
    """Of one block; sizes in bytes are rounded to what people compare."""
    rows = []
    for key, value in facts.items():
        if value is None or _is_table(value):
            continue
        if isinstance(value, int) and "_bytes" in key:
            rows.append((_named(key.replace("_bytes", "")), size(value)))
        else:
            rows.append((_named(key), _value(value)))
    return rows


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if not _is_table(item)}
        return ", ".join(f"{key} {_value(item)}" for key, item in shown.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _is_table(value: object) -> bool:
    """Rows that only --json shows, such as a layer's figures."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def serving_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a column for each engine, none where serving was not asked for."""
    engines = {key.removeprefix(SERVING): value for key, value in facts.items() if key.startswith(SERVING)}
    cells = {name: dict(measured_rows(of_engine)) for name, of_engine in engines.items()}
    labels = list(dict.fromkeys(label for of_engine in cells.values() for label in of_engine))
    return ["", *cells], [[label, *(of.get(label, "") for of in cells.values())] for label in labels]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "<") -> Text:
    """Columns as wide as their longest cell; the first is a label."""
    table = [[line(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(head))]
    text = Text()
    for number, row in enumerate(table):
        label, *cells = [f"{cell:{align if n else '<'}{widths[n]}}" for n, cell in enumerate(row)]
        rest = f"  {'  '.join(cells)}".rstrip()
        text.append("  ").append(label if rest else label.rstrip(), style="dim" if number else "bold")
        text.append(f"{rest}\n", style="" if number else "bold")
    return text


def logits_rows(facts: Facts) -> list[Row]:
    """What the checkpoint answers against what its source does; or why that could not be computed."""
    if "kl_mean" not in facts:
        return measured_rows(facts)
    inputs = {"nvfp4": "experts' inputs in NVFP4 (W4A4)", "bf16": "experts' inputs not quantized (W4A16)"}
    return [
        (
            "text",
            f"{facts['text']}: {facts['num_tokens']:,} tokens, {facts['num_windows']:,} windows of at most "
            f"{facts['seq_len']:,}",
        ),
        (
            "computed",
            f"{inputs.get(facts['activations'], facts['activations'])}, {facts['kv_cache'].upper()} cache",
        ),
        (
            "KL divergence",
            f"mean {facts['kl_mean']:.4g}, 99% {facts['kl_p99']:.4g}, largest {facts['kl_max']:.4g} nats a token",
        ),
        ("likeliest token", f"the same for {facts['top1_agreement']:.1%} of the tokens"),
        (
            "perplexity",
            f"{facts['perplexity']:.3f}, the source's {facts['perplexity_source']:.3f}: "
            f"ratio {facts['perplexity_ratio']:.4f}",
        ),
    ]


def _logits(facts: Facts) -> Text:
    """The figures, then layers and the worst experts."""
    text = columns(logits_rows(facts), "  ")
    decibels = facts.get("layer_sqnr_db") or []
    lines = [
        [
            _span(at, len(part)),
            *(_decibel(v) for v in part),
            *[""] * (LAYERS_A_LINE - len(part)),
        ]
        for at in range(0, len(decibels), LAYERS_A_LINE)
        if (part := decibels[at : at + LAYERS_A_LINE])
    ]
    if lines:
        text.append_text(_grid(["SQNR of states, dB", *[""] * LAYERS_A_LINE], lines, ">"))
    worst = [
        [f"layer {w['layer']}, expert {w['expert']}", _decibel(w["sqnr_db"])]
        for w in facts.get("worst_experts") or []
    ]
    if worst:
        text.append_text(_grid(["worst experts, dB", ""], worst, ">"))
    return text


def _span(first: int, count: int) -> str:
    return f"layers {first}-{first + count - 1}" if count > 1 else f"layer {first}"


def _decibel(value: object) -> str:
    """Equal tensors have no noise."""
    return f"{value:.2f}" if isinstance(value, int | float) and value < 1e9 else "equal"
