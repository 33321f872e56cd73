"""Which fields of an event a schema calls sensitive: JSON Schema and Avro, as JSON pointers for a policy's `fields`.

    a field is marked by        x-sensitive, x-pii                    anything but false or null
                                confluent:tags, tags                  a list with one of the tags that are asked for
    names, array items, maps    /name, /*, /*                         also of patternProperties, tuples and unions' branches

Fail closed: what cannot be said exactly is said by a pointer that names more, and what cannot be said at all (another document, a schema that
contains itself and is marked within) is an error, never a field that is passed over. Pointers are into the plain JSON form of an Avro record;
Avro's own JSON encoding puts the values of unions one level deeper.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, NoReturn

from sidecar.core.errors import ConfigurationError

DEFAULT_TAGS: Final = ("PII", "SENSITIVE")
WHOLE: Final = ""
"""The pointer of the document itself."""

_AVRO_COMPLEX: Final = ("record", "error", "map", "enum", "fixed")
_AVRO_SIMPLE: Final = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
_SAME_PLACE: Final = ("allOf", "anyOf", "oneOf")
_SAME_PLACE_ONE: Final = ("if", "then", "else")
_SAME_PLACE_MAP: Final = ("dependentSchemas", "dependencies")
_BELOW: Final = ("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties")
_SCHEMA_WORDS: Final = ("$schema", "properties", "$ref", "patternProperties", *_SAME_PLACE, *_SAME_PLACE_ONE, *_SAME_PLACE_MAP, *_BELOW)

Names = tuple[str, ...]


def sensitive_fields(schema: Any, tags: Collection[str] = DEFAULT_TAGS) -> tuple[str, ...]:
    """Pointers, sorted; no two can name the same field. `("",)`: the whole document. Raises ConfigurationError: what, where, how to mend."""
    marked = _Marks(tags)
    try:
        if _is_avro(schema):
            found = set(_Avro(schema, marked).fields(schema, ()))
        elif isinstance(schema, Mapping) and any(word in schema for word in _SCHEMA_WORDS):
            found = set(_JsonSchema(schema, marked).fields(schema, ()))
        else:
            raise ConfigurationError("this is neither JSON Schema nor Avro", where="the schema", mend="give the schema's own document")
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigurationError("the schema is malformed", where="the schema", mend="check it with its own tools") from None
    return tuple(sorted("".join(f"/{name}" for name in names) for names in _apart(found)))


def _is_avro(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return isinstance(schema, list | str)
    kind = schema.get("type")
    return kind in _AVRO_COMPLEX or (kind == "array" and "items" in schema and not isinstance(schema["items"], list) and _is_avro(schema["items"]))


class _Marks:
    """Whether a place is marked as sensitive."""

    def __init__(self, tags: Collection[str]) -> None:
        self._tags = {tag.casefold() for tag in tags}

    def __call__(self, node: Mapping[str, Any]) -> bool:
        if any(node.get(word) not in (None, False) for word in ("x-sensitive", "x-pii")):
            return True
        return any(str(tag).strip().casefold() in self._tags for word in ("confluent:tags", "tags") for tag in _listed(node.get(word)))


class _Expanded:
    """A named part of a schema, put in where it is referred to; one that contains itself has no end, and pointers cannot follow it."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._endless: set[str] = set()

    def __call__(self, name: str, inside: Callable[[], Iterator[Names]]) -> Iterator[Names]:
        if name in self._open:
            self._endless.add(name)
            return
        self._open.append(name)
        found = list(inside())
        self._open.pop()
        if name in self._endless and found:
            raise ConfigurationError(
                "a part that contains itself has sensitive fields: no list of pointers names them all", where=name,
                mend="leave `fields` out of the policy: then the whole event is encrypted",
            )  # fmt: skip
        yield from found


class _JsonSchema:
    """Drafts 4 to 2020-12."""

    def __init__(self, document: Mapping[str, Any], marked: _Marks) -> None:
        self._document, self._marked, self._expanded = document, marked, _Expanded()
        self._anchors = {
            str(node[word]): node for node in _nodes(document) for word in ("$anchor", "$dynamicAnchor") if isinstance(node.get(word), str)
        }
        self._ids = {str(node[word]): node for node in _nodes(document) for word in ("$id", "id") if isinstance(node.get(word), str)}

    def fields(self, node: Any, at: Names) -> Iterator[Names]:
        if not isinstance(node, Mapping):
            return  # true, false
        if self._marked(node):
            yield at
            return
        for word in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(name := node.get(word), str):
                target = self._find(name)
                yield from self._expanded(name, lambda target=target: self.fields(target, at))  # type: ignore[misc]
        for name, child in _mapped(node.get("properties")):
            yield from self.fields(child, (*at, _escaped(name)))
        for word in _BELOW:
            for child in _each(node.get(word)):
                yield from self.fields(child, (*at, "*"))
        for _, child in _mapped(node.get("patternProperties")):
            yield from self.fields(child, (*at, "*"))
        for child in self._here(node):
            yield from self.fields(child, at)

    @staticmethod
    def _here(node: Mapping[str, Any]) -> Iterator[Any]:
        for word in _SAME_PLACE:
            yield from _each(node.get(word))
        for word in _SAME_PLACE_ONE:
            yield node.get(word)
        for word in _SAME_PLACE_MAP:
            yield from (child for _, child in _mapped(node.get(word)))

    def _find(self, name: str) -> Any:
        if name in self._ids:
            return self._ids[name]
        before, _, fragment = name.partition("#")
        if before and before != self._document.get("$id", self._document.get("id")):
            _elsewhere(name)
        if fragment in self._anchors:
            return self._anchors[fragment]
        node: Any = self._document
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(step)] if isinstance(node, list) else node[step]
            except (KeyError, IndexError, ValueError, TypeError):
                _elsewhere(name)
        if fragment and not fragment.startswith("/"):
            _elsewhere(name)
        return node


class _Avro:
    """A schema, with the records that it defines; one that it only names must be defined in it."""

    def __init__(self, schema: Any, marked: _Marks) -> None:
        self._marked, self._expanded = marked, _Expanded()
        self._named: dict[str, tuple[Mapping[str, Any], str]] = {}
        self._define(schema, "")

    def _define(self, schema: Any, namespace: str) -> None:
        for branch in schema if isinstance(schema, list) else [schema]:
            if not isinstance(branch, Mapping):
                continue
            if isinstance(name := branch.get("name"), str) and branch.get("type") in _AVRO_COMPLEX:
                full = _full(name, branch.get("namespace", namespace))
                namespace = full.rpartition(".")[0]
                self._named[full] = (branch, namespace)
            for inner in (*_each(branch.get("fields")), branch.get("items"), branch.get("values"), branch.get("type")):
                if isinstance(inner, Mapping | list):
                    self._define(inner, namespace)

    def fields(self, schema: Any, at: Names, namespace: str = "") -> Iterator[Names]:
        if isinstance(schema, list):
            for branch in schema:
                yield from self.fields(branch, at, namespace)
        elif isinstance(schema, str):
            yield from self._by_name(schema, at, namespace)
        elif not isinstance(schema, Mapping):
            raise ConfigurationError("a type is neither a name nor a schema", where="/".join(at) or "the schema", mend="mend the Avro schema")
        elif self._marked(schema):
            yield at
        elif schema.get("type") in ("record", "error"):
            full = _full(str(schema.get("name")), schema.get("namespace", namespace))
            yield from self._expanded(full, lambda: self._record(schema, at, full.rpartition(".")[0]))
        elif (kind := schema.get("type")) in ("array", "map"):
            yield from self.fields(schema.get("items" if kind == "array" else "values"), (*at, "*"), namespace)
        elif isinstance(kind, Mapping | list) or (isinstance(kind, str) and kind not in ("enum", "fixed")):
            yield from self.fields(kind, at, namespace)

    def _record(self, schema: Mapping[str, Any], at: Names, namespace: str) -> Iterator[Names]:
        for field in _each(schema.get("fields")):
            place = (*at, _escaped(str(field["name"])))
            if self._marked(field):
                yield place
            else:
                yield from self.fields(field["type"], place, namespace)

    def _by_name(self, name: str, at: Names, namespace: str) -> Iterator[Names]:
        if name in _AVRO_SIMPLE:
            return
        found = self._named.get(_full(name, namespace), self._named.get(name))
        if found is None:
            _elsewhere(name)
        yield from self.fields(found[0], at, found[1])


def _apart(found: set[Names]) -> set[Names]:
    """Where two can name the same field, or one a part of the other's, one that names both in their place."""
    while True:
        for one in found:
            for other in found - {one}:
                if all(a == b or "*" in (a, b) for a, b in zip(one, other, strict=False)):
                    both = tuple(a if a == b else "*" for a, b in zip(one, other, strict=False))
                    found = (found - {one, other}) | {both}
                    break
            else:
                continue
            break
        else:
            return found


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _nodes(child)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _mapped(value: Any) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, Mapping) else ()


def _listed(tags: Any) -> list[Any]:
    return tags.split(",") if isinstance(tags, str) else _each(tags)


def _full(name: str, namespace: Any) -> str:
    return f"{namespace}.{name}" if namespace and "." not in name else name


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _elsewhere(name: str) -> NoReturn:
    raise ConfigurationError("the schema refers to what does not stand in it", where=name, mend="bundle the schema into one document")
