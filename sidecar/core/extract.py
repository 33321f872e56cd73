"""A source record's identity: who (tenant), where (stream), what (type), which (id), by configured extractors.

    header:NAME   json:/pointer   key   topic:REGEX (its first group)   const:VALUE

In CloudEvents structured mode (content-type application/cloudevents+json) `header:ce_NAME` reads the attribute NAME of the
document: the Kafka binding's names, whatever the mode. Where a header stands twice its last value counts.
The value is read for that, never changed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import orjson

from sidecar.core.errors import MalformedRecord
from sidecar.core.model import identifier, tenant_id
from sidecar.core.view import LAST_MS

STRUCTURED = b"application/cloudevents+json"
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a source says of a record; all four were checked."""

    tenant: str
    stream: str
    type: str
    message_id: str


class _Input:
    """One record, seen by extractors; its value is parsed at most once, and only if one asks."""

    __slots__ = ("_document", "headers", "key", "topic", "value")

    def __init__(self, topic: str, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes | None]) -> None:
        self.topic, self.key, self.value, self.headers = topic, key, value, headers
        self._document: Any = None

    def document(self) -> Any:
        if self._document is None:
            try:
                self._document = orjson.loads(self.value or b"")
            except orjson.JSONDecodeError:
                raise MalformedRecord("the value is no JSON, where an extractor points into it") from None
        return self._document


_Extract = Callable[[_Input], bytes | None]


def _as_bytes(found: Any) -> bytes | None:
    """A string as it is, a whole number as its digits; anything else names nothing."""
    if isinstance(found, str):
        return found.encode("utf-8", "surrogatepass")
    return b"%d" % found if isinstance(found, int) and not isinstance(found, bool) else None


def _pointer(path: str) -> _Extract:
    """RFC 6901."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in path[1:].split("/")]

    def extract(record: _Input) -> bytes | None:
        here = record.document()
        for part in parts:
            if isinstance(here, dict):
                here = here.get(part)
            elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
                here = here[int(part)]
            else:
                return None
        return _as_bytes(here)

    return extract


def _header(name: str) -> _Extract:
    attribute = name.removeprefix("ce_")

    def extract(record: _Input) -> bytes | None:
        if attribute != name and (record.headers.get("content-type") or b"").startswith(STRUCTURED):
            document = record.document()
            return _as_bytes(document.get(attribute)) if isinstance(document, dict) else None
        return record.headers.get(name)

    return extract


def _topic(pattern: str) -> _Extract:
    compiled = re.compile(pattern)

    def extract(record: _Input) -> bytes | None:
        match = compiled.fullmatch(record.topic)
        return match.group(1).encode() if match and match.groups() and match.group(1) is not None else None

    return extract


def compile_extractor(text: str) -> _Extract:
    """Raises ValueError for one that is none."""
    kind, _, rest = text.partition(":")
    if text == "key":
        return lambda record: record.key
    if kind == "header" and rest:
        return _header(rest)
    if kind == "json" and rest.startswith("/"):
        return _pointer(rest)
    if kind == "topic" and rest:
        return _topic(rest)
    if kind == "const" and rest:
        constant = rest.encode()
        return lambda record: constant
    raise ValueError(f"{text!r} is no extractor")


@lru_cache(1000)
def _compiled(text: str) -> _Extract:
    return compile_extractor(text)


def subject_of(extractor: str, topic: str, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes | None]) -> str:
    """The person that a record is about. Raises MalformedRecord where the extractor finds nobody, or what no identifier can be.

    Such a record is not sealed under some other key instead: a shred of the person would not reach it, and nobody would know.
    """
    return identifier(_compiled(extractor)(_Input(topic, key, value, headers)) or b"", "subject id")


class Extractor:
    """The identity of one source's records. Raises MalformedRecord with the dead letter's reason."""

    __slots__ = ("_any_tenant", "_id", "_plain_headers", "_stream", "_tenant", "_tenants", "_type")

    def __init__(self, *, tenant: str, stream: str, type: str, id: str | None, tenants: Sequence[str] = ("*",)) -> None:
        self._tenant, self._stream, self._type = compile_extractor(tenant), compile_extractor(stream), compile_extractor(type)
        self._id = compile_extractor(id) if id is not None else None
        self._tenants = tuple(tenants)
        self._any_tenant = "*" in self._tenants
        texts = (tenant, stream, type, id or "")
        self._plain_headers = tuple(text.removeprefix("header:") for text in texts) if all(t.startswith("header:") for t in texts) else None

    def raw(
        self, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes | None]
    ) -> tuple[bytes | None, bytes | None, bytes | None, bytes | None]:
        """tenant, stream, type, id as they stand, unchecked: the hot path has checked the same bytes before."""
        names = self._plain_headers
        if names is not None and "content-type" not in headers:
            get = headers.get
            return get(names[0]), get(names[1]), get(names[2]), get(names[3])
        record = _Input(topic, key, value, headers)
        # the tenant first: what fails after it can be sealed under the tenant's key
        tenant = self._tenant(record)
        message_id = self._id(record) if self._id is not None else f"{topic}/{partition}/{offset}".encode()
        return tenant, self._stream(record), self._type(record), message_id

    def check_tenant(self, raw: bytes | None) -> str:
        if not raw:
            raise MalformedRecord("the record names no tenant", reason="no_tenant")
        try:
            tenant = tenant_id(raw.decode("ascii"))
        except UnicodeDecodeError:
            raise MalformedRecord("tenant id: not ASCII", reason="bad_tenant") from None
        if not self._any_tenant and not any(fnmatchcase(tenant, allowed) for allowed in self._tenants):
            raise MalformedRecord("this topic may not speak for that tenant (sources[].tenants)", reason="bad_tenant")
        return tenant

    @staticmethod
    def check_stream(raw: bytes | None) -> str:
        return identifier(raw or b"", "stream id", "bad_stream")

    @staticmethod
    def check_type(raw: bytes | None) -> str:
        return identifier(raw or b"", "type")

    @staticmethod
    def check_message_id(raw: bytes | None) -> str:
        return identifier(raw or b"", "message id")

    def identify(
        self, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes | None]
    ) -> Identity:
        """All at once: for single records."""
        tenant, stream, type_, message_id = self.raw(topic, partition, offset, key, value, headers)
        return Identity(
            tenant=self.check_tenant(tenant),
            stream=self.check_stream(stream),
            type=self.check_type(type_),
            message_id=self.check_message_id(message_id),
        )


def occurred_at(headers: Mapping[str, bytes | None], timestamp_ms: int) -> int:
    """Microseconds since 1970: CloudEvents `time` where it is well-formed, else the record's timestamp."""
    raw = headers.get("ce_time")
    if raw:
        try:
            moment = datetime.fromisoformat(raw.decode("ascii"))
            if moment.tzinfo is not None:
                # an offset can move it out of the calendar: Postgres would take it, and no reader could read the row
                return (moment.astimezone(UTC) - _EPOCH) // _MICROSECOND
        except (ValueError, OverflowError):
            pass
    return min(max(timestamp_ms, 0), LAST_MS) * 1000  # a producer may write any number, Postgres and Python end somewhere
