"""Envelope v1: what an encrypted event is in Postgres, byte for byte (docs/FORMAT.md).

    0   2  magic 4B 53
    2   1  format version = 1
    3   1  suite
    4   1  flags: bits 0-1 scope kind, bit 2 one field of a document, bit 3 framed
    5  16  key id
    21  4  key version, u32 big-endian
    25 12  nonce, random
    37  n+16  ciphertext ‖ tag

The associated data is never stored: the reader computes it from the row, so bytes that were moved do not open.
"""

import base64
import binascii
import os
import struct
from dataclasses import dataclass
from uuid import UUID

from sidecar.core.aead import NONCE_BYTES, TAG_BYTES, Cipher, Suite, lp, open_sealed, u32, u64
from sidecar.core.errors import MalformedEnvelope, UnsupportedEnvelope
from sidecar.core.model import ScopeKind

MAGIC = b"KS"
FORMAT_VERSION = 1
PREFIX_BYTES = 25
"""Magic to key version: the part of the header that is authenticated as associated data."""
HEADER_BYTES = PREFIX_BYTES + NONCE_BYTES
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES
TEXT_PREFIX = "ks1."

FLAG_FIELD = 0b0100
FLAG_FRAMED = 0b1000
_KNOWN_FLAGS = 0b1111

_PREFIX = struct.Struct(">2sBBB16sI")
EVENT_DOMAIN = b"ks/event/v1"
DATA_DOMAIN = b"ks/data/v1"
DEAD_LETTER_DOMAIN = b"ks/dead-letter/v1"
NO_FIELD = lp(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The clear part of an envelope."""

    suite: Suite
    scope_kind: ScopeKind
    key_id: UUID
    key_version: int
    framed: bool
    field: bool = False

    def prefix(self) -> bytes:
        """The first 25 bytes."""
        flags = self.scope_kind.code | (FLAG_FIELD if self.field else 0) | (FLAG_FRAMED if self.framed else 0)
        return _PREFIX.pack(MAGIC, FORMAT_VERSION, self.suite, flags, self.key_id.bytes, self.key_version)


def parse_header(envelope: bytes) -> Header:
    """Raises MalformedEnvelope, or UnsupportedEnvelope for anything that a later release may have written."""
    if len(envelope) < OVERHEAD_BYTES:
        raise MalformedEnvelope("the envelope is truncated")
    magic, version, suite, flags, key_id, key_version = _PREFIX.unpack_from(envelope)
    if magic != MAGIC:
        raise MalformedEnvelope
    if version != FORMAT_VERSION or flags & ~_KNOWN_FLAGS:
        raise UnsupportedEnvelope(f"unknown envelope format {version}, flags {flags:#04x}")
    return Header(
        suite=Suite.from_code(suite),
        scope_kind=ScopeKind.from_code(flags),
        key_id=UUID(bytes=key_id),
        key_version=key_version,
        framed=bool(flags & FLAG_FRAMED),
        field=bool(flags & FLAG_FIELD),
    )


def field_prefix(prefix: bytes) -> bytes:
    """Of one field of a document, by the prefix of its event: the same key, no frame."""
    return b"%b%c%b" % (prefix[:4], prefix[4] & ~FLAG_FRAMED | FLAG_FIELD, prefix[5:])


def nonce_of(envelope: bytes) -> bytes:
    """The nonce of an envelope whose header was parsed."""
    return envelope[PREFIX_BYTES:HEADER_BYTES]


def stream_aad(tenant: bytes, stream: bytes) -> bytes:
    """The part of an event's associated data that its whole stream shares: kept packed per stream."""
    return lp(EVENT_DOMAIN, tenant, stream)


def event_aad(of_stream: bytes, position: int, message_id_lp: bytes, type_lp: bytes, schema_version: int, field_lp: bytes, prefix: bytes) -> bytes:
    """The associated data of one event: the one function for writers and readers. Arguments `*_lp` carry their length."""
    return b"".join((of_stream, u64(position), message_id_lp, type_lp, u32(schema_version), field_lp, prefix))


def data_aad(tenant: str, stream: str, prefix: bytes) -> bytes:
    """The associated data of text that stands outside the store."""
    return lp(DATA_DOMAIN, tenant.encode(), stream.encode()) + prefix


def dead_letter_aad(tenant: str, source_id: int, partition: int, offset: int, prefix: bytes) -> bytes:
    """The associated data of a dead letter's value: its tenant and where in Kafka it stands."""
    return lp(DEAD_LETTER_DOMAIN, tenant.encode(), u32(source_id), u32(partition), u64(offset)) + prefix


class Sealer:
    """Seals a batch, drawing all of its nonces at once (one system call, not one per event).

    Holds `count` fresh random nonces and gives each out once: a caller cannot pass a nonce in, nor get one twice.
    """

    __slots__ = ("_at", "_nonces")

    def __init__(self, count: int) -> None:
        self._nonces = os.urandom(NONCE_BYTES * count)
        self._at = 0

    def seal(self, cipher: Cipher, prefix: bytes, aad: bytes, plaintext: bytes) -> bytes:
        """The envelope. Raises IndexError when more than `count` were asked for."""
        at = self._at
        nonce = self._nonces[at : at + NONCE_BYTES]
        if len(nonce) != NONCE_BYTES:
            raise IndexError("more seals than nonces were drawn for")
        self._at = at + NONCE_BYTES
        return b"".join((prefix, nonce, cipher.encrypt(nonce, plaintext, aad)))


def seal(cipher: Cipher, prefix: bytes, aad: bytes, plaintext: bytes) -> bytes:
    """One envelope with a nonce of its own."""
    return Sealer(1).seal(cipher, prefix, aad, plaintext)


def open_envelope(cipher: Cipher, envelope: bytes, aad: bytes) -> bytes:
    """The plaintext, or AuthenticationFailed. Parse the header first: it names the key that `cipher` must be of."""
    return open_sealed(cipher, envelope[PREFIX_BYTES:HEADER_BYTES], envelope[HEADER_BYTES:], aad)


def to_text(envelope: bytes) -> str:
    """The form where a string is needed: `ks1.` and unpadded base64url."""
    return TEXT_PREFIX + base64.urlsafe_b64encode(envelope).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """Raises MalformedEnvelope; accepts only the one spelling that `to_text` gives."""
    body = text.removeprefix(TEXT_PREFIX)
    if body == text:
        raise MalformedEnvelope
    try:
        envelope = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise MalformedEnvelope from None
    if to_text(envelope) != text:
        raise MalformedEnvelope
    return envelope
