"""modelopt's `imports:` and `$import`, resolved without importing modelopt (and so without torch).

Snippets come from modelopt's own collection, the data package `modelopt_recipes`, and from nowhere else: a
recipe cannot reach into the file system.  As in modelopt.torch.opt.config_loader: in a list a bare `$import`
splices a list or appends a mapping; in a mapping it merges what it names and the keys beside it win.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path, PurePosixPath

from m27quant.errors import EnvironmentFault, RecipeError, escape
from m27quant.recipes.strict_model import closest
from m27quant.recipes.strict_yaml import MAX_BYTES, MAX_NODES, Map, Place, Seq, Value, parse

IMPORT = "$import"
MAX_IMPORTS = 16
"""How deep snippets may import snippets."""


def library_root() -> Path | None:
    """Return the folder of modelopt's recipe collection, None without one; nothing in it is executed."""
    spec = importlib.util.find_spec("modelopt_recipes")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def library_file(name: str) -> Path | None:
    """Return the file of modelopt's collection that `name` means, suffix or not; None if there is none."""
    root, parts = library_root(), PurePosixPath(name)
    if root is None or not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        return None
    suffixes = ("",) if name.endswith((".yml", ".yaml")) else (".yml", ".yaml")
    candidates = [root / f"{name}{suffix}" for suffix in suffixes]
    return next((path for path in candidates if exists(path) and path.is_file()), None)


def library_label(path: Path) -> str | None:
    """Return how messages name a file of the collection, None for any other file."""
    root = library_root()
    if root is None or not path.resolve().is_relative_to(root.resolve()):
        return None
    return f"modelopt_recipes/{path.resolve().relative_to(root.resolve())}"


def exists(path: Path) -> bool:
    """Return whether there is such a file; a name that the file system cannot hold is none."""
    try:
        return path.exists()
    except OSError:
        return False


def read_limited(path: Path, label: str) -> bytes:
    """Read a recipe file, never more than the limit; raise `RecipeError` when it cannot be read."""
    try:
        if not path.is_file():
            raise RecipeError(f"{escape(label)}: not a regular file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{escape(label)}: cannot be read: {error.strerror}") from None


def resolve_imports(document: Map) -> Map:
    """Return `document` without its `imports`, every `$import` replaced by what it names."""
    resolver = _Resolver()
    return resolver.mapping(
        _without_imports(document), resolver.names(document.get("imports"), document.place, ())
    )


def _without_imports(source: Map) -> Map:
    body = Map(source.place)
    for key, value in source.items():
        if key != "imports":
            body.put(key, value, source.places[key])
    return body


class _Resolver:
    def __init__(self) -> None:
        self.nodes = 0

    def names(self, imports: Value, place: Place, loading: tuple[str, ...]) -> dict[str, Value]:
        """Load what an `imports` section declares."""
        if imports is None:
            return {}
        if not isinstance(imports, Map):
            raise place.error("`imports` must map names to files of modelopt's collection")
        loaded: dict[str, Value] = {}
        for name, target in imports.items():
            where = imports.places[name]
            if not isinstance(name, str) or not isinstance(target, str):
                raise where.error("`imports` must map names to files of modelopt's collection")
            loaded[name] = self.snippet(target, where, loading)
        return loaded

    def snippet(self, target: str, place: Place, loading: tuple[str, ...]) -> Value:
        path = library_file(target)
        if path is None and library_root() is None:
            raise EnvironmentFault(
                f"{place}: the recipe imports from modelopt's collection, which is not installed",
                hint="pip install nvidia-modelopt",
            )
        if path is None:
            raise place.error(
                f"`{escape(target)}` is not in modelopt's recipe collection",
                "imports reach that collection only; write your own snippets into the recipe",
            )
        key = str(path)
        if key in loading or len(loading) >= MAX_IMPORTS:
            raise place.error(f"`{escape(target)}` is imported in a circle")
        label = library_label(path) or target
        documents = parse(read_limited(path, label), label, library=True)
        header, body = (documents[0], documents[-1]) if documents else (None, None)
        if isinstance(body, Map) and "imports" in body:
            header, body = body, _without_imports(body)
        imports = header.get("imports") if isinstance(header, Map) else None
        return self.value(body, self.names(imports, place, (*loading, key)))

    def value(self, value: Value, names: dict[str, Value]) -> Value:
        if isinstance(value, Seq):
            return self.sequence(value, names)
        if isinstance(value, Map):
            return self.mapping(value, names)
        return value

    def sequence(self, source: Seq, names: dict[str, Value]) -> Seq:
        result = Seq(source.place)
        for item, place in zip(source, source.places, strict=True):
            self.count(place)
            if isinstance(item, Map) and list(item) == [IMPORT]:
                found = self.lookup(item[IMPORT], names, place)
                if isinstance(found, Seq):
                    for inner, inner_place in zip(found, found.places, strict=True):
                        result.put(inner, inner_place)
                else:
                    result.put(found, found.place if isinstance(found, Map) else place)
            else:
                result.put(self.value(item, names), place)
        return result

    def mapping(self, source: Map, names: dict[str, Value]) -> Map:
        result = Map(source.place)
        if IMPORT in source:
            place = source.places[IMPORT]
            wanted = source[IMPORT]
            for name in wanted if isinstance(wanted, Seq) else [wanted]:
                found = self.lookup(name, names, place)
                if not isinstance(found, Map):
                    raise place.error(f"`{escape(name)}` is not a mapping and cannot be merged into one")
                for key, item in found.items():
                    result.put(key, item, found.places[key])
        for key, item in source.items():
            self.count(source.places[key])
            if key != IMPORT:
                result.put(key, self.value(item, names), source.places[key])
        return result

    def lookup(self, name: Value, names: dict[str, Value], place: Place) -> Value:
        if isinstance(name, str) and name in names:
            return names[name]
        near = closest(name, list(names))
        raise place.error(
            f"`{IMPORT}: {escape(name)}` names nothing that `imports` declares",
            f"did you mean `{near}`?" if near else None,
        )

    def count(self, place: Place) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise place.error(f"more than {MAX_NODES} values once imports are resolved")
