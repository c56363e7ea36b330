"""The value of a tool call's parameter: text, read as the tool's JSON schema says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_TYPES: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}


class Value(NamedTuple):
    """What a text stands for, and whether it is of a type that the schema allows."""

    value: Any
    fits: bool


def parameter_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Per function its parameters' schemas, from definitions in OpenAI's form or bare functions."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        schemas[str(function.get("name"))] = properties if isinstance(properties, Mapping) else {}
    return schemas


def read_value(text: str, schema: Any) -> Value:
    """M2 writes strings as they are and everything else as JSON; without a schema the text stays text."""
    types = list(_types(schema))
    if not types:
        return Value(text, True)
    for name in types:
        if name == "string":
            continue  # whatever the text, it is one: tried last
        if (found := _read(text, _TYPES[name])) is not None:
            return found
    return Value(text, "string" in types)


def _types(schema: Any) -> Iterable[str]:
    """The names of the types that a schema allows, in its order; none where it says nothing of types."""
    if not isinstance(schema, Mapping):
        return
    kind = schema.get("type")
    for name in kind if isinstance(kind, list) else [kind]:
        if name == "string" or (isinstance(name, str) and name in _TYPES):
            yield name
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            yield from _types(branch)
    if kind is None and isinstance(schema.get("enum"), list):
        yield from {_type_of(value): None for value in schema["enum"]}


def _type_of(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    return next(name for name, kinds in _TYPES.items() if isinstance(value, kinds))


def _read(text: str, kinds: tuple[type, ...]) -> Value | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        # Python's spelling is the commonest slip.
        value = {"True": True, "False": False, "None": None}.get(text.strip(), _NOTHING)
    if kinds == (int,) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) and bool not in kinds:
        return None
    return Value(value, True) if isinstance(value, kinds) else None


_NOTHING = object()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
