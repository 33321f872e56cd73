"""A stored event as its row holds it, and its contents: read from one row, and sealed again for another place or under another key. No I/O."""

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import orjson

from sidecar.core.aead import Cipher, lp
from sidecar.core.envelope import (
    NO_FIELD,
    OVERHEAD_BYTES,
    PREFIX_BYTES,
    TEXT_PREFIX,
    Header,
    Sealer,
    event_aad,
    open_envelope,
    parse_header,
    stream_aad,
)
from sidecar.core.errors import AuthenticationFailed, KeyUnavailable, MalformedRecord, RecordError
from sidecar.core.extract import subject_of
from sidecar.core.fields import Bind, Document, Fields, digest_lp, open_document, seal_document
from sidecar.core.streams import SealingKey
from sidecar.core.view import frame, parse_attributes, unframe
from sidecar.event_store import Ciphers


class Content(NamedTuple):
    """Of an event: its attributes, and its value or the document of which fields are sealed. An event keeps its form when it is sealed anew."""

    attributes: bytes
    value: bytes | Document

    @property
    def seals(self) -> int:
        """How many it takes."""
        return len(self.value.places) + 1 if isinstance(self.value, Document) else 1


def read_contents(tenant: str, stream: str, fields: Fields | None, rows: Sequence[Any], ciphers: Ciphers) -> list[tuple[Bind, Content] | None]:
    """Each event, and how it is bound to its place. None: it is altered, planted, shredded or unknown, and stays as it is."""
    of_stream = stream_aad(tenant.encode(), stream.encode())

    @cache
    def cipher(prefix: bytes) -> Cipher:
        return ciphers.get(tenant, parse_header(prefix.ljust(OVERHEAD_BYTES)))

    out: list[tuple[Bind, Content] | None] = []
    for row in rows:
        bind = bind_to(of_stream, row)
        try:
            envelope = row["data_encrypted"]
            if row["planted"]:
                raise AuthenticationFailed("plaintext stands in an encrypted stream")
            content = _plain(row, fields) if envelope is None else opened(cipher(bytes(envelope[:PREFIX_BYTES])), bind, row)
        except (RecordError, KeyUnavailable):
            out.append(None)
        else:
            out.append((bind, content))
    return out


def bind_to(of_stream: bytes, row: Any) -> Bind:
    """To the row's place in that stream."""
    id_lp, type_lp = lp(row["message_id"].encode()), lp(row["message_type"].encode())
    return partial(event_aad, of_stream, row["stream_position"], id_lp, type_lp, row["schema_version"])


def headers_of(envelopes: Iterable[bytes]) -> list[Header]:
    """Of those that have one."""
    out = []
    for envelope in envelopes:
        try:
            out.append(parse_header(bytes(envelope)))
        except RecordError:
            continue  # of a row that will be left alone
    return out


def person_of(content: Content, extractor: str) -> str | None:
    """Whom the event says that it is about, else whom the extractor finds in it."""
    carried = parse_attributes(content.attributes)
    if carried.subject is not None:
        return carried.subject
    value = content.value.text.encode() if isinstance(content.value, Document) else content.value
    try:
        return subject_of(extractor, "", carried.key, None if carried.is_tombstone else value, dict(carried.headers))
    except MalformedRecord:
        return None


def named(content: Content, person: str) -> Content:
    """Readers and views learn of the person from the event itself."""
    attributes = orjson.loads(content.attributes)
    return content if attributes.get("subject") == person else content._replace(attributes=orjson.dumps(attributes | {"subject": person}))


def count_fields(row: Any, fields: Fields | None) -> int:
    """How many seals beside the event's own it takes at most."""
    if row["data"] is None:
        return 0
    if row["data_encrypted"] is not None:
        return bytes(row["data"]).count(b'"' + TEXT_PREFIX.encode())
    return _plain(row, fields).seals - 1


def _plain(row: Any, fields: Fields | None) -> Content:
    """A plain event, to be sealed as policy says; whole, where its fields cannot be told from the rest."""
    attributes, value = orjson.dumps(row["metadata"] or {}), row["data"] or b""
    if fields is not None and row["data"] is not None:
        try:
            return Content(attributes, fields.find(value))
        except MalformedRecord:
            pass
    return Content(attributes, value)


def opened(cipher: Cipher, bind: Bind, row: Any) -> Content:
    """Of a sealed row. Raises RecordError where its bytes are not what was sealed."""
    envelope, stored = bytes(row["data_encrypted"]), row["data"]
    prefix = envelope[:PREFIX_BYTES]
    attributes, value = unframe(open_envelope(cipher, envelope, bind(digest_lp(stored), prefix)))
    return Content(attributes, value if stored is None else open_document(stored, value, prefix, bind, partial(open_envelope, cipher)))


def sealed(key: SealingKey, content: Content, bind: Bind, sealer: Sealer) -> tuple[bytes, bytes | None]:
    """-> the envelope, and the document beside it."""
    attributes, value = content
    if not isinstance(value, Document):
        return sealer.seal(key.cipher, key.prefix, bind(NO_FIELD, key.prefix), frame(attributes, value)), None
    stored, envelope = seal_document(value, attributes, key.prefix, bind, partial(sealer.seal, key.cipher))
    return envelope, stored
