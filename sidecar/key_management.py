"""Keys for an application's own process: `KeyManagementService`. The pipeline's cache (`Streams`), for many callers at once.

What is in hand is as of a tenant epoch and a policy version. Both are verified under the guard, by the append's own transaction or by
`guard`, so a warm cache never outlives a shred, a rotation or a policy change; who finds them moved calls `forget` and asks again.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, cast
from uuid import UUID

from sidecar.clean_up import CleanUp
from sidecar.core.aead import Cipher, Suite
from sidecar.core.blind_index import SCOPE_ID, IndexKey
from sidecar.core.envelope import Header
from sidecar.core.errors import AuthenticationFailed, CommandRejected, Conflict, KeyUnavailable, RecordRefused, StoreUnavailable, UnknownKey
from sidecar.core.keys import Keys, UseLimits
from sidecar.core.model import Scope, ScopeKind, tenant_id
from sidecar.core.policy import Encrypt, PolicySet, Unmatched
from sidecar.core.streams import Fresh, SealingKey, Stream, Tenant, Touch
from sidecar.core.view import guard_stripe
from sidecar.event_store import Ciphers
from sidecar.keys import KeyManagement
from sidecar.ledger import LedgerGate
from sidecar.ports import Clock
from sidecar.postgres import audit, guard, holds, rotations, shreds, tenants
from sidecar.postgres import fresh as fresh_rows
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import Moved
from sidecar.postgres.event_store import SealedFor
from sidecar.postgres.keystore import KeyStore
from sidecar.sending import Receipt, Send, shred
from sidecar.streams import Streams

ATTEMPTS: Final = 50
LOCK_MS: Final = 5000


@dataclass(frozen=True, slots=True)
class Held:
    """A stream as it is in hand: whose, under which key (None: policy leaves it plain), and as of what that holds."""

    tenant: Tenant
    stream: Stream
    as_of: SealedFor
    policies: PolicySet
    is_plain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyName:
    """One version of a key, by name. Nobody gets its bytes."""

    key_id: UUID
    key_version: int


class KeyManagementService:
    """Keys by name and version; nobody gets their bytes. A warm key never outlives a shred, a rotation or a policy change, in any process.

    Raises KmsUnavailable, StoreUnavailable; RecordRefused for what is shredded; AccessDenied where the database role may not.
    """

    def __init__(
        self,
        pool: Pool,
        keys: KeyManagement,
        *,
        clock: Clock,
        writer: str = "library",
        unmatched: Unmatched = "encrypt",
        max_streams: int = 10_000,
        limits: UseLimits | None = None,
        ledger: LedgerGate | None = None,
        send: Send | None = None,
    ) -> None:
        self._ledger, self._max, self._send = ledger, max_streams, send
        self._limits = limits or UseLimits()
        self._pool, self._keys, self._clock, self._writer, self._unmatched = pool, keys, clock, writer, unmatched
        self._store = KeyStore(pool)
        self._streams = Streams(self._store, keys, max_streams=max_streams, limits=self._limits)
        self._opening: dict[str, tuple[int, Ciphers]] = {}
        self._opened = 0
        """How many ciphers came into it: beyond `max_streams` it begins anew."""
        self._policies: PolicySet | None = None
        self._making = asyncio.Lock()
        self._marked: set[tuple[str, int]] = set()
        """Key versions on whose row it stands that they are used outside of our store."""

    # for the store's decorator

    async def policies(self) -> PolicySet:
        """As last read; `forget` makes the next call read them again."""
        if self._policies is None:
            self._policies = await self._store.policies(self._unmatched)
        return self._policies

    def forget(self, tenant: str) -> None:
        """Something has moved: the tenant's keys and the policies are read again at their next use."""
        self._streams.discard([tenant])
        self._opening.pop(tenant, None)
        self._policies = None

    def let_go(self, held: Held) -> None:
        """It is not as it stands by now. What others have loaded since stays: who discards it keeps them, and they him, from ever getting on."""
        if self._streams.tenants.get(held.tenant.id.encode()) is held.tenant:
            self._streams.discard([held.tenant.id])
        if self._policies is held.policies:
            self._policies = None

    def forget_all(self) -> None:
        """Whatever may have moved."""
        self._streams.discard_all()
        self._opening.clear()
        self._policies = None

    async def _check_ledger(self, connection: Connection) -> None:
        """Nothing is sealed or opened from a database that lacks what the ledger has. Raises LedgerBehind; remembers for a while that all is well."""
        if self._ledger is not None:
            await self._ledger.check(connection)

    def forget_stream(self, tenant: str, stream: str) -> None:
        """Its head or its class is not what it was."""
        held = self._streams.tenants.get(tenant.encode())
        if held is not None:
            held.streams.pop(stream.encode(), None)
            held.aged.pop(stream.encode(), None)

    async def class_of(self, tenant: str, stream: str) -> str | None:
        """As it is in hand, else as the stream's first event fixed it; None for a stream that is not known."""
        held = self._streams.tenants.get(tenant.encode())
        found = held and self._streams.find(held, stream.encode())
        if found:
            return found.stream_class
        rows = await self._store.fetch("SELECT stream_type_class FROM streams WHERE tenant_id = $1 AND stream_id = $2", tenant, stream)
        return rows[0]["stream_type_class"] if rows else None

    def in_hand(self, tenant: str, stream: str, wanted: Encrypt | None = None, *, text: bool = False) -> Held | None:
        """Without I/O: what an append needs, if it is warm. `wanted` is an override; else policy says which suite seals.

        What a stream's texts need is remembered apart: its events may be plain.
        """
        held = self._streams.tenants.get(tenant.encode())
        if held is None or not held.exists or held.refusal or self._policies is None:
            return None
        found = self._streams.find(held, _raw(stream, text))
        if found is None or found.refusal:
            return None  # a refusal may have been lifted since: `hold` says
        if wanted is None and found.held is not None and found.held.policies is self._policies:
            return cast(Held, found.held)
        decision = wanted or self._policies.decide(tenant, found.stream_class)
        now = found.by_subject or found.key
        if isinstance(decision, Encrypt) and (now is None or now.suite is not decision.suite):
            return None
        if found.fields != (decision.fields if isinstance(decision, Encrypt) else None):
            return None  # as another call's override had it
        out = self._held(held, found, self._policies, wanted)
        if wanted is None:
            found.held = out
        return out

    @staticmethod
    def _held(tenant: Tenant, stream: Stream, policies: PolicySet, wanted: Encrypt | None) -> Held:
        if tenant.refusal or stream.refusal:
            raise RecordRefused(tenant.refusal or stream.refusal or "")
        is_plain = stream.key is None and stream.by_subject is None
        if is_plain and isinstance(wanted or policies.decide(tenant.id, stream.stream_class), Encrypt):
            raise KeyUnavailable("a stream that policy encrypts has no key")  # never plaintext instead
        return Held(tenant, stream, SealedFor(epoch=tenant.epoch, policy_version=policies.version), policies, is_plain)

    async def hold(self, tenant: str, stream: str, stream_class: str, wanted: Encrypt | None = None, *, text: bool = False) -> Held:
        """What an append needs; makes and records keys that are missing. One at a time: two callers must not make the same key."""
        async with self._making:
            for _ in range(ATTEMPTS):
                held = self.in_hand(tenant, stream, wanted, text=text)
                if held is not None:
                    return held
                try:
                    await self._refuse_again(tenant, _raw(stream, text))
                    return await self._load(tenant, stream, stream_class, wanted, text)
                except Conflict:
                    self.forget(tenant)
        raise Conflict("others keep changing this tenant's keys; try again")

    async def _refuse_again(self, name: str, raw: bytes) -> None:
        """What was refused before, if nothing has changed since. Raises RecordRefused, or Moved: a fence may be lifted, a policy another."""
        tenant = self._streams.tenants.get(name.encode())
        stream = None if tenant is None else self._streams.find(tenant, raw)
        refusal = tenant and (tenant.refusal or (stream and stream.refusal))
        if tenant is not None and refusal and self._policies is not None:
            async with self.verified(name, SealedFor(epoch=tenant.epoch, policy_version=self._policies.version)):
                raise RecordRefused(refusal)

    async def clean_up(self, older_than: timedelta, tenant: str | None = None) -> int:
        """Destroy versions retired at least that long ago which nothing stored needs; -> how many. Raises AccessDenied without the control role."""
        cleaned = await CleanUp(self._pool, self._clock).run(tenant=tenant, older_than=older_than, actor=self._writer)
        return sum(found.outcome == "destroyed" for found in cleaned)

    async def is_forgettable(self, scope: Scope) -> bool:
        """The tenant is known, no hold stands in the way of a shred, and no key of the scope is needed by others."""
        async with transaction(self._pool) as connection:
            if await tenants.find(connection, scope.tenant) is None or await holds.overlapping(connection, scope):
                return False
            try:
                await shreds.refuse_shared(connection, scope)
            except CommandRejected:
                return False
        return True

    async def hold_for_text(self, tenant: str, stream: str, stream_class: str) -> Held:
        """Of text that is kept outside the store: always under a key of the stream alone. Nobody else knows which streams' texts a shared key seals."""
        decision = (await self.policies()).decide(tenant, stream_class)
        suite = decision.suite if isinstance(decision, Encrypt) else Suite.AES_256_GCM
        return await self.hold(tenant, stream, stream_class, Encrypt(suite, ScopeKind.STREAM), text=True)

    async def sealing_keys(self, held: Held, persons: Sequence[str | None], fields: Sequence[int] | None = None) -> list[SealingKey]:
        """A key per event, with room to seal: the stream's, or its person's. Raises RecordRefused for a person who was erased, KeyExhausted.

        `fields`: how many fields of each event are sealed beside it.
        """
        by = held.stream.by_subject
        if by is None and fields is None and held.stream.key is not None and len(persons) <= held.stream.key.left:
            held.stream.key.left -= len(persons)
            return [held.stream.key] * len(persons)
        async with self._made(held.tenant) as fresh:
            if by is not None:
                missing = {name for name in persons if name and self._streams.find_subject(held.tenant, name, by.suite) is None}
                await self._streams.load_subjects([(held.tenant, name, by.suite) for name in sorted(missing)], fresh)
            self._still_in_hand(held.tenant)
            needs: dict[SealingKey, int] = {}
            more: dict[SealingKey, int] = {}
            for name, count in zip(persons, fields or [0] * len(persons), strict=True):
                key = self._key_of(held, name)
                needs[key] = needs.get(key, 0) + 1
                more[key] = more.get(key, 0) + count
            self._streams.make_room(needs, fresh, more)
            out = [self._key_of(held, name) for name in persons]
            made = {(row.name.scope.tenant, row.name.key_id, row.name.version) for row in fresh.deks}
            room = {key: key.left for key in out if key.ref in made}
            for key in room:
                key.left = 0  # nobody else seals with it before it is on record
        for key, left in room.items():
            key.left = left
        return out

    async def index_key(self, held: Held) -> IndexKey:
        """Of the tenant's blind index. Use it before the next await: it is wiped when the tenant is forgotten."""
        if held.tenant.index_key is None or self._making.locked():  # or it is not on record yet
            async with self._made(held.tenant) as fresh:
                self._still_in_hand(held.tenant)
                await self._streams.index_key(held.tenant, fresh)
        if held.tenant.index_key is None:
            raise Moved
        return held.tenant.index_key

    def _still_in_hand(self, tenant: Tenant) -> None:
        if self._streams.tenants.get(tenant.id.encode()) is not tenant:
            raise Moved

    @asynccontextmanager
    async def _made(self, tenant: Tenant) -> AsyncIterator[Fresh]:
        """What a block makes is on record at its end; or else it is nobody's key, and the tenant is forgotten. One block at a time."""
        async with self._making:
            fresh = Fresh()
            self._streams.age()
            try:
                yield fresh
                await self._record(tenant, fresh)
            except BaseException as error:
                if not (gone := self._streams.tenants.get(tenant.id.encode()) is not tenant):
                    self._streams.discard([tenant.id])
                # with the tenant its keys were wiped: what could not be opened then says nothing of what is stored
                if isinstance(error, Conflict) or (gone and isinstance(error, KeyUnavailable | AuthenticationFailed)):
                    raise Moved from None
                raise

    def _key_of(self, held: Held, person: str | None) -> SealingKey:
        by, key = held.stream.by_subject, held.stream.key
        if by is not None:
            subject = self._streams.find_subject(held.tenant, person or "", by.suite)
            if subject is not None and subject.refusal:
                raise RecordRefused(subject.refusal)
            key = None if subject is None else subject.key
        if key is None:
            raise KeyUnavailable("an event has no key to be sealed with")
        return key

    async def _load(self, name: str, stream: str, stream_class: str, wanted: Encrypt | None, text: bool) -> Held:
        async with transaction(self._pool) as connection:
            await self._check_ledger(connection)
        policies, raw = await self.policies(), tenant_id(name).encode()
        fresh = Fresh()
        if warm := raw in self._streams.tenants:
            self._streams.tenants[raw].streams.pop(_raw(stream, text), None)
        else:
            await self._streams.load_tenants([name])
        tenant = self._streams.tenants.get(raw)
        if tenant is None:
            raise Conflict("the tenant was forgotten meanwhile")
        try:
            if tenant.refusal is None:
                decisions = policies if wanted is None else policies.overridden(wanted)
                await self._streams.load_streams([Touch(tenant, _raw(stream, text), stream, stream_class)], decisions, fresh)
                await self._record(tenant, fresh)
        except BaseException as error:
            stale = warm or self._streams.tenants.get(raw) is not tenant
            self._streams.discard([name])  # what was made and not recorded is nobody's key
            if stale and isinstance(error, KeyUnavailable | AuthenticationFailed):
                raise Conflict("the tenant was forgotten meanwhile, or its key was made by others since it was loaded") from None
            raise
        self._streams.age()
        if tenant.refusal:
            raise RecordRefused(tenant.refusal)
        found = self._streams.find(tenant, _raw(stream, text))
        if found is None or self._streams.tenants.get(raw) is not tenant:
            raise Conflict("the tenant was forgotten meanwhile")
        return self._held(tenant, found, policies, wanted)

    async def _record(self, tenant: Tenant, fresh: Fresh) -> None:
        """New keys, under the guard and before anything is sealed with them: an append that comes to nothing leaves a harmless key."""
        if tenant.exists and not (fresh.deks or fresh.keks or fresh.reserved or fresh.retired):
            return
        made = Fresh(tenants=[] if tenant.exists else [tenant.id], keks=fresh.keks, deks=fresh.deks, retired=fresh.retired, reserved=fresh.reserved)
        async with transaction(self._pool) as connection:
            # a session that made the tenant and has not ended may be our own caller's: it is not waited for without end
            await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
            await connection.execute("SELECT guarded($1, $2)", guard_stripe(tenant.id), tenant.id)
            now = await tenants.find(connection, tenant.id)
            as_loaded = None if not tenant.exists else (tenant.state, tenant.generation, tenant.epoch)
            if (now and (now.state, now.generation, now.epoch)) != as_loaded:
                raise Conflict("the tenant changed while its keys were made")
            await fresh_rows.insert(connection, made, self._limits, self._clock.now())
            await fresh_rows.audited(connection, made, writer=self._writer, now=self._clock.now())
        tenant.exists = True

    @asynccontextmanager
    async def guard(self, tenant: str) -> AsyncIterator[int | None]:
        """The tenant's guard, shared, for the length of a block: gives its epoch as it stands, None for a tenant that is not known. Raises LedgerBehind."""
        async with transaction(self._pool) as connection:
            await self._check_ledger(connection)
            yield await connection.fetchval("SELECT epoch FROM guarded($1, $2)", guard_stripe(tenant), tenant)

    @asynccontextmanager
    async def verified(
        self, tenant: str, as_of: SealedFor, keys: Collection[tuple[str, int]] = (), stream_class: str | None = None
    ) -> AsyncIterator[None]:
        """The guard around an append to a store that cannot check by itself. Raises Moved if something is not as it was.

        `keys` (id, version) sealed what is appended there: they are marked, since a clean-up looks into our store alone, and a shred of the
        stream's class has to find them.
        """
        async with transaction(self._pool) as connection:
            now = await connection.fetchrow("SELECT epoch, policies FROM guarded($1, $2)", guard_stripe(tenant), tenant)
            if now is None or (now["epoch"], now["policies"]) != (as_of.epoch, as_of.policy_version):
                raise Moved
            if unmarked := {key for key in keys if key not in self._marked}:
                marked = await connection.execute(
                    """UPDATE encryption_keys k SET used_outside = true,
                         outside_class = coalesce(k.outside_class, CASE WHEN k.scope_kind = 'stream' THEN $4 END)
                       FROM unnest($2::text[], $3::int[]) x(id, version)
                       WHERE k.tenant_id = $1 AND k.key_id = x.id::uuid AND k.key_version = x.version AND NOT k.is_destroyed""",
                    tenant, [key_id for key_id, _ in unmarked], [version for _, version in unmarked], stream_class,
                )  # fmt: skip
                if int(marked.rpartition(" ")[2]) != len(unmarked):
                    raise Moved
            yield
        if len(self._marked) + len(keys) > self._max:
            self._marked.clear()  # they are marked again, to no effect
        self._marked |= set(keys)

    async def opening(self, tenant: str, headers: Sequence[Header]) -> tuple[int | None, Ciphers]:
        """Ciphers for what stands in those headers, and the epoch that they are as of: verify it under `guard` before the first use."""
        known = self._opening.get(tenant)
        if known is None:
            found = await self._store.fetch("SELECT epoch FROM tenants WHERE tenant_id = $1", tenant)
            if not found:
                return None, Ciphers(self._store, self._keys)
            known = self._opening.setdefault(tenant, (found[0]["epoch"], Ciphers(self._store, self._keys)))
        before = len(known[1])
        await known[1].load_headers(tenant, headers)
        self._opened += len(known[1]) - before
        if self._opened > self._max:
            self._opened = 0
            self._opening.clear()
        return known

    # the plan's operations

    async def get_active_key(self, tenant: str, scope: Scope) -> KeyName:
        """The version that seals now. Raises UnknownKey if the scope has none (yet)."""
        rows = [row for row in await self._store.newest_keys([(tenant, scope.kind, scope.id)]) if row["is_active"]]
        if not rows:
            raise UnknownKey
        return KeyName(key_id=rows[0]["key_id"], key_version=rows[0]["key_version"])

    async def get_key(self, tenant: str, key_id: UUID, key_version: int, suite: Suite = Suite.AES_256_GCM) -> Cipher:
        """What opens under that version, now: a cipher that says no key. Raises KeyShredded, UnknownKey; AuthenticationFailed for an altered key row."""
        header = Header(suite=suite, scope_kind=ScopeKind.STREAM, key_id=key_id, key_version=key_version, framed=True)
        while True:
            epoch, ciphers = await self.opening(tenant, [header])
            async with self.guard(tenant) as now:
                if now == epoch:
                    return ciphers.get(tenant, header)
            self.forget(tenant)

    async def rotate_key(self, scope: Scope, *, actor: str = "library") -> int:
        """Retire the scope's live keys: none seals anything after this call; each gets its next version at its next write. -> how many.

        Raises StoreUnavailable where a batch, or a session of the caller's own, holds the tenant for longer than a second.
        """
        async with self._making:  # who is loading these keys now gets done first
            names = await self._retire(scope, actor)
            self.forget(scope.tenant)
        return len(names)

    async def _retire(self, scope: Scope, actor: str) -> list[str]:
        async with transaction(self._pool) as connection:
            if not await guard.take(connection, scope.tenant):
                raise StoreUnavailable("a batch did not let go of the tenant in time; try again")  # nobody is ended for a rotation
            tenant = await tenants.lock(connection, scope.tenant)
            if tenant.state != "active":
                raise RecordRefused("tenant_shredded")
            names = await rotations.retire(connection, scope, None)
            await tenants.next_epoch(connection, scope.tenant, shredding=False)
            await audit.append(
                connection, writer=self._writer, at=self._clock.now(), action="keys.rotate", actor=actor, tenant=scope.tenant,
                details=Keys.of(names).in_audit(),
            )  # fmt: skip
        return names

    async def destroy(self, tenant: str, key: KeyName | None = None, *, reason: str) -> Receipt:
        """What the tenant's keys seal, or what this one does, becomes unreadable for ever: a shred of the key's scope, every version of it.

        A command to the control plane, answered with its receipt. Raises UnknownKey, AccessDenied, CommandRejected (a key that others need too),
        BrokerUnavailable if no receipt came within 30 s.
        """
        receipt = await shred(self._send, Scope.of_tenant(tenant) if key is None else await self._scope(tenant, key), reason)
        self.forget(tenant)
        return receipt

    async def _scope(self, tenant: str, key: KeyName) -> Scope:
        rows = await self._store.keys({(tenant, key.key_id, key.key_version)})
        if not rows:
            raise UnknownKey
        if rows[0]["scope_id"] == SCOPE_ID:
            raise CommandRejected("shared_key", "the key of the blind index is of all the tenant's classes: it goes with the tenant")
        return Scope(tenant=tenant, kind=ScopeKind(rows[0]["scope_kind"]), id=rows[0]["scope_id"])


def _raw(stream: str, text: bool) -> bytes:
    """Under which name the cache has it; no stream id begins with NUL."""
    return b"\0" + stream.encode() if text else stream.encode()
