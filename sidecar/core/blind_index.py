"""Equality of a sealed field: a token stands for (field, value), the same for the same, and says nothing else to who has not the tenant's key.

    token = HMAC-SHA-256(key of the index, LP("ks/blind-index/v1", pointer, value))

The key is the tenant's own and of all its classes, wrapped by its KEK as any other, so it dies with the tenant. It is not a stream's or a
person's: their shred removes the rows.
"""

import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json import JSONDecoder
from typing import Any, Final

from sidecar.core.aead import Secret, lp, wipe
from sidecar.core.errors import MalformedRecord
from sidecar.core.fields import Document, covers
from sidecar.core.model import Scope, ScopeKind

SCOPE_ID: Final = "#blind-index"
"""In `encryption_keys.scope_id`, with kind tenant; no tenant's id begins so."""
_DOMAIN: Final = b"ks/blind-index/v1"
_NUMBER: Final = re.compile(r"(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?)0*(\d*))?", re.ASCII)
_LONGEST_EXPONENT: Final = 1000
"""Digits. What is longer is equal to its own spelling alone."""
_scalar = JSONDecoder().decode


def scope_of_index(tenant: str) -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.TENANT, id=SCOPE_ID)


@dataclass(slots=True, eq=False)
class IndexKey(Secret):
    """One version of a tenant's index key. Owns its bytes; `destroy` wipes them."""

    _secret: bytearray = field(repr=False)

    def token(self, pointer: str, value: bytes) -> bytes:
        """Of a field, by the pointer that policy names it by, and a `canonical` value."""
        return hmac.digest(self._secret, lp(_DOMAIN, pointer.encode(), value), "sha256")

    def destroy(self) -> None:
        wipe(self._secret)


def canonical(json_text: str) -> bytes | None:
    """One spelling per text, number or truth value: 1, 1.0 and 1e0 are equal, "a" and "A" are not. None for null, objects and arrays: not indexed."""
    if json_text[:1] in ("{", "[", "n"):
        return None
    if number := _NUMBER.fullmatch(json_text.strip()):
        return _canonical_number(json_text, *number.groups(""))
    value: Any = _scalar(json_text)
    return b"s" + value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b"b1" if value else b"b0"


def _canonical_number(json_text: str, sign: str, whole: str, part: str, direction: str, exponent: str) -> bytes:
    """Of any size: a producer may write 1e99999999999999999999, which no number type holds."""
    digits = whole + part
    significant = digits.rstrip("0")
    zeros, significant = len(digits) - len(significant), significant.lstrip("0")
    if not significant:
        return b"n0"
    if len(exponent) > _LONGEST_EXPONENT:
        return b"n" + json_text.strip().encode()
    return f"n{sign}{significant}e{int(direction + (exponent or '0')) - len(part) + zeros}".encode()


def tokens(key: IndexKey, document: Document, indexed: Sequence[str]) -> Iterator[bytes]:
    """Of a document's fields that these pointers name, each token once."""
    seen: set[bytes] = set()
    for place in document.places:
        for pointer in indexed:
            if covers(pointer, place.path) and (value := canonical(document.text[place.start : place.end])) is not None:
                token = key.token(pointer, value)
                if token not in seen:
                    seen.add(token)
                    yield token


def searched(json_text: str) -> bytes:
    """What is looked for. Raises MalformedRecord for what no index holds."""
    found = canonical(json_text)
    if found is None:
        raise MalformedRecord("an index finds texts, numbers and truth values")
    return found
