"""Options of a quantization that many processes or many jobs share, and how they speak with one voice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m27quant.cli.options import as_parser
from m27quant.errors import M27Error

if TYPE_CHECKING:
    from m27quant.distributed.ranks import Ranks

PANEL = "Many processes and jobs"


class Layers(tuple[int, int | None]):
    """A run of layers, first to before the end; None is the last one's end."""

    def __str__(self) -> str:
        return f"{self[0]}:{'' if self[1] is None else self[1]}"


def parse_layers(text: str) -> Layers:
    """`0:16`, or `48:` to the end."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})?", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no run of layers; write 0:16, or 48: to the end")
    return Layers((int(found[1]), None if found[2] is None else int(found[2])))


NumProcesses = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Processes on this machine that share the work; without it one per visible GPU, or one.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
CalibrateOnly = Annotated[
    bool,
    typer.Option(
        "--calibrate-only",
        help="Stop after calibration; its ranges are then in OUT/calibration.json.",
        rich_help_panel=PANEL,
    ),
]
RangesOption = Annotated[
    Path | None,
    typer.Option(
        "--ranges",
        metavar="FILE",
        help="Pack by a calibration.json instead of calibrating.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
LayersOption = Annotated[
    Layers | None,
    typer.Option(
        "--layers",
        metavar="A:B",
        parser=as_parser(parse_layers),
        help="With --ranges: pack layers A to B-1 only, as a part for `m27quant assemble`.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]


def is_first() -> bool:
    """Whether this is the rank that talks, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def hush(message: str) -> None:
    """What all ranks would say is said by the first."""


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Of all ranks one says what went wrong; the others end with the same exit code."""
    try:
        yield
    except M27Error as fault:
        if ranks.is_spokesman:
            raise
        raise typer.Exit(fault.exit_code) from None


def next_step(report: dict[str, Any], layers: Layers | None) -> dict[str, str]:
    """What a run that did less than all has made, and what it is for."""
    if "calibration" in report and layers is None:
        return {
            "calibration": report["calibration"],
            "measured on": f"{report['num_tokens']:,} tokens, {report['num_layers']} layers",
            "next": f"m27quant quantize MODEL PART --ranges {report['calibration']} --layers A:B",
        }
    return {
        "part": report["part"],
        "layers": str(layers),
        "size": f"{report['size']:,} bytes in {len(report['units'])} units",
        "next": "m27quant assemble PART... OUT",
    }
