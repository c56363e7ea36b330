"""YAML that means one thing.

A recipe drives both m27quant and nvidia-modelopt, so what one reader takes for a number and another for text
is refused rather than guessed: `no`, `010`, `1:30`, `1e-3`, dates.  So are tags, merge keys, duplicate keys,
NaN and infinity, and files that grow when their aliases are expanded.  Every mapping remembers its lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import yaml

from m27quant.errors import RecipeError, escape

MAX_BYTES = 128 * 1024
MAX_NODES = 20_000
"""Nodes of one file with every alias expanded."""
MAX_DEPTH = 32

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
_CORE_NUMBER = re.compile(
    r"0o[0-7]+|0x[0-9a-fA-F]+|[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""What YAML 1.2 takes for a number; PyYAML, as modelopt uses it, follows YAML 1.1."""
_yaml_1_1_tag: Callable[[type, str, tuple[bool, bool]], str] = yaml.resolver.Resolver().resolve
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|nan)", re.IGNORECASE)

Value: TypeAlias = "Map | Seq | str | int | float | bool | None"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written; `library` says that it was in modelopt's own collection."""

    file: str
    line: int
    library: bool = False

    def __str__(self) -> str:
        return f"{escape(self.file)}:{self.line}"

    def error(self, message: str, hint: str | None = None) -> RecipeError:
        return RecipeError(f"{self}: {message}", hint=hint)


class Map(dict[str | int, Value]):
    """A mapping that knows its place and that of each key."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.places: dict[str | int, Place] = {}

    def put(self, key: str | int, value: Value, place: Place) -> None:
        self[key] = value
        self.places[key] = place


class Seq(list[Value]):
    """A sequence that knows its place and that of each element."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.places: list[Place] = []

    def put(self, value: Value, place: Place) -> None:
        self.append(value)
        self.places.append(place)


def parse(data: bytes, file: str, *, library: bool = False) -> list[Value]:
    """Return the documents of `data`; raise `RecipeError` with file and line for anything not plain."""
    start = Place(file, 1, library)
    if len(data) > MAX_BYTES:
        raise start.error(f"a recipe of more than {MAX_BYTES} bytes is not read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Place(file, line, library).error("not UTF-8 text") from None
    try:
        return _Reader(text, file, library).documents()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1 if mark else 1, library)
        raise place.error(f"not valid YAML: {escape(error.problem or error.context or error)}") from None
    except yaml.YAMLError as error:
        raise start.error(f"not valid YAML: {escape(str(error).splitlines()[0])}") from None
    except (ValueError, OverflowError):  # PyYAML lets these out for "\UFFFFFFFF" and endless version numbers
        raise start.error("not valid YAML: an escape or a directive holds an impossible number") from None


class _Reader:
    """Builds plain values from PyYAML's event stream, counting every node."""

    def __init__(self, text: str, file: str, library: bool) -> None:
        self.events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.ahead: yaml.Event = next(self.events)
        self.file, self.library = file, library
        self.anchors: dict[str, tuple[Value, int]] = {}
        self.nodes = 0

    def documents(self) -> list[Value]:
        documents: list[Value] = []
        while not isinstance(self.ahead, yaml.StreamEndEvent):
            event = self.take()
            if isinstance(event, yaml.DocumentStartEvent):
                self.anchors = {}
                documents.append(self.value(0))
        return documents

    def take(self) -> yaml.Event:
        event, self.ahead = self.ahead, next(self.events, self.ahead)
        return event

    def place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self.file, mark.line + 1 if mark else 1, self.library)

    def value(self, depth: int) -> Value:
        event = self.take()
        place = self.place(event)
        if depth > MAX_DEPTH:
            raise place.error(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise place.error(f"alias `*{escape(event.anchor)}` has no anchor before it")
            value, size = self.anchors[event.anchor]
            self.count(size, place)
            return value
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            raise place.error("a value is missing here")
        before = self.nodes
        self.count(1, place)
        if event.tag is not None:
            raise place.error(f"tag `{escape(event.tag)}` is not allowed in a recipe")
        value = self.content(event, place, depth)
        if event.anchor:
            self.anchors[event.anchor] = (value, self.nodes - before)
        return value

    def content(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, place: Place, depth: int) -> Value:
        if isinstance(event, yaml.ScalarEvent):
            text: str = event.value
            return scalar(text, place) if event.style is None else text
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(place, depth)
        return self.mapping(place, depth)

    def sequence(self, place: Place, depth: int) -> Seq:
        items = Seq(place)
        while not isinstance(self.ahead, yaml.SequenceEndEvent):
            where = self.place(self.ahead)
            items.put(self.value(depth + 1), where)
        self.take()
        return items

    def mapping(self, place: Place, depth: int) -> Map:
        pairs = Map(place)
        while not isinstance(self.ahead, yaml.MappingEndEvent):
            where = self.place(self.ahead)
            key = self.value(depth + 1)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise where.error("a key must be text or a whole number")
            if key in pairs:
                first = pairs.places[key].line
                raise where.error(f"key `{escape(key)}` appears twice", f"it is first set in line {first}")
            pairs.put(key, self.value(depth + 1), where)
        self.take()
        return pairs

    def count(self, nodes: int, place: Place) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise place.error(f"more than {MAX_NODES} values once aliases are expanded")


def scalar(text: str, place: Place) -> str | int | float | bool | None:
    """Return what every YAML reader makes of the plain scalar `text`, or refuse it."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    old = _yaml_1_1_tag(yaml.ScalarNode, text, (True, False))
    if old == "tag:yaml.org,2002:float" and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if old == "tag:yaml.org,2002:str" and not _CORE_NUMBER.fullmatch(text):
        return text
    shown = escape(text, 60)
    if _NOT_FINITE.fullmatch(text) or (old == "tag:yaml.org,2002:float" and _FLOAT.fullmatch(text)):
        raise place.error(f"`{shown}` is not a finite decimal number")
    if old == "tag:yaml.org,2002:merge":
        raise place.error("merge keys (`<<`) are not allowed in a recipe", "write the keys out")
    if re.fullmatch(r"[-+]?[1-9][0-9]*", text):
        raise place.error(f"`{shown}` is too large a number")
    advice = "write true or false" if old == "tag:yaml.org,2002:bool" else "write numbers as 1000 or 1.0e-3"
    raise place.error(
        f"`{shown}` means different things to different YAML readers", f"{advice}, and quote what is text"
    )
