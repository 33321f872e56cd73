"""Named fields of a JSON document, sealed one by one; the rest of it stays JSON that SQL can ask (docs/FORMAT.md).

A field's JSON text is cut out of the document and a string put in its place, `"ks1.…"`; opened, the text goes back where it was. Nothing else
of the document is written anew, so what a reader gets is what was appended, to the byte: white space, order of names, numbers of any size.

    stored:    {"email":"ks1.S1MBAQ…","plan":"pro"}
    envelope:  attributes ‖ where the fields stand, bound to the SHA-256 of the stored document

The envelope beside the document says which of its strings are fields, and no byte of the document can change without its failing to open.
A name that stands twice in one object is refused: parsers disagree about which one counts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from json import JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple, NoReturn

import orjson

from sidecar.core.aead import lp
from sidecar.core.envelope import NO_FIELD, PREFIX_BYTES, field_prefix, from_text, to_text
from sidecar.core.errors import AuthenticationFailed, MalformedRecord
from sidecar.core.model import Event
from sidecar.core.view import frame

MAX_DEPTH: Final = 32
"""Names in a pointer."""
REASON: Final = "bad_document"
"""Of the dead letter that a record becomes whose fields cannot be told apart from the rest."""
_INDEX: Final = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_POINTER: Final = re.compile(r"(/([^/~]|~[01])*)+")
_SPACE: Final = re.compile(r"[ \t\n\r]*")

Bind = Callable[[bytes, bytes], bytes]
"""(field path or digest of the document, behind its length; envelope prefix) → associated data of the event's place."""
Seal = Callable[[bytes, bytes, bytes], bytes]
"""(prefix, associated data, plaintext) → envelope."""
Open = Callable[[bytes, bytes], bytes]
"""(envelope, associated data) → plaintext. Raises AuthenticationFailed."""


class Place(NamedTuple):
    """Where a field stands in the text of its document: from `start` up to `end`."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Document:
    """A document and its fields, in the order of its text."""

    text: str
    places: tuple[Place, ...]

    def values(self) -> Iterator[tuple[Place, str]]:
        """Each field's JSON text."""
        return ((place, self.text[place.start : place.end]) for place in self.places)


@dataclass(frozen=True, slots=True)
class Fields:
    """JSON pointers (RFC 6901) into a document; `*` stands for every name or index. Raises ValueError for what is none, or for two that can meet.

    `indexed`: those of them whose values can be searched for (core/blind_index.py).
    """

    pointers: tuple[str, ...]
    indexed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pointer in self.pointers:
            if not _POINTER.fullmatch(pointer):
                raise ValueError(f"{pointer!r} is no JSON pointer to a field: write /name, /name/0 or /name/*/name; ~1 is a slash, ~0 a tilde")
            if pointer.count("/") > MAX_DEPTH:
                raise ValueError(f"{pointer!r} goes deeper than {MAX_DEPTH} names")
        for n, one in enumerate(self.pointers):
            for other in self.pointers[:n]:
                if all(a == b or "*" in (a, b) for a, b in zip(_names(one), _names(other), strict=False)):
                    raise ValueError(f"{other!r} and {one!r} can name the same field, or one lies in the other: keep one of them")

        if unknown := [pointer for pointer in self.indexed if pointer not in self.pointers]:
            raise ValueError(f"blind_index: {unknown[0]!r} is not among the fields")

    def find(self, value: bytes) -> Document:
        """The fields that are there; one that is absent, or whose parent is null, is none. Raises MalformedRecord (`bad_document`).

        For bytes that are no JSON, a name that stands twice, or a pointer that meets something that can hold no field.
        """
        try:
            text = value.decode()
            walk = _Walk(text)
            end = walk.value(_space(text, 0), "", [_names(pointer) for pointer in self.pointers])
            if _space(text, end) != len(text):
                _no_json()
            for place in walk.places:
                place.path.encode()
        except (ValueError, RecursionError):
            raise MalformedRecord("no JSON document whose fields can be sealed", reason=REASON) from None
        return Document(text, tuple(walk.places))


def seal_document(found: Document, attributes: bytes, prefix: bytes, bind: Bind, seal: Seal) -> tuple[bytes, bytes]:
    """-> the document as it is stored, and the envelope that stands beside it."""
    of_field = field_prefix(prefix)
    out: list[bytes] = []
    places: list[tuple[str, int]] = []
    size = at = 0
    for place, plaintext in found.values():
        text = to_text(seal(of_field, bind(lp(place.path.encode()), of_field), plaintext.encode()))
        clear = found.text[at : place.start].encode()
        places.append((place.path, size + len(clear)))
        out.append(piece := b'%b"%b"' % (clear, text.encode()))
        size, at = size + len(piece), place.end
    stored = b"".join((*out, found.text[at:].encode()))
    return stored, seal(prefix, bind(digest_lp(stored), prefix), frame(attributes, orjson.dumps(places)))


def open_document(stored: bytes, places: bytes, prefix: bytes, bind: Bind, open_: Open) -> Document:
    """The document as it was appended; `places` is the value of its opened envelope, so `stored` is what was sealed for this event."""
    of_field, out, found = field_prefix(prefix), list[str](), list[Place]()
    at = size = 0
    for path, start in orjson.loads(places):
        end = stored.index(b'"', start + 1)
        envelope = from_text(stored[start + 1 : end].decode())
        if envelope[:PREFIX_BYTES] != of_field:
            raise AuthenticationFailed("a field is under another key than its event")
        clear, field = stored[at:start].decode(), open_(envelope, bind(lp(path.encode()), of_field)).decode()
        out += (clear, field)
        size += len(clear) + len(field)
        found.append(Place(path, size - len(field), size))
        at = end + 1
    return Document("".join((*out, stored[at:].decode())), tuple(found))


def with_document(event: Event, stored: bytes, prefix: bytes, bind: Bind, open_: Open) -> Event:
    """An event whose envelope was opened, with its document in the place of the list of its fields."""
    return replace(event, value=open_document(stored, event.value or b"", prefix, bind, open_).text.encode())


def digest_lp(stored: bytes | None) -> bytes:
    """What an event's own envelope is bound to in place of a field path: nothing for a whole event, else the document beside it."""
    return NO_FIELD if stored is None else lp(sha256(stored).digest())


class _Walk:
    """Down along the pointers; what lies beside them is read over by the C scanner, which looks for names that stand twice, too."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.places: list[Place] = []

    def value(self, at: int, path: str, wanted: list[list[str]]) -> int:
        """-> where the value ends. `wanted`: pointers that lead here, and what is left of each."""
        kind = self._text[at : at + 1]
        if not wanted or not wanted[0] or kind not in ("{", "["):
            end: int = _skip(self._text, at)[1]
            if wanted and not wanted[0]:
                self.places.append(Place(path, at, end))
            elif wanted and self._text[at:end] != "null":
                raise ValueError("a pointer meets something that can hold no field")
            return end
        return self._members(at, path, wanted) if kind == "{" else self._elements(at, path, wanted)

    def _members(self, at: int, path: str, wanted: list[list[str]]) -> int:
        text, names = self._text, set()
        at = _space(text, at + 1)
        if text[at : at + 1] == "}":
            return at + 1
        while True:
            if text[at : at + 1] != '"':
                _no_json()
            name, at = scanstring(text, at + 1, True)
            if name in names:
                raise ValueError("a name stands twice")
            names.add(name)
            at = _space(text, at)
            if text[at : at + 1] != ":":
                _no_json()
            at = _space(text, self.value(_space(text, at + 1), f"{path}/{_escaped(name)}", _below(wanted, name)))
            if text[at : at + 1] == "}":
                return at + 1
            at = self._comma(at)

    def _elements(self, at: int, path: str, wanted: list[list[str]]) -> int:
        text, number = self._text, 0
        if any(left[0] != "*" and not _INDEX.fullmatch(left[0]) for left in wanted):
            raise ValueError("a pointer names a member, and meets an array")
        at = _space(text, at + 1)
        if text[at : at + 1] == "]":
            return at + 1
        while True:
            at = _space(text, self.value(at, f"{path}/{number}", _below(wanted, str(number))))
            if text[at : at + 1] == "]":
                return at + 1
            at, number = self._comma(at), number + 1

    def _comma(self, at: int) -> int:
        if self._text[at : at + 1] != ",":
            _no_json()
        return _space(self._text, at + 1)


def _below(wanted: Sequence[list[str]], name: str) -> list[list[str]]:
    return [left[1:] for left in wanted if left[0] in (name, "*")]


def covers(pointer: str, path: str) -> bool:
    """Does the pointer, with its wildcards, name the place?"""
    names, steps = pointer.split("/"), path.split("/")
    return len(names) == len(steps) and all(name in ("*", step) for name, step in zip(names, steps, strict=True))


def _names(pointer: str) -> list[str]:
    return [name.replace("~1", "/").replace("~0", "~") for name in pointer[1:].split("/")]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _no_json(*_: object) -> NoReturn:
    raise ValueError("no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")


# Numbers stay text: none of them is too long, and none is rounded. NaN and Infinity are no JSON.
_skip = JSONDecoder(object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=_no_json).raw_decode
