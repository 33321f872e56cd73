"""The words of the product as values: identifiers, scopes, records (from Kafka) and events (stored)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson

from sidecar.core.errors import MalformedRecord

_TENANT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
MAX_ID_BYTES = 255
UNCLASSIFIED = "unclassified"
"""The class of a stream that no class rule names; `policies.unmatched` decides about it unless a policy names it."""

Headers = Sequence[tuple[str, bytes | None]]


def tenant_id(raw: str) -> str:
    """`raw` as it is, or MalformedRecord: ids are never normalised, normalising merges tenants."""
    if not _TENANT_ID.fullmatch(raw):
        raise MalformedRecord("tenant id: 1 to 100 of A-Z a-z 0-9 . _ - and a letter or digit first", reason="bad_tenant")
    return raw


def identifier(raw: bytes, what: str, reason: str = "malformed") -> str:
    """A stream, message or type id from its bytes: 1 to 255 bytes of printable UTF-8, taken as they come."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or len(raw) > MAX_ID_BYTES or not text.isprintable():
        raise MalformedRecord(f"{what}: 1 to {MAX_ID_BYTES} bytes of printable UTF-8", reason=reason)
    return text


def duration_ms(text: str) -> int:
    """`7d`, `1h`, `30m`, `45s`, `500ms` in milliseconds; ValueError for anything else."""
    units = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
    number = text.rstrip("dhms")
    unit = text[len(number) :]
    if unit not in units or not number.isdigit():
        raise ValueError(f"{text!r} is no duration; write 7d, 1h, 30m, 45s or 500ms")
    return int(number) * units[unit]


class ScopeKind(StrEnum):
    """What one key protects."""

    STREAM = "stream"
    CLASS = "class"
    TENANT = "tenant"
    SUBJECT = "subject"

    @property
    def code(self) -> int:
        """Bits 0-1 of an envelope's flags."""
        return _SCOPE_CODES[self]

    @classmethod
    def from_code(cls, code: int) -> "ScopeKind":
        return _SCOPES_BY_CODE[code & 3]


_SCOPE_CODES = {ScopeKind.STREAM: 0, ScopeKind.CLASS: 1, ScopeKind.TENANT: 2, ScopeKind.SUBJECT: 3}
_SCOPES_BY_CODE = {code: kind for kind, code in _SCOPE_CODES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a key protects or a command is about, within its tenant; `id` repeats the tenant for kind tenant."""

    tenant: str
    kind: ScopeKind
    id: str

    @classmethod
    def of_tenant(cls, tenant: str) -> "Scope":
        """The whole tenant."""
        return cls(tenant=tenant, kind=ScopeKind.TENANT, id=tenant)

    def to_json(self) -> dict[str, str]:
        """As in messages.md: no id for a tenant."""
        head = {"tenant": self.tenant, "kind": self.kind.value}
        return head if self.kind is ScopeKind.TENANT else {**head, "id": self.id}

    def __str__(self) -> str:
        return f"tenant {self.tenant}" if self.kind is ScopeKind.TENANT else f"{self.kind} {self.id} of tenant {self.tenant}"


@dataclass(slots=True)
class Record:
    """One source record, parsed. Not frozen: it is built once per event on the hot path, and nobody writes to it after."""

    topic: str
    partition: int
    offset: int
    tenant: str
    stream: str
    message_id: str
    type: str
    value: bytes | None
    key: bytes | None
    timestamp_ms: int
    headers: Headers
    occurred_at: datetime | None = None
    schema_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRef:
    """Names one version of one key, nothing more."""

    tenant: str
    key_id: UUID
    version: int


@dataclass(slots=True, kw_only=True, unsafe_hash=True)
class Event:
    """A stored event, opened: `value` is the application's bytes, None for a tombstone; `data` is what they say. Its repr shows none of it."""

    tenant: str
    stream: str
    position: int
    message_id: str
    type: str
    stream_class: str
    value: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)
    timestamp_ms: int
    headers: Headers = field(repr=False)
    source: tuple[str, int, int] | None
    schema_version: int = 1
    occurred_at: datetime | None = None
    subject: str | None = None
    """Whose key it is sealed under, where that is a person's."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What an application gave along; `enc` says how the event is stored, where it is encrypted."""
    content: str | None = None
    """`json` or `bytes` of events that a library appended; None: from Kafka, nobody said."""
    sealed: bytes | None = field(default=None, repr=False)
    """The envelope of an encrypted event that nobody has opened; then there is no value, or the document with its fields sealed."""

    @property
    def data(self) -> Any:
        """The value as it was appended; of an event from Kafka the JSON that it is, else its bytes; unopened, the envelope's text form, or the
        document with `ks1.` texts for its sealed fields."""
        if self.sealed is not None and self.value is None:
            from sidecar.core.envelope import to_text  # which knows this module

            return to_text(self.sealed)
        if self.value is None or self.content == "bytes":
            return self.value
        try:
            return orjson.loads(self.value)
        except orjson.JSONDecodeError:
            return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What a reader gets in place of an event whose key was destroyed."""

    tenant: str
    stream: str
    position: int
    message_id: str
    type: str
