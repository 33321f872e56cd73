"""Events that the decorator sealed, opened again; and what both halves of it agree on: what is bound beside the bytes, and what `enc` says.

Each answer is the event, `Erased`, or the error that its bytes are: altered or moved ones, a key row that was changed. Never another's data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from typing import Any, Protocol, cast

from sidecar.core.aead import Cipher, lp, u32
from sidecar.core.envelope import (
    NO_FIELD,
    PREFIX_BYTES,
    TEXT_PREFIX,
    Header,
    Sealer,
    event_aad,
    from_text,
    nonce_of,
    open_envelope,
    parse_header,
    stream_aad,
)
from sidecar.core.errors import KeyShredded, RecordError
from sidecar.core.fields import digest_lp, with_document
from sidecar.core.model import Erased, Event
from sidecar.core.view import opened
from sidecar.key_management import KeyManagementService


@dataclass(frozen=True, slots=True, kw_only=True)
class CryptoContext:
    """What `build_aad` may bind beside tenant, stream, position, id, type and schema version, which are always bound."""

    tenant: str
    stream: str
    stream_class: str
    event_type: str


BuildAad = Callable[[CryptoContext], bytes]


class CryptoProvider(Protocol):
    """Seals and opens one event; the default is ours (core/envelope.py)."""

    def seal(self, cipher: Cipher, prefix: bytes, aad: bytes, plaintext: bytes) -> bytes: ...

    def open(self, cipher: Cipher, envelope: bytes, aad: bytes) -> bytes: ...


class Aead:
    """The default provider."""

    def seal(self, cipher: Cipher, prefix: bytes, aad: bytes, plaintext: bytes) -> bytes:
        return Sealer(1).seal(cipher, prefix, aad, plaintext)

    def open(self, cipher: Cipher, envelope: bytes, aad: bytes) -> bytes:
        return open_envelope(cipher, envelope, aad)


class Opener:
    """Opens events that a store gives unopened."""

    def __init__(self, keys: KeyManagementService, crypto: CryptoProvider, build_aad: BuildAad | None, *, envelopes: bool) -> None:
        """`envelopes`: the store keeps them as such, and an application's own metadata `enc` say nothing."""
        self._keys, self._crypto, self._build_aad, self._envelopes = keys, crypto, build_aad, envelopes

    async def open(self, events: Sequence[Event]) -> Sequence[Event | Erased | RecordError]:
        """An answer per event, in order; under the guard. Raises Unavailable, and UnknownKey: neither says that anything is erased."""
        by_tenant: dict[str, list[int]] = {}
        out: list[Event | Erased | RecordError] = list(events)
        for number, event in enumerate(events):
            if event.sealed is not None or (not self._envelopes and is_sealed(event)):
                by_tenant.setdefault(event.tenant, []).append(number)
        for tenant, numbers in by_tenant.items():
            for number, answer in zip(numbers, await self._open_all(tenant, [events[n] for n in numbers]), strict=True):
                out[number] = answer
        return out

    async def _open_all(self, tenant: str, events: Sequence[Event]) -> list[Event | Erased | RecordError]:
        envelopes = [_envelope(event) for event in events]
        headers = {_header(prefix) for prefix in {e[:PREFIX_BYTES] for e in envelopes if isinstance(e, bytes)}} - {None}
        while True:
            epoch, ciphers = await self._keys.opening(tenant, cast(Any, headers))
            async with self._keys.guard(tenant) as now:
                if now == epoch:
                    known: dict[bytes, Cipher] = {}
                    return [self._open(event, envelope, ciphers, known) for event, envelope in zip(events, envelopes, strict=True)]
            self._keys.forget(tenant)

    def _open(self, event: Event, envelope: bytes | RecordError, ciphers: Any, known: dict[bytes, Cipher]) -> Event | Erased | RecordError:
        """`known`: clear prefix → cipher, of this read: a stream's events share it."""
        if isinstance(envelope, RecordError):
            return envelope
        try:
            prefix = envelope[:PREFIX_BYTES]
            if (cipher := known.get(prefix)) is None:
                cipher = known[prefix] = ciphers.get(event.tenant, _header(prefix) or parse_header(envelope))
            extra = b"" if self._build_aad is None else extra_aad(self._build_aad, event.tenant, event.stream, event.stream_class, event.type)
            place = (of_stream(event.tenant, event.stream), event.position, event.message_id, event.type, event.schema_version, extra)
            if event.value is None or (event.sealed is None and "document" not in event.metadata["enc"]):
                aad = aad_of(*place, NO_FIELD, prefix)
                return opened(event, self._crypto.open(cipher, envelope, aad), enc_of(envelope, aad))
            bind = partial(aad_of, *place)
            aad = bind(digest_lp(event.value), prefix)
            read = opened(event, self._crypto.open(cipher, envelope, aad), enc_of(envelope, aad))
            return with_document(read, event.value, prefix, bind, partial(self._crypto.open, cipher))
        except KeyShredded:
            return Erased(tenant=event.tenant, stream=event.stream, position=event.position, message_id=event.message_id, type=event.type)
        except RecordError as error:
            return error


def extra_aad(build_aad: BuildAad, tenant: str, stream: str, stream_class: str, event_type: str) -> bytes:
    """What the application's own function binds."""
    return lp(build_aad(CryptoContext(tenant=tenant, stream=stream, stream_class=stream_class, event_type=event_type)))


def aad_of(
    bound: bytes, position: int, message_id: str, event_type: str, schema_version: int, extra: bytes, field_lp: bytes, prefix: bytes
) -> bytes:  # fmt: skip
    """The associated data of an event at its place; `bound`: what `of_stream` gives."""
    id_raw = message_id.encode()
    return event_aad(bound, position, u32(len(id_raw)) + id_raw, _type_lp(event_type), schema_version, field_lp, prefix) + extra


@lru_cache(4096)
def _type_lp(event_type: str) -> bytes:
    return lp(event_type.encode())


@lru_cache(4096)
def of_stream(tenant: str, stream: str) -> bytes:
    return stream_aad(tenant.encode(), stream.encode())


def enc_of(envelope: bytes, aad: bytes) -> dict[str, Any]:
    """The plan's metadata. The hash is for audits; what binds is the tag."""
    algo, key_id, key_version = _enc_of_key(envelope[:PREFIX_BYTES])
    return {"algo": algo, "keyId": key_id, "keyVersion": key_version, "iv": nonce_of(envelope).hex(), "aadHash": sha256(aad).hexdigest()}


@lru_cache(4096)
def _enc_of_key(prefix: bytes) -> tuple[str, str, int]:
    header = parse_header(prefix + bytes(28))
    return header.suite.label, str(header.key_id), header.key_version


@lru_cache(4096)
def _header(prefix: bytes) -> Header | None:
    """A stream's events share the clear prefix. None: it is not one, and `parse_header` says why."""
    try:
        return parse_header(prefix + bytes(28))
    except RecordError:
        return None


def is_sealed(event: Event) -> bool:
    """In a store that knows no envelopes: by what the decorator put beside the data."""
    enc, data = event.metadata.get("enc"), cast(Any, event.data)
    return isinstance(enc, dict) and ("document" in enc or (isinstance(data, str) and data.startswith(TEXT_PREFIX)))


def _envelope(event: Event) -> bytes | RecordError:
    if event.sealed is not None:
        return event.sealed
    try:
        return from_text(cast(str, event.metadata["enc"].get("document", event.data)))
    except RecordError as error:
        return error
