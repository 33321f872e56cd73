"""What goes into a store and what it answers: new events, expected versions, results. Values, no I/O.

A value is bytes, or anything that is JSON; None is a tombstone. What it was is noted in the event's attributes (`content`), so that a
reader gets back what was appended: 1.0 stays 1.0, b"" stays b"".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from math import isfinite
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from sidecar.core.errors import MalformedRecord, RecordError
from sidecar.core.model import Erased, Event

State = TypeVar("State")
DEFAULT_TENANT = "default"
"""The tenant of an application that has only one."""


class Expected(StrEnum):
    """What a stream must be for an append; a number stands for its version, the position of its last event."""

    ANY = "any"
    NO_STREAM = "no_stream"
    STREAM_EXISTS = "stream_exists"


ExpectedVersion = Expected | int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event to append. `id` is drawn if none is given; `metadata` is the application's and must be JSON.

    `subject` names the person that it is about, where policy protects persons.
    """

    type: str
    data: Any = field(default=None, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    id: str | None = None
    schema_version: int = 1
    occurred_at: datetime | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        if self.occurred_at is not None and self.occurred_at.tzinfo is None:
            raise MalformedRecord("an event's time needs a time zone")
        if not 0 < self.schema_version < 2**31:
            raise MalformedRecord("a schema version is a positive number of 31 bits")


class SealedEvent(NamedTuple):
    """An event as the decorator gives it to a store that keeps envelopes as bytes: ids are checked; up to `is_tombstone` as the row has it."""

    id: str
    type: str
    schema_version: int
    occurred_at: datetime
    document: bytes | None
    """Of which fields are sealed; None where the whole event is."""
    envelope: bytes
    attributes: None
    """They are sealed."""
    is_tombstone: bool
    tokens: tuple[bytes, ...]
    """Of the blind index."""
    aad: bytes
    """What the envelope is bound to. Not stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """Positions of the first and last event, and whether the stream is new."""

    first: int
    last: int
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRead:
    """`version` is the position of the stream's last event, 0 if there is no stream; `events` are what was asked for of it."""

    events: Sequence[Event | Erased]
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregated(Generic[State]):
    """A state, and the version of the stream that it is of."""

    state: State
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """What stands at a place where no event can be read: altered, moved or planted bytes."""

    tenant: str
    stream: str
    position: int
    error: RecordError


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place in a store's global order; events of one transaction stand together, and none appears behind a place already passed."""

    transaction: int = 0
    position: int = 0


class Json(bytes):
    """JSON as text already: kept to the byte, and given back as the JSON that it is."""

    __slots__ = ()


def encode(data: Any) -> tuple[bytes | None, str]:
    """-> the bytes to keep, and what they are. Raises MalformedRecord for what is neither bytes nor JSON."""
    if data is None:
        return None, "json"
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), "json" if isinstance(data, Json) else "bytes"
    try:
        value = orjson.dumps(data)
    except TypeError:
        raise MalformedRecord("an event's data is bytes, or what JSON can hold") from None
    if b"null" in value and _has_no_number(data):
        raise MalformedRecord("an event's data is bytes, or what JSON can hold: NaN and Infinity are not")
    return value, "json"


def _has_no_number(data: Any) -> bool:
    """orjson writes null for NaN and for Infinity."""
    if isinstance(data, float):
        return not isfinite(data)
    if isinstance(data, dict):
        return any(map(_has_no_number, data.values()))
    return isinstance(data, list | tuple) and any(map(_has_no_number, data))


def as_number(expected: ExpectedVersion) -> int:
    """For the store's function: a version, -1 any, -2 the stream exists."""
    if isinstance(expected, Expected):
        return {Expected.ANY: -1, Expected.NO_STREAM: 0, Expected.STREAM_EXISTS: -2}[expected]
    if expected < 0:
        raise ValueError("an expected version is not negative")
    return expected
