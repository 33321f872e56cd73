"""The plan's `CryptoShreddingService`: text that an application keeps elsewhere, a stream's key by name, and being forgotten.

An application's process encrypts and decrypts; it has no right to destroy keys. What forgets is a command to the control plane, which answers
with a receipt: `forget_…` returns it. Without a way to send one, or without the right to, they raise AccessDenied.
"""

from datetime import timedelta
from typing import Any

import orjson

from sidecar.core.envelope import PREFIX_BYTES, data_aad, from_text, open_envelope, parse_header, seal, to_text
from sidecar.core.errors import MalformedEnvelope, UnknownKey
from sidecar.core.model import UNCLASSIFIED, Scope, ScopeKind
from sidecar.core.store import DEFAULT_TENANT, encode
from sidecar.core.view import frame, library_attributes, parse_attributes, unframe
from sidecar.crypto_store import Classify
from sidecar.key_management import KeyManagementService, KeyName
from sidecar.ports import Clock
from sidecar.postgres.errors import Moved
from sidecar.sending import Receipt, Send, shred

ATTEMPTS = 10


class CryptoShreddingService:
    """Text that is kept elsewhere, streams' keys by name, and being forgotten.

    Raises KmsUnavailable, StoreUnavailable, BrokerUnavailable for what is away; RecordRefused for what is shredded. `forget_…` and `destroy_…` send
    a command and wait up to 30 s for its receipt: AccessDenied for one that was not allowed (a legal hold, a signature), CommandRejected with a code
    for one that cannot be carried out (`shared_key`, `unknown_tenant`), BrokerUnavailable where none came in time: it may still be carried out.
    """

    def __init__(self, keys: KeyManagementService, clock: Clock, *, send: Send | None = None, classify: Classify | None = None) -> None:
        self._keys, self._clock, self._send = keys, clock, send
        self._classify = classify or (lambda _stream, _type: UNCLASSIFIED)

    # text

    async def encrypt_event_data(self, data: Any, stream_id: str, tenant_id: str = DEFAULT_TENANT) -> str:
        """`ks1.…`: under a key of the stream, bound to tenant and stream, wherever it is kept. Data is bytes, JSON or None.

        A shred of the stream, its class or the tenant makes it unreadable as well. (A stream's class is fixed by its first event in the store;
        until then it is what the class rules say here.) A shred of a person does not. Clean-up never destroys a key that was used here.
        """
        value, content = encode(data)
        attributes = library_attributes(int(self._clock.now().timestamp() * 1000), {}, content, value is None, None)
        for _ in range(ATTEMPTS):
            held = await self._keys.hold_for_text(tenant_id, stream_id, self._classify(stream_id, ""))
            try:
                [key] = await self._keys.sealing_keys(held, [None])
                envelope = seal(key.cipher, key.prefix, data_aad(tenant_id, stream_id, key.prefix), frame(attributes, value))
                async with self._keys.verified(tenant_id, held.as_of, [(str(key.key_id), key.version)], held.stream.stream_class):
                    return to_text(envelope)
            except Moved:
                self._keys.let_go(held)
        raise UnknownKey("the tenant's keys keep changing; try again")

    async def decrypt_event_data(self, encrypted: str, stream_id: str, tenant_id: str = DEFAULT_TENANT) -> Any:
        """What was encrypted. Raises KeyShredded, UnknownKey, AuthenticationFailed for text that was altered or belongs elsewhere, MalformedEnvelope."""
        envelope = from_text(encrypted)
        header = parse_header(envelope)
        if not header.framed:
            raise MalformedEnvelope("this text was not made by encrypt_event_data")
        cipher = await self._keys.get_key(tenant_id, header.key_id, header.key_version, header.suite)
        attributes, value = unframe(open_envelope(cipher, envelope, data_aad(tenant_id, stream_id, envelope[:PREFIX_BYTES])))
        carried = parse_attributes(attributes)
        if carried.is_tombstone:
            return None
        return value if carried.content == "bytes" else orjson.loads(value)

    # a stream's key

    async def generate_stream_key(self, tenant_id: str, stream_id: str) -> KeyName:
        """Make the stream's key, or find the one that is there. Raises UnknownKey where policy seals by person: then the stream has none."""
        held = await self._keys.hold_for_text(tenant_id, stream_id, self._classify(stream_id, ""))
        key = held.stream.key
        if key is None:
            raise UnknownKey("the stream's events are sealed under their persons' keys, not under one of the stream")
        return KeyName(key_id=key.key_id, key_version=key.version)

    async def get_stream_key(self, stream_id: str, tenant_id: str = DEFAULT_TENANT) -> KeyName:
        """Which key seals the stream's events now. Raises UnknownKey if it has none (yet)."""
        return await self._keys.get_active_key(tenant_id, Scope(tenant=tenant_id, kind=ScopeKind.STREAM, id=stream_id))

    async def rotate_stream_key(self, stream_id: str, tenant_id: str = DEFAULT_TENANT) -> None:
        """Nothing is sealed under the present version after this call, by any process; older events stay readable. The next write makes the next one.

        Raises StoreUnavailable where a batch holds the tenant for longer than a second.
        """
        await self._keys.rotate_key(Scope(tenant=tenant_id, kind=ScopeKind.STREAM, id=stream_id))

    async def cleanup_old_keys(self, retention_days: int, tenant_id: str | None = None) -> int:
        """Destroy versions that were retired at least so many days ago and that no stored event needs; -> how many, of a tenant or of all.

        Raises AccessDenied without the control plane's database role.
        """
        return await self._keys.clean_up(timedelta(days=retention_days), tenant_id)

    # being forgotten

    async def is_data_forgettable(self, tenant_id: str, stream_id: str | None = None) -> bool:
        """Whether a shred would be carried out as things stand: the tenant is known, no hold is in force, no key of the scope is needed by others."""
        return await self._keys.is_forgettable(_scope(tenant_id, stream_id))

    async def forget_tenant_data(self, tenant_id: str, *, reason: str) -> Receipt:
        """Shred the tenant: all of its encrypted events, under whichever key. The receipt says what became unreadable, when, and where copies may still be."""
        return await self._shred(Scope.of_tenant(tenant_id), reason)

    async def forget_stream_data(self, stream_id: str, tenant_id: str = DEFAULT_TENANT, *, reason: str) -> Receipt:
        """Shred a stream, also one that has no event yet: none of it is stored from then on. Raises CommandRejected where others need its key."""
        return await self._shred(_scope(tenant_id, stream_id), reason)

    async def forget_subject_data(self, subject_id: str, tenant_id: str = DEFAULT_TENANT, *, reason: str) -> Receipt:
        """Shred a person: what policy seals by person (`key_scope: subject`), in whichever streams it stands. Plain events stay."""
        return await self._shred(Scope(tenant=tenant_id, kind=ScopeKind.SUBJECT, id=subject_id), reason)

    async def destroy_tenant_keys(self, tenant_id: str, *, reason: str) -> Receipt:
        """The plan's name for the same: the keys of a tenant are destroyed by its shred, never without one."""
        return await self.forget_tenant_data(tenant_id, reason=reason)

    async def _shred(self, scope: Scope, reason: str) -> Receipt:
        receipt = await shred(self._send, scope, reason)
        self._keys.forget(scope.tenant)
        return receipt


def _scope(tenant: str, stream: str | None) -> Scope:
    return Scope.of_tenant(tenant) if stream is None else Scope(tenant=tenant, kind=ScopeKind.STREAM, id=stream)
