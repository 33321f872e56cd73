"""What stands in a view record: attributes sealed beside the value, headers rebuilt from the row, key and partition.

A view record is the same to the byte whether it is projected from the source record or, on a replay, from the store:
both paths call these functions with the same inputs.
"""

import base64
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope, MalformedRecord
from sidecar.core.model import Event, Headers

ERASED_TYPE = "io.sidecar.erased.v1"

OWN_HEADERS = frozenset(
    {
        "ce_specversion",
        "ce_id",
        "ce_type",
        "ce_tenantid",
        "ce_streamid",
        "ce_streamtype",
        "ce_streamposition",
        "ce_sourcetopic",
        "ce_sourcepartition",
        "ce_sourceoffset",
    }
)
"""Never trusted on input, always written on output; `ce_source` and `ce_time` are the application's and are kept."""

SUBJECT_HEADER = "ce_subjectid"
"""Ours on output where a policy names the event's person, whatever stood there; the application's own elsewhere, and kept."""

_LENGTH = struct.Struct(">I")
LAST_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the last moment that Python's calendar holds."""


def _text(raw: bytes | None) -> str | dict[str, str] | None:
    """Bytes as JSON: a string where they are UTF-8 without NUL (JSONB cannot hold one), else base64 in an object."""
    if raw is None:
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(raw).decode()}
    return {"b64": base64.b64encode(raw).decode()} if "\0" in text else text


def _bytes(text: Any) -> bytes | None:
    if text is None:
        return None
    return base64.b64decode(text["b64"]) if isinstance(text, dict) else str(text).encode()


class Attributes(NamedTuple):
    """What a record carries beside its value. `subject`: the person under whose key it is sealed, if it is a person's.

    `metadata` and `content` (`json` or `bytes`) are of events that an application appended through the library.
    """

    key: bytes | None
    timestamp_ms: int
    headers: list[tuple[str, bytes | None]]
    is_tombstone: bool
    subject: str | None
    metadata: dict[str, Any]
    content: str | None


def attributes(key: bytes | None, timestamp_ms: int, headers: Headers, is_tombstone: bool, subject: str | None = None) -> bytes:
    """Of a Kafka record, as JSON: key, timestamp (ms since 1970, UTC), headers that are not ours."""
    out: dict[str, Any] = {"key": _text(key), "timestamp": timestamp_ms}
    kept = [[_name(name), _text(value)] for name, value in headers if name not in OWN_HEADERS]
    if kept:
        out["headers"] = kept
    if is_tombstone:
        out["tombstone"] = True
    if subject is not None:
        out["subject"] = subject
    return orjson.dumps(out)


def library_attributes(timestamp_ms: int, metadata: Mapping[str, Any], content: str, is_tombstone: bool, subject: str | None) -> bytes:
    """Of an event that an application appended, as JSON. Raises MalformedRecord for metadata that are none, and does not quote them."""
    out: dict[str, Any] = {"key": None, "timestamp": timestamp_ms, "content": content}
    if metadata:
        out["metadata"] = dict(metadata)
    if is_tombstone:
        out["tombstone"] = True
    if subject is not None:
        out["subject"] = subject
    try:
        return orjson.dumps(out)
    except TypeError:
        raise MalformedRecord("an event's metadata are what JSON can hold") from None


def _name(name: str) -> str | dict[str, str]:
    return {"b64": base64.b64encode(name.encode()).decode()} if "\0" in name else name


def parse_attributes(raw: bytes | str | dict[str, Any]) -> Attributes:
    get = (raw if isinstance(raw, dict) else orjson.loads(raw)).get
    headers = get("headers")
    return Attributes(
        _bytes(get("key")),
        get("timestamp", 0),
        [((_bytes(name) or b"").decode(), _bytes(value)) for name, value in headers] if headers else [],
        get("tombstone", False),
        get("subject"),
        get("metadata") or {},
        get("content"),
    )


def frame(attrs: bytes, value: bytes | None) -> bytes:
    """The plaintext of a whole event: attributes are personal too, they are sealed with the value."""
    return b"".join((_LENGTH.pack(len(attrs)), attrs, value or b""))


def unframe(plaintext: bytes) -> tuple[bytes, bytes]:
    """-> attributes, value."""
    if len(plaintext) < 4 or len(plaintext) < 4 + (size := _LENGTH.unpack_from(plaintext)[0]):
        raise MalformedEnvelope("the sealed frame is truncated")
    return plaintext[4 : 4 + size], plaintext[4 + size :]


def opened(event: Event, plaintext: bytes, enc: Mapping[str, Any] | None = None) -> Event:
    """A sealed event as its plaintext says; `enc` is told beside the application's metadata. Raises MalformedEnvelope, AuthenticationFailed."""
    attrs, value = unframe(plaintext)
    key, timestamp_ms, headers, is_tombstone, subject, metadata, content = parse_attributes(attrs)
    if is_tombstone != bool(event.metadata["enc"].get("tombstone")):
        raise AuthenticationFailed("the event and its sealed attributes disagree about the tombstone")
    if enc is not None:
        metadata["enc"] = enc
    return Event(
        tenant=event.tenant, stream=event.stream, position=event.position, message_id=event.message_id, type=event.type,
        stream_class=event.stream_class, value=None if is_tombstone else value, key=key, timestamp_ms=timestamp_ms,
        headers=headers, source=event.source, schema_version=event.schema_version, occurred_at=event.occurred_at,
        subject=subject, metadata=metadata, content=content,
    )  # fmt: skip


@lru_cache(4096)
def rfc3339(timestamp_ms: int) -> bytes:
    """CloudEvents `time`, UTC with milliseconds. A producer may write any number: what no calendar holds becomes its edge."""
    timestamp_ms = min(max(timestamp_ms, 0), LAST_MS)
    moment = datetime.fromtimestamp(timestamp_ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{timestamp_ms % 1000:03d}Z".encode()


def view_headers(
    source_headers: Headers,
    timestamp_ms: int,
    *,
    message_id: bytes,
    type_: bytes,
    tenant: bytes,
    stream: bytes,
    stream_class: bytes,
    position: int,
    source: tuple[bytes, int, int] | None,
    subject: bytes | None = None,
) -> list[tuple[str, bytes | None]]:
    """The source's own headers, then ours (contract: messages.md); what a producer wrote under our names is gone."""
    out = [pair for pair in source_headers if pair[0] not in OWN_HEADERS]
    names = {pair[0] for pair in out} if out else ()
    if "ce_source" not in names:
        out.append(("ce_source", b"/kafka/" + source[0] if source else b"/sidecar"))
    if "ce_time" not in names:
        out.append(("ce_time", rfc3339(timestamp_ms)))
    out += (
        ("ce_specversion", b"1.0"),
        ("ce_id", message_id),
        ("ce_type", type_),
        ("ce_tenantid", tenant),
        ("ce_streamid", stream),
        ("ce_streamtype", stream_class),
        ("ce_streamposition", b"%d" % position),
    )
    if subject is not None:
        out = [pair for pair in out if pair[0] != SUBJECT_HEADER]
        out.append((SUBJECT_HEADER, subject))
    if source is not None:
        out += (("ce_sourcetopic", source[0]), ("ce_sourcepartition", b"%d" % source[1]), ("ce_sourceoffset", b"%d" % source[2]))
    return out


def view_key(mode: str, path: str, position: int, source_key: bytes | None) -> bytes | None:
    """By `key` mode: `tenant/stream/position`, `tenant/stream`, or the source record's own key. `path` is `tenant/stream`."""
    if mode == "event":
        return f"{path}/{position}".encode()
    return path.encode() if mode == "stream" else source_key


def view_partition(path: str, partitions: int) -> int:
    """CRC-32 of `tenant/stream` (a tenant id holds no slash): a later tombstone finds the partition without an index."""
    return crc32(path.encode()) % partitions


def guard_stripe(tenant: str) -> int:
    """The advisory lock of a tenant, 0 to 255: CRC-32, never Python's `hash`, which differs per process."""
    return crc32(tenant.encode()) % 256
