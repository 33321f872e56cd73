"""The plan's decorator: `create_crypto_event_store(base, policy=…, keys=…)` gives any event store encryption by policy; the base is unchanged.

Append: class → policy → key → seal at the positions that the events will have → the base's own append, with an expected version. Who was
faster makes it a conflict, and the events are sealed again. Over the Postgres store the append's one statement also checks, under the guard,
that the tenant's keys are still those that sealed; over another store the guard is held around the base's append.

Read: the base's events, opened. Each answer is the event, `Erased`, or an error that is raised: altered bytes, a key that nobody knows, a KMS
that is away. They are never mixed up. What the sidecar wrote reads here, and the other way round: the bytes are the same (docs/FORMAT.md).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Final, TypeVar, cast
from uuid import UUID, uuid4

from sidecar.core.aead import Suite
from sidecar.core.blind_index import tokens
from sidecar.core.envelope import (
    NO_FIELD,
    Sealer,
    to_text,
)
from sidecar.core.errors import (
    AccessDenied,
    AuthenticationFailed,
    ConfigurationError,
    Conflict,
    MalformedRecord,
    RecordError,
    WrongVersion,
)
from sidecar.core.extract import subject_of
from sidecar.core.fields import Fields, digest_lp, seal_document
from sidecar.core.model import UNCLASSIFIED, Erased, Event, ScopeKind, identifier
from sidecar.core.policy import Decision, Encrypt, Refuse
from sidecar.core.store import (
    DEFAULT_TENANT,
    Aggregated,
    Appended,
    Cursor,
    Expected,
    ExpectedVersion,
    NewEvent,
    SealedEvent,
    StreamRead,
    Unreadable,
    encode,
)
from sidecar.core.streams import SealingKey
from sidecar.core.view import frame, library_attributes
from sidecar.key_management import Held, KeyManagementService
from sidecar.opening import Aead, BuildAad, CryptoProvider, Opener, aad_of, enc_of, extra_aad, is_sealed, of_stream
from sidecar.ports import EventStore
from sidecar.postgres.errors import Moved, Overtaken
from sidecar.postgres.event_store import PostgresEventStore, aggregate

State = TypeVar("State")
ATTEMPTS: Final = 50
TURNS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptionConfig:
    """Of one append: encrypt although policy does not ask for it, or with another algorithm. It never makes plain what policy encrypts.

    `fields`: JSON pointers; only these are sealed, `()` for the whole event, None for what policy says.
    """

    encrypt_stream: bool = True
    algorithm: str | None = None
    fields: Sequence[str] | None = None
    key_id: UUID | None = None
    """Must be the key that is in use; a way to say which one is meant, not to choose another's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecryptionConfig:
    """Of one read: with `decrypt_data` false, envelopes are given as they are, as `ks1.…`."""

    decrypt_data: bool = True


Classify = Callable[[str, str], str]
"""(stream, type of its first event) → class; counts where the caller names none and the stream has none."""


def create_crypto_event_store(
    base: EventStore,
    *,
    keys: KeyManagementService,
    policy: Classify | None = None,
    crypto: CryptoProvider | None = None,
    build_aad: BuildAad | None = None,
) -> "CryptoEventStore":
    """`base` with encryption. Policies are those of the database (EncryptionPolicyService); `policy` classifies streams for them.

    `build_aad` adds to what is bound; only a reader with the same function opens such events, the sidecar does not.
    """
    return CryptoEventStore(base, keys, policy or (lambda _stream, _type: UNCLASSIFIED), crypto or Aead(), build_aad)


class CryptoEventStore:
    """An EventStore that seals and opens, made by `create_crypto_event_store`. Safe for many tasks at once; one per process is enough.

    After a shred's receipt no append of its scope is stored and no call that starts opens it, whatever is warm here.
    """

    def __init__(self, base: EventStore, keys: KeyManagementService, classify: Classify, crypto: CryptoProvider, build_aad: BuildAad | None) -> None:
        self.base, self._keys, self._classify, self._crypto, self._build_aad = base, keys, classify, crypto, build_aad
        self._opener = Opener(keys, crypto, build_aad, envelopes=isinstance(base, PostgresEventStore))
        self._postgres = base if isinstance(base, PostgresEventStore) else None
        self._turns = [asyncio.Lock() for _ in range(TURNS)]
        """Appends to one stream take turns in this process: each would void the next one's sealing. Two streams rarely share a lock."""

    def session(self) -> AbstractAsyncContextManager[Any]:
        return self.base.session()

    # append

    async def append_to_stream(
        self,
        stream: str,
        events: Sequence[NewEvent],
        *,
        tenant: str = DEFAULT_TENANT,
        stream_class: str | None = None,
        expected_version: ExpectedVersion = Expected.ANY,
        session: Any = None,
        encryption: EncryptionConfig | None = None,
    ) -> Appended:
        """All of the events or none, sealed where policy says so; tried again where somebody was faster and no version is expected.

        Raises WrongVersion, RecordRefused for what is shredded or policy refuses, AccessDenied for an override that weakens, KeyExhausted,
        MalformedRecord for ids and data that are none, Unavailable: then nothing is stored in clear instead.
        """
        if not events:
            raise MalformedRecord("an append needs events")
        held = None if encryption is not None else self._keys.in_hand(tenant, stream)
        if held is None:
            identifier(stream.encode("utf-8", "replace"), "stream id", "bad_stream")
        named = stream_class or self._classify(stream, events[0].type)
        # A session may hold the stream's row already, so it waits for nobody here; plain events are not sealed for a position.
        if session is not None or (held is not None and held.is_plain):
            return await self._attempts(held, stream, events, tenant, named, expected_version, session, encryption)
        async with self._turns[hash((tenant, stream)) % TURNS]:
            return await self._attempts(held, stream, events, tenant, named, expected_version, None, encryption)

    async def _attempts(
        self, held: Held | None, stream: str, events: Sequence[NewEvent], tenant: str, named: str, expected_version: ExpectedVersion, session: Any,
        encryption: EncryptionConfig | None,
    ) -> Appended:  # fmt: skip
        """Seal and append until nobody was faster; other processes, and the sidecar, may be."""
        for attempt in range(ATTEMPTS):
            if held is None or attempt:
                held = await self._hold(stream, tenant, named, encryption)
                if held is None:
                    continue
            if not attempt and held.stream.stream_class != named and not held.stream.head:
                version = await self._version(stream, tenant, session)
                if not version:
                    self._keys.forget_stream(tenant, stream)  # an append that came to nothing named another class: this one's counts
                    continue
                if held.is_plain and session is None:
                    held.stream.head = version
            if encryption is not None:
                _check_override(encryption, held)
            if held.is_plain and self._postgres is None and await self._was_sealed(stream, tenant, session):
                if encryption is not None:
                    raise AccessDenied("this stream is encrypted; an append cannot leave it plain")
                encryption = EncryptionConfig()  # once encrypted, encrypted for good; of another store's streams our tables do not tell
                continue
            head = 0 if held.is_plain else await self._head(held, stream, tenant, expected_version, session)
            try:
                if held.is_plain:
                    return await self._append_plain(held, stream, events, tenant, expected_version, session)
                return await self._append(held, stream, events, tenant, head, session)
            except Moved:
                self._keys.let_go(held)
            except MalformedRecord:  # or policy seals other fields by now
                if attempt or held.stream.fields is None:
                    raise
                self._keys.forget(tenant)
            except AuthenticationFailed:  # plaintext, and somebody has encrypted the stream since it was loaded
                self._keys.forget_stream(tenant, stream)
                if not held.is_plain or attempt == ATTEMPTS - 1:
                    raise
            except WrongVersion as wrong:
                self._keys.forget_stream(tenant, stream)
                exists = expected_version is Expected.STREAM_EXISTS and (not held.is_plain or isinstance(wrong, Overtaken))  # but our head was old
                if attempt == ATTEMPTS - 1 or not (exists or expected_version is Expected.ANY):
                    raise
            except Conflict as conflict:
                # the data plane wrote in between, or somebody made the stream
                self._keys.forget_stream(tenant, stream)
                if session is not None or attempt == ATTEMPTS - 1:
                    raise WrongVersion("somebody else wrote to the stream") from conflict
        raise WrongVersion("the stream is written to without a pause; try again")

    async def _hold(self, stream: str, tenant: str, named: str, encryption: EncryptionConfig | None) -> Held | None:
        """What the append needs, an override counted in. None: somebody made the stream meanwhile, and of another class; again."""
        if encryption is None:
            return self._keys.in_hand(tenant, stream) or await self._keys.hold(tenant, stream, named)
        stream_class = await self._keys.class_of(tenant, stream) or named
        wanted = await self._wanted(encryption, tenant, stream_class)
        held = self._keys.in_hand(tenant, stream, wanted) or await self._keys.hold(tenant, stream, named, wanted)
        return held if held.stream.stream_class == stream_class else None

    async def _wanted(self, encryption: EncryptionConfig, tenant: str, stream_class: str) -> Encrypt | None:
        """What an override asks for: the policy's own key scope, and a suite. None where it has no say: policy refuses."""
        decision = (await self._keys.policies()).decide(tenant, stream_class)
        if not encryption.encrypt_stream or isinstance(decision, Refuse):
            return None
        base = decision if isinstance(decision, Encrypt) else Encrypt(Suite.AES_256_GCM, ScopeKind.STREAM)
        if encryption.fields is not None:
            base = replace(base, fields=_overridden(decision, encryption.fields))
        return base if encryption.algorithm is None else replace(base, suite=Suite.from_label(encryption.algorithm))

    async def _version(self, stream: str, tenant: str, session: Any) -> int:
        return (await self.base.read_stream(stream, tenant=tenant, max_count=0, session=session)).version

    async def _was_sealed(self, stream: str, tenant: str, session: Any) -> bool:
        version = await self._version(stream, tenant, session)
        last = (await self.base.read_stream(stream, tenant=tenant, from_position=version, session=session)).events if version else ()
        return any(isinstance(event, Event) and is_sealed(event) for event in last)

    def _append_plain(
        self, held: Held, stream: str, events: Sequence[NewEvent], tenant: str, expected: ExpectedVersion, session: Any
    ) -> Awaitable[Appended]:
        if self._postgres is None:
            return self._append_guarded(held, stream, events, tenant, expected, session)
        return self._postgres.append_to_stream(
            stream, events, tenant=tenant, stream_class=held.stream.stream_class, expected_version=expected, session=session, sealed_for=held.as_of
        )

    async def _append_guarded(
        self, held: Held, stream: str, events: Sequence[NewEvent], tenant: str, expected: ExpectedVersion, session: Any
    ) -> Appended:
        """To a store that cannot check by itself that the tenant is as it was."""
        used = set() if held.is_plain else {(event.metadata["enc"]["keyId"], event.metadata["enc"]["keyVersion"]) for event in events}
        named = held.stream.stream_class
        async with self._keys.verified(tenant, held.as_of, used, named):
            return await self.base.append_to_stream(stream, events, tenant=tenant, stream_class=named, expected_version=expected, session=session)

    async def _append(self, held: Held, stream: str, events: Sequence[NewEvent], tenant: str, head: int, session: Any) -> Appended:
        sealed, key = await self._seal(held, stream, events, head)
        if self._postgres is None:
            return await self._append_guarded(held, stream, [_as_new(event) for event in sealed], tenant, head, session)
        noted = key is not None and key is held.stream.noted and head == held.stream.head  # nobody wrote since, so nobody noted another
        done = await self._postgres.append_to_stream(
            stream, sealed, tenant=tenant, stream_class=held.stream.stream_class, expected_version=head, session=session, sealed_for=held.as_of,
            noted=noted,
        )  # fmt: skip
        if session is None:  # else it may be rolled back
            held.stream.head, held.stream.noted = done.last, key
        return done

    async def _head(self, held: Held, stream: str, tenant: str, expected: ExpectedVersion, session: Any) -> int:
        """The version to seal for. What is remembered may be old: then the append finds out, and it is read again."""
        if not isinstance(expected, Expected):
            return expected
        head = held.stream.head
        if session is not None or self._postgres is None or (expected is Expected.STREAM_EXISTS and not head):
            head = await self._version(stream, tenant, session)
        if (expected is Expected.NO_STREAM and head) or (expected is Expected.STREAM_EXISTS and not head):
            raise WrongVersion(f"the stream is at {head}")
        return head

    async def _seal(self, held: Held, stream: str, events: Sequence[NewEvent], head: int) -> tuple[list[SealedEvent], SealingKey | None]:
        """-> the events as they are stored, and the one key that all of them are sealed under, where they are not persons'."""
        bound, now = of_stream(held.tenant.id, stream), datetime.now(UTC)
        encoded = [encode(event.data) for event in events]
        persons = _persons(held, events, [value for value, _ in encoded])
        fields = held.stream.fields
        documents = [None if fields is None or value is None else fields.find(value) for value, _ in encoded]
        counts = None if fields is None else [0 if found is None else len(found.places) for found in documents]
        keys = await self._keys.sealing_keys(held, persons, counts)
        index = await self._keys.index_key(held) if fields is not None and fields.indexed and self._postgres is not None else None
        seal = self._crypto.seal
        if isinstance(self._crypto, Aead):  # which draws all nonces at once
            seal = Sealer(len(events) + sum(counts or ())).seal
        out = []
        each = zip(events, keys, persons, encoded, documents, strict=True)
        for position, (event, key, person, (value, content), document) in enumerate(each, start=head + 1):
            message_id, at = event.id or str(uuid4()), event.occurred_at or now
            _check_type(event.type)
            if event.id is not None:
                identifier(message_id.encode("utf-8", "replace"), "event id")
            attributes = library_attributes(int(at.timestamp() * 1000), event.metadata, content, value is None, person)
            extra = b"" if self._build_aad is None else extra_aad(self._build_aad, held.tenant.id, stream, held.stream.stream_class, event.type)
            stored, place = None, (bound, position, message_id, event.type, event.schema_version, extra)
            if document is None:
                aad = aad_of(*place, NO_FIELD, key.prefix)
                envelope = seal(key.cipher, key.prefix, aad, frame(attributes, value))
            else:
                bind = partial(aad_of, *place)
                stored, envelope = seal_document(document, attributes, key.prefix, bind, partial(seal, key.cipher))
                aad = bind(digest_lp(stored), key.prefix)
            found = () if index is None or fields is None or document is None else tuple(tokens(index, document, fields.indexed))
            out.append(SealedEvent(message_id, event.type, event.schema_version, at, stored, envelope, None, value is None, found, aad))
        return out, keys[0] if held.stream.by_subject is None else None

    # read

    async def read_stream(
        self,
        stream: str,
        *,
        tenant: str = DEFAULT_TENANT,
        from_position: int = 1,
        to_position: int | None = None,
        max_count: int | None = None,
        session: Any = None,
        decryption: DecryptionConfig | None = None,
    ) -> StreamRead:
        """Events by position, both ends included, and `Erased` in the place of those whose key was destroyed.

        Raises AuthenticationFailed for bytes that were altered, moved or planted, UnknownKey, Unavailable: none of them says "erased".
        """
        read = await self.base.read_stream(
            stream, tenant=tenant, from_position=from_position, to_position=to_position, max_count=max_count, session=session
        )
        if decryption is not None and not decryption.decrypt_data:
            return read
        opened = await self.decrypt([event for event in read.events if isinstance(event, Event)])
        for answer in opened:
            if isinstance(answer, RecordError):
                raise answer
        return StreamRead(events=cast(Sequence[Event | Erased], opened), version=read.version)

    async def decrypt(self, events: Sequence[Event]) -> Sequence[Event | Erased | RecordError]:
        """A consumer's decrypt hook: an answer per event, in order. Under the guard: after a shred's receipt no call that starts opens its scope.

        Raises Unavailable, and UnknownKey: neither says that anything is erased.
        """
        return await self._opener.open(events)

    async def aggregate_stream(
        self, stream: str, evolve: Callable[[State, Event], State], initial: State, *, tenant: str = DEFAULT_TENANT, session: Any = None
    ) -> Aggregated[State]:
        """Raises StreamErased where an event is erased: a state without it would be wrong."""
        return aggregate(await self.read_stream(stream, tenant=tenant, session=session), evolve, initial)

    async def read_all(
        self,
        *,
        after: Cursor = Cursor(),
        tenant: str | None = None,
        classes: Sequence[str] | None = None,
        limit: int = 500,
    ) -> Sequence[tuple[Cursor, Event | Erased | Unreadable]]:
        found = await self.base.read_all(after=after, tenant=tenant, classes=classes, limit=limit)
        answers = iter(await self.decrypt([held for _, held in found if isinstance(held, Event)]))
        return [(place, _answer(held, next(answers)) if isinstance(held, Event) else held) for place, held in found]


def _persons(held: Held, events: Sequence[NewEvent], values: Sequence[bytes | None]) -> list[str | None]:
    """Whom each event is about. Where policy seals by person and does not look into the value, that is `subject`: it comes as a header from Kafka."""
    by = held.stream.by_subject
    if by is None or by.subject is None:
        return [event.subject for event in events]
    if by.subject.startswith("json:"):
        return [subject_of(by.subject, "", None, value, {}) for value in values]
    return [identifier((event.subject or "").encode("utf-8", "surrogatepass"), "subject id") for event in events]


def _check_override(encryption: EncryptionConfig, held: Held) -> None:
    """An override may ask for more than policy does, never for less."""
    key = held.stream.key
    if not held.is_plain:
        if not encryption.encrypt_stream:
            raise AccessDenied("this stream is encrypted; an append cannot leave it plain")
        if encryption.key_id not in (None, key and key.key_id):
            raise AccessDenied("that is not the key that this stream is sealed with")


def _overridden(decision: Decision, pointers: Sequence[str]) -> Fields | None:
    """The fields that a call asks for. Raises AccessDenied where policy seals more, ConfigurationError for pointers that are none."""
    if not pointers:
        return None
    try:
        fields = Fields(tuple(pointers), decision.fields.indexed if isinstance(decision, Encrypt) and decision.fields else ())
    except ValueError as error:
        raise ConfigurationError(str(error), where="EncryptionConfig.fields", mend="name each field once, by a JSON pointer") from None
    if isinstance(decision, Encrypt) and not (decision.fields is not None and set(decision.fields.pointers) <= set(fields.pointers)):
        raise AccessDenied("policy seals more than these fields; an append cannot leave it plain")
    return fields


@lru_cache(4096)
def _check_type(event_type: str) -> None:
    """Raises MalformedRecord."""
    identifier(event_type.encode("utf-8", "replace"), "event type")


def _as_new(event: SealedEvent) -> NewEvent:
    """For a base that knows no envelopes: the one of a document stands in the metadata, else it is the data."""
    enc: dict[str, Any] = enc_of(event.envelope, event.aad) | ({"tombstone": True} if event.is_tombstone else {})
    data: Any = to_text(event.envelope)
    if event.document is not None:
        enc, data = enc | {"document": data}, event.document
    return NewEvent(
        type=event.type, id=event.id, schema_version=event.schema_version, occurred_at=event.occurred_at, data=data, metadata={"enc": enc}
    )  # fmt: skip


def _answer(event: Event, answer: Event | Erased | RecordError) -> Event | Erased | Unreadable:
    if isinstance(answer, RecordError):
        return Unreadable(tenant=event.tenant, stream=event.stream, position=event.position, error=answer)
    return answer
