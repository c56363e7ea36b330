"""Options that several commands share: one spelling, one type, one help text each.

A command writes `def verify(checkpoint: options.Model, json: options.Json = False, ...)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from m27quant.cli.units import parse_size

OUTPUT_PANEL = "Output"
HUB_PANEL = "Hub"

T = TypeVar("T")


class Token:
    """A Hub token that shows itself to nobody: `reveal()` is the only way to the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The token itself, for the request that needs it."""
        return self._text

    def __repr__(self) -> str:
        return "Token(***)"


def parse_device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:1`; only the form is checked, as asking for devices imports torch."""
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text, re.ASCII) is None:
        raise ValueError(f"{text!r} is not a device; write auto, cpu, cuda or cuda:0")
    return text


def as_parser(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose ValueError becomes a usage error with its own words."""

    def parser(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parser


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local folder, or a Hub id: org/name or org/name@revision.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT_PANEL)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print bare results and errors only.", rich_help_panel=OUTPUT_PANEL),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Say more on stderr; -vv for all.",
        show_default=False,
        rich_help_panel=OUTPUT_PANEL,
    ),
]
NoProgress = Annotated[
    bool,
    typer.Option("--no-progress", help="Show no progress on stderr.", rich_help_panel=OUTPUT_PANEL),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        parser=as_parser(parse_device),
        help="auto, cpu, cuda or cuda:INDEX.",
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=as_parser(parse_size),
        help="Most memory to use: 16GiB (binary), 16GB (decimal).",
        show_default=False,
    ),
]
MaxShardSize = Annotated[
    int | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        parser=as_parser(parse_size),
        help="Largest shard file: 5GB (decimal), 5GiB (binary).",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of a Hub id.",
        show_default=False,
        rich_help_panel=HUB_PANEL,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Use only what is already on this machine (also: HF_HUB_OFFLINE=1).",
        rich_help_panel=HUB_PANEL,
    ),
]
HubToken = Annotated[
    Token | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        parser=Token,
        help="Hub token; HF_TOKEN or a stored login is safer, as others can see command lines.",
        show_default=False,
        rich_help_panel=HUB_PANEL,
    ),
]
