"""The data path, top to bottom: consume → parse → classify → keys → seal → store → project → release.

One batch is sealed while the one before is in Postgres and Kafka; transactions stay serial. Two cursors say where a partition
stands: Postgres what is stored, Kafka's committed offset what is projected. A batch that does not commit drops everything it
had staged; whatever is not known for certain is asked of Postgres and Kafka again (`_recover`), never assumed.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from time import perf_counter
from typing import Any, cast

from sidecar import telemetry
from sidecar.core.aead import Suite, lp, u32
from sidecar.core.envelope import NO_FIELD, Header, Sealer, dead_letter_aad, event_aad, seal
from sidecar.core.errors import Conflict, KeyShredded, KeyUnavailable, MalformedRecord, RecordError, SidecarError, Unavailable
from sidecar.core.extract import Extractor, occurred_at
from sidecar.core.keys import TenantState
from sidecar.core.model import Headers, Scope, ScopeKind
from sidecar.core.policy import Classifier, PolicySet
from sidecar.core.streams import Fresh, Stream, Tenant, Touch
from sidecar.core.view import attributes, frame, guard_stripe
from sidecar.event_store import BY_SOURCE, Ciphers, open_row
from sidecar.kafka.client import ProducerFenced
from sidecar.kafka.consumer import Batch, KafkaSource, Partition
from sidecar.kafka.producer import Outgoing, TooLarge, TransactionalProducer
from sidecar.ports import Clock
from sidecar.postgres.batches import DeadLetter, GuardSession, LeaseMove, MessageRows, Refusal, StoreBatch, TenantStates
from sidecar.postgres.errors import Fenced
from sidecar.postgres.leases import Lease, still_ours
from sidecar.settings import Settings
from sidecar.streams import Streams
from sidecar.views import Views, dead_letter_record, project, project_event

FLUSH_EVERY_BATCHES = 20
YIELD_EVERY_RECORDS = 100
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


_DEAD_BY_SOURCE = """SELECT "offset", reason, value_sha256 FROM dead_letters
WHERE source_id = $1 AND partition = $2 AND "offset" >= $3 AND "offset" < $4 AND reason <> 'view_too_large' ORDER BY 1"""


class Redo(Exception):
    """Something that the batch was sealed with has changed: drop these tenants, seal again."""

    def __init__(self, tenants: Iterable[str], cause: str, policies: bool = False) -> None:
        super().__init__(cause)
        self.tenants, self.cause, self.policies = set(tenants), cause, policies


@dataclass(slots=True)
class Item:
    """A record on its way into the store."""

    lease: Lease
    offset: int
    tenant: bytes
    stream: bytes
    type_lp: bytes
    message_id: bytes
    value: bytes | None
    key: bytes | None
    timestamp_ms: int
    occurred_us: int
    headers: Headers
    projected: bool


@dataclass(slots=True)
class Faulty:
    """A record that becomes a dead letter. `tenant` only where it is valid."""

    lease: Lease
    offset: int
    reason: str
    tenant: str | None
    value: bytes | None
    projected: bool


@dataclass(slots=True)
class Work:
    """One batch under way. Everything in it is void if `voids` is not the pipeline's any more."""

    batch: Batch
    voids: int
    items: list[Item] = field(default_factory=list)
    faulty: list[Faulty] = field(default_factory=list)
    ends: dict[Partition, tuple[Lease, int]] = field(default_factory=dict)
    moves: dict[Partition, LeaseMove] = field(default_factory=dict)
    replays: dict[Partition, list[int]] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    fresh: Fresh = field(default_factory=Fresh)
    rows: MessageRows = field(default_factory=MessageRows)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    outgoing: list[Outgoing] = field(default_factory=list)
    stored_rows: list[Any] = field(default_factory=list)
    ciphers: Ciphers | None = None
    heads: dict[tuple[str, str], int] = field(default_factory=dict)
    undo: dict[Stream, int] = field(default_factory=dict)
    """Heads as they were before this batch."""
    voided: bool = False
    flush: bool = False
    sealed: int = 0
    policy_version: int = 0

    @property
    def stripes(self) -> list[int]:
        return sorted({guard_stripe(name) for name in self.tenants})


@dataclass(slots=True)
class Ports:
    """What the pipeline works with; put together in app.py."""

    settings: Settings
    instance_id: str
    session: GuardSession
    producer: TransactionalProducer
    streams: Streams
    extractor_of: Callable[[str], Extractor]
    classifier: Classifier
    views: Views
    dead_letter_partitions: int
    load_policies: Callable[[], Any]
    new_ciphers: Callable[[], Ciphers]
    claim: Callable[[Partition], Any]
    clock: Clock


class Pipeline:
    """One instance's data path. Its coroutines run in one event loop; `run` is the only one that moves anything."""

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        self.owned: dict[Partition, Lease] = {}
        self.ready = (False, "starting")
        self.serving = asyncio.Event()
        self.source: KafkaSource | None = None
        self._claims: set[Partition] = set()
        self._forget: set[str] = set()
        self._voids = 0
        self._rewinds = 0
        self._inflight: asyncio.Task[None] | None = None
        self._inflight_work: Work | None = None
        self._fetching: asyncio.Task[Batch] | None = None
        self._recovering = True
        self._policies: PolicySet | None = None
        self._types: dict[bytes, bytes] = {}
        self._tenants_seen: dict[tuple[str, bytes], str] = {}
        self._batches = 0
        self._attempts = 0
        """Recoveries since the last batch that was committed."""

    # ── rebalance and news from outside ─────────────────────────────────────────────────────────────────────────────

    def assigned(self, partitions: list[Partition]) -> None:
        """New partitions, paused; they are claimed before the next batch."""
        self._claims |= set(partitions)

    async def revoked(self, partitions: list[Partition], lost: bool) -> None:
        """Let go: what is sealed ahead is void; the batch in flight is waited for, unless the partitions are somebody else's already."""
        for partition in partitions:
            self.owned.pop(partition, None)
            self._claims.discard(partition)
        self._voids += 1
        if not lost and not self._recovering and self._inflight is not None:
            await asyncio.wait({self._inflight})

    def forget(self, tenant: str) -> None:
        """A tenant's epoch moved: its keys leave memory before the next batch. The epoch check does not depend on this."""
        self._forget.add(tenant)

    def reclaim(self, partitions: Iterable[Partition]) -> None:
        """Ask Postgres and Kafka again where these partitions stand: their topic was made again."""
        for partition in partitions:
            if self.owned.pop(partition, None):
                self._claims.add(partition)
                self._voids += 1

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, source: KafkaSource, stop: asyncio.Event) -> None:
        """Until `stop`; then the batch in flight is finished. Raises what no waiting mends (ConfigurationError, InstanceReplaced)."""
        self.source = source
        await self._recover(None, stop)
        while not stop.is_set():
            try:
                await self._turn(source)
            except (Unavailable, ProducerFenced, Fenced, KeyUnavailable, RecordError) as error:
                await self._recover(error, stop)
        await self._finish()

    async def _turn(self, source: KafkaSource) -> None:
        """One batch: seal it while the last one is committed, then commit it behind that."""
        if self._claims or self._forget:
            await self._settle(None)
            self._drop_forgotten()
            await self._claim_all(source)
        if self._fetching is None:
            self._fetching = asyncio.create_task(source.next_batch())
        batch = await asyncio.shield(self._fetching)
        self._fetching = asyncio.create_task(source.next_batch())
        if batch.rewinds != self._rewinds or not batch.messages:
            if not batch.messages:
                await self._settle(None)
            return
        work = await self._prepare(batch)
        redone = await self._settle(work)
        if redone or work.voids != self._voids:
            self._void(work)
            work = await self._prepare(batch)
        if work.ends:
            self._inflight_work = work
            self._inflight = asyncio.create_task(self._commit(work))
        self.ports.streams.age()

    async def _settle(self, ahead: Work | None) -> bool:
        """Wait for the batch in flight. If it must be sealed again, do so until it holds; True: what was sealed ahead is void."""
        task, work = self._inflight, self._inflight_work
        if task is None or work is None:
            return False
        try:
            await asyncio.shield(task)
            return False
        except Redo as redo:
            if ahead is not None:
                self._void(ahead)
            self._inflight = self._inflight_work = None
            await self._redo(work, redo)
            return True
        finally:
            if task.done():
                self._inflight = self._inflight_work = None

    async def _redo(self, work: Work, redo: Redo) -> None:
        while True:
            telemetry.batches_redone.labels(redo.cause).inc()
            self._void(work)
            if redo.policies:
                self._policies = None
                self.ports.streams.discard_all()
            self.ports.streams.discard(redo.tenants)
            work = await self._prepare(work.batch)
            if not work.ends:
                return
            try:
                await self._commit(work)
                return
            except Redo as again:
                redo = again

    def _void(self, work: Work) -> None:
        """Take back what a batch had staged: heads, cursors, and whole tenants of which it had made something new. Newest batch first."""
        if work.voided:
            return
        work.voided = True
        self.ports.streams.discard(work.fresh.touched())
        for stream, head in work.undo.items():
            stream.head = head
        for lease, _ in work.ends.values():
            lease.staged = lease.stored

    def _drop_forgotten(self) -> None:
        self.ports.streams.discard(self._forget)
        self._forget = set()

    async def _finish(self) -> None:
        try:
            await self._settle(None)
        except (SidecarError, Redo) as error:
            self.ready = (False, "stopped without knowing how the last batch ended")
            telemetry.log.warning("the last batch was not finished; the next start resumes it", extra={"action": "stop", "error": error})
        self._recovering = True
        if self._fetching is not None:
            await asyncio.wait({self._fetching})

    # ── recovery: ask, never assume ─────────────────────────────────────────────────────────────────────────────────

    async def _recover(self, error: SidecarError | None, stop: asyncio.Event) -> None:
        """Void all that is under way, end the Kafka transaction one way or the other, take a new guard session, read the cursors again.

        The order matters: the guard's locks are given up only after `reopen` has ended the transaction that they covered.
        """
        self._recovering = True
        while not stop.is_set():
            try:
                if error is not None:
                    self.ready = (False, f"waiting: {error}")
                    telemetry.retries.labels(type(error).__name__).inc()
                    telemetry.log.warning("waiting", extra={"action": "recover", "error": error, "attempt": self._attempts})
                    await self._pause(BACKOFF_SECONDS[min(self._attempts, len(BACKOFF_SECONDS) - 1)])
                    self._attempts += 1
                await self._abandon()
                await self.ports.producer.reopen()
                await self.ports.session.open()
                await self._claim_what_is_assigned()
                self._policies = await self.ports.load_policies()
                self._recovering = False
                self.ready = (True, "serving")
                self.serving.set()
                return
            except (Unavailable, ProducerFenced, Fenced, KeyUnavailable) as again:
                error = again

    async def _pause(self, seconds: float) -> None:
        """Back off, in the group."""
        if self._fetching is not None:
            await asyncio.wait({self._fetching})
            fetched, self._fetching = self._fetching, None
            fetched.exception()
        if self.source is not None:
            await self.source.idle(seconds)

    async def _abandon(self) -> None:
        if self._inflight is not None:
            await asyncio.wait({self._inflight})
            self._inflight.exception()
        self._inflight = self._inflight_work = None
        self.ports.streams.discard_all()

    async def _claim_what_is_assigned(self) -> None:
        """All that the group assigns to this instance is claimed again; what another took by right is not assigned any more.

        A lease alone does not tell: one who was late, and is out of the group, may have taken it from its rightful owner.
        """
        ours = await still_ours(self.ports.session.connection, list(self.owned.values()))
        for lease in self.owned.values():
            if (lease.source_id, lease.partition) not in ours:
                telemetry.fenced.labels("lease").inc()
        self.owned.clear()
        if self.source is not None:
            self._claims |= set(await self.source.assignment())
        self._voids += 1

    async def _claim_all(self, source: KafkaSource) -> None:
        """Take the leases of assigned partitions and read on at the lower of their two cursors.

        What was fetched ahead is void with that, also of partitions that were in hand before: they are read again from where they stand.
        """
        starts: dict[Partition, int] = {}
        claims = list(self._claims)
        for partition in claims:
            claimed = await self.ports.claim(partition)
            if partition not in self._claims:
                continue  # revoked meanwhile
            self._claims.discard(partition)
            if claimed is not None:
                lease, starts[partition] = claimed
                self.owned[partition] = lease
        if starts:
            self._rewinds += 1
            await source.start({at: min(lease.staged, lease.projected) for at, lease in self.owned.items()} | starts)

    # ── seal ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self, batch: Batch) -> Work:
        """Parse, classify, get keys, seal: everything that needs no lock. Raises Unavailable; nothing is written."""
        started = perf_counter()
        if self._policies is None:
            self._policies = await self.ports.load_policies()
        work = Work(batch, self._voids, policy_version=self._policies.version)
        await self._parse(work)
        await self._resolve(work, self._policies)
        if work.replays:
            await self._load_replay(work)
        await self._seal(work)
        telemetry.batch_seconds.labels("seal").observe(perf_counter() - started)
        return work

    async def _parse(self, work: Work) -> None:
        limits, owned = self.ports.settings.limits, self.owned
        max_bytes, max_headers = int(limits.max_record_bytes), limits.max_headers
        extractors: dict[str, Extractor] = {}
        items = work.items
        for number, message in enumerate(cast(list[Any], work.batch.messages)):  # the stubs make every coordinate optional
            if not number % YIELD_EVERY_RECORDS:
                await asyncio.sleep(0)  # the batch in flight goes on meanwhile
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            at = (topic, partition)
            lease = owned.get(at)
            if lease is None:
                continue
            projected = offset >= lease.projected
            work.ends[at] = (lease, offset + 1)
            if offset < lease.staged:
                if projected:
                    work.replays.setdefault(at, [offset, 0])[1] = offset + 1
                continue
            extractor = extractors.get(topic) or extractors.setdefault(topic, self.ports.extractor_of(topic))
            value, key = message.value(), message.key()
            tenant: str | None = None
            try:
                headers: Headers = message.headers() or ()
                if len(headers) > max_headers:
                    raise MalformedRecord("too many headers", reason="too_many_headers")
                by_name = dict(headers)
                raw_tenant, raw_stream, raw_type, raw_id = extractor.raw(topic, partition, offset, key, value, by_name)
                tenant = self._tenant(topic, extractor, raw_tenant)
                if len(value or b"") + len(key or b"") > max_bytes:
                    raise MalformedRecord("over the limit", reason="too_large")
                stream = raw_stream or b""
                if self.ports.streams.tenants.get(raw_tenant or b"") is None or not self._in_hand(raw_tenant or b"", stream):
                    extractor.check_stream(stream)
                type_lp = self._types.get(raw_type or b"") or self._type(extractor, raw_type)
                extractor.check_message_id(raw_id)
                timestamp_ms = message.timestamp()[1]
            except RecordError as error:
                work.faulty.append(Faulty(lease, offset, error.reason, tenant, value, projected))
                continue
            except (SystemError, UnicodeDecodeError):  # a header's name is no UTF-8: confluent_kafka cannot say it
                work.faulty.append(Faulty(lease, offset, MalformedRecord.reason, None, value, projected))
                continue
            occurred_us = occurred_at(by_name, timestamp_ms)
            items.append(
                Item(lease, offset, raw_tenant or b"", stream, type_lp, raw_id or b"", value, key, timestamp_ms, occurred_us, headers, projected)
            )
        for at, (lease, end) in work.ends.items():
            if end > lease.staged:
                work.moves[at] = LeaseMove(lease.source_id, lease.partition, lease.epoch, lease.staged, end)
                lease.staged = end

    def _tenant(self, topic: str, extractor: Extractor, raw: bytes | None) -> str:
        seen = self._tenants_seen.get((topic, raw or b""))
        if seen is None:
            seen = extractor.check_tenant(raw)
            if len(self._tenants_seen) > 100_000:
                self._tenants_seen.clear()
            self._tenants_seen[topic, raw or b""] = seen
        return seen

    def _in_hand(self, tenant: bytes, stream: bytes) -> bool:
        held = self.ports.streams.tenants[tenant]
        return stream in held.streams or stream in held.aged

    def _type(self, extractor: Extractor, raw: bytes | None) -> bytes:
        packed = lp(extractor.check_type(raw).encode())
        if len(self._types) > 10_000:
            self._types.clear()
        self._types[raw or b""] = packed
        return packed

    async def _resolve(self, work: Work, policies: PolicySet) -> None:
        """Tenants, streams and keys of the batch that are not in hand."""
        streams = self.ports.streams
        held = streams.tenants
        unknown = {item.tenant for item in work.items if item.tenant not in held}
        unknown |= {f.tenant.encode() for f in work.faulty if f.tenant and f.tenant.encode() not in held}
        if unknown:
            await streams.load_tenants(sorted(raw.decode() for raw in unknown))
        touches: dict[tuple[bytes, bytes], Touch] = {}
        for item in work.items:
            tenant = held[item.tenant]
            if tenant.id not in work.tenants:
                work.tenants[tenant.id] = tenant
                if not tenant.exists:
                    work.fresh.tenants.append(tenant.id)
                    tenant.exists = True  # staged: discarded with the batch
            if tenant.refusal is None and (item.tenant, item.stream) not in touches and streams.find(tenant, item.stream) is None:
                touches[item.tenant, item.stream] = self._touch(tenant, item)
        if touches:
            await streams.load_streams(list(touches.values()), policies, work.fresh)
        for fault in work.faulty:
            await self._dead_letter(work, fault)

    def _touch(self, tenant: Tenant, item: Item) -> Touch:
        stream = item.stream.decode()
        by_name = dict(item.headers)
        stream_class = self.ports.classifier.classify(topic=item.lease.topic, type=item.type_lp[4:].decode(), stream=stream, headers=by_name)
        return Touch(tenant, item.stream, stream, stream_class)

    async def _dead_letter(self, work: Work, fault: Faulty) -> None:
        """Hash and coordinates; the value sealed under the tenant's own key where there is such a tenant."""
        sealed = None
        tenant = self.ports.streams.tenants[fault.tenant.encode()] if fault.tenant else None
        if tenant is not None and tenant.exists and tenant.state == TenantState.ACTIVE and fault.value:
            work.tenants[tenant.id] = tenant
            key = await self.ports.streams.shared_key(Scope.of_tenant(tenant.id), tenant, Suite.AES_256_GCM, work.fresh)
            prefix = Header(suite=key.suite, scope_kind=ScopeKind.TENANT, key_id=key.key_id, key_version=key.version, framed=False).prefix()
            aad = dead_letter_aad(tenant.id, fault.lease.source_id, fault.lease.partition, fault.offset, prefix)
            sealed = seal(key.cipher, prefix, aad, fault.value)
        lease = fault.lease
        work.dead_letters.append(
            DeadLetter(
                source_id=lease.source_id,
                partition=lease.partition,
                offset=fault.offset,
                reason=fault.reason,
                tenant=tenant.id if tenant is not None and tenant.exists else None,
                value_sha256=sha256(fault.value or b"").digest(),
                value_encrypted=sealed,
            )
        )
        if fault.projected:
            work.outgoing.append(self._dead_letter_record(lease.topic, lease.partition, fault.offset, fault.reason, fault.value))

    def _dead_letter_record(self, topic: str, partition: int, offset: int, reason: str, value: bytes | None) -> Outgoing:
        to = self.ports.settings.dead_letters.topic
        digest = sha256(value or b"").digest()
        return dead_letter_record(to, self.ports.dead_letter_partitions, reason=reason, source=(topic, partition, offset), digest=digest)

    async def _seal(self, work: Work) -> None:
        """Positions, envelopes, rows and view records, in the order of the records."""
        streams, views, sealer = self.ports.streams, self.ports.views, Sealer(len(work.items))
        tenants, add, heads, undo = streams.tenants, work.rows.add, work.heads, work.undo
        self._batches += 1
        work.flush = self._batches % FLUSH_EVERY_BATCHES == 0
        note_heads = work.flush or bool(work.fresh.streams)
        for number, item in enumerate(work.items):
            if not number % YIELD_EVERY_RECORDS:
                await asyncio.sleep(0)
            tenant, lease = tenants[item.tenant], item.lease
            stream = None if tenant.refusal else streams.find(tenant, item.stream)
            refusal = tenant.refusal if stream is None else stream.refusal
            if stream is None or refusal is not None:
                work.refusals.append(Refusal(lease.source_id, lease.partition, item.offset, tenant.id, refusal or "policy_refuse"))
                continue
            if stream not in undo:
                undo[stream] = stream.head
            stream.head = position = stream.head + 1
            if note_heads:
                heads[tenant.id, stream.id] = position
            value, key, id_lp, sealed = item.value, stream.key, u32(len(item.message_id)) + item.message_id, None
            attrs = attributes(item.key, item.timestamp_ms, item.headers, value is None)
            if key is not None:
                aad = event_aad(tenant.aad + stream.id_lp, position, id_lp, item.type_lp, 1, NO_FIELD, key.prefix)
                sealed = sealer.seal(key.cipher, key.prefix, aad, frame(attrs, value))
                work.sealed += 1
            add(
                tenant.id_lp, stream.id_lp, position, id_lp, item.type_lp, item.occurred_us, value, attrs, sealed,
                lease.source_id, lease.partition, item.offset, value is None,
            )  # fmt: skip
            if item.projected and views and (wanting := views.matching(lease.topic, stream.stream_class, tenant.id)):
                work.outgoing += project(
                    wanting, topic=lease.topic, partition=lease.partition, offset=item.offset, tenant=tenant.id, stream=stream.id,
                    stream_class=stream.stream_class, position=position, message_id=item.message_id, type_=item.type_lp[4:],
                    value=value, key=item.key, timestamp_ms=item.timestamp_ms, headers=item.headers, origin=(lease, item.offset, tenant.id),
                )  # fmt: skip

    async def _load_replay(self, work: Work) -> None:
        """What is stored but may not be projected is read from the store, never taken from the source again; keys before any lock."""
        connection = self.ports.streams.store
        for at, (first, end) in work.replays.items():
            lease = work.ends[at][0]  # not `owned`: it may have been revoked meanwhile
            work.stored_rows += await connection.fetch(BY_SOURCE, lease.source_id, lease.partition, first, end)
            for row in await connection.fetch(_DEAD_BY_SOURCE, lease.source_id, lease.partition, first, end):
                to = self.ports.settings.dead_letters.topic
                work.outgoing.append(
                    dead_letter_record(
                        to, self.ports.dead_letter_partitions, reason=row["reason"], source=(*at, row["offset"]), digest=row["value_sha256"]
                    )
                )
        names = sorted({row["tenant_id"] for row in work.stored_rows})
        missing = [name for name in names if name.encode() not in self.ports.streams.tenants]
        if missing:
            await self.ports.streams.load_tenants(missing)
        work.tenants |= {name: self.ports.streams.tenants[name.encode()] for name in names}
        work.ciphers = self.ports.new_ciphers()
        await work.ciphers.load(work.stored_rows)

    # ── store and project ───────────────────────────────────────────────────────────────────────────────────────────

    async def _commit(self, work: Work) -> None:
        """One Postgres transaction under the guard, then one Kafka transaction, then the guard is given back.

        Raises Redo when what was sealed does not fit any more (nothing was written); Unavailable, Fenced or ProducerFenced when
        only `_recover` can tell what holds.
        """
        session, stripes, now = self.ports.session, work.stripes, self.ports.clock.now()
        started = perf_counter()
        try:
            await session.write(self._store_batch(work, stripes), lambda states, version: self._verify(work, states, version), now)
        except Redo:
            await session.release(stripes)
            raise
        except Fenced:
            raise
        except Conflict as conflict:
            await session.release(stripes)
            raise Redo(work.tenants, "conflict") from conflict
        for at, move in work.moves.items():
            work.ends[at][0].stored = move.end
        stored = perf_counter()
        await self._project(work)
        await session.release(stripes)
        self._count(work, stored - started, perf_counter() - stored)

    def _store_batch(self, work: Work, stripes: list[int]) -> StoreBatch:
        heads = work.heads if work.flush else {}
        fresh = {(t, stream.id): work.heads.get((t, stream.id), 0) for t, stream in work.fresh.streams}
        flush = [(t, s, position) for (t, s), position in (heads | fresh).items()]
        return StoreBatch(stripes, list(work.moves.values()), list(work.tenants), work.fresh, work.rows, work.dead_letters, work.refusals, flush)

    def _verify(self, work: Work, states: TenantStates, policy_version: int) -> None:
        """Under the guard: is everything as it was when the batch was sealed? A warm cache never outlives a change."""
        if policy_version != work.policy_version:
            raise Redo(work.tenants, "policy", policies=True)
        made = set(work.fresh.tenants)
        moved = [
            name
            for name, tenant in work.tenants.items()
            if (states.get(name) is not None if name in made else states.get(name) != (tenant.state, tenant.generation, tenant.epoch))
        ]
        if moved:
            raise Redo(moved, "epoch")

    async def _project(self, work: Work) -> None:
        """View records, dead letters and offsets in one Kafka transaction; without any of the first two, offsets alone."""
        outgoing = self._replayed(work) + work.outgoing
        offsets = {at: end for at, (lease, end) in work.ends.items() if end > lease.projected}
        if outgoing or self.ports.views:
            while True:
                try:
                    await self.ports.producer.emit(outgoing, offsets, work.batch.group_metadata)
                    break
                except TooLarge as error:
                    outgoing = await self._without(outgoing, error.origins)
        elif offsets and self.source is not None:
            self.source.commit(offsets)
        for at, (lease, end) in work.ends.items():
            if at in offsets:
                lease.projected = end

    def _replayed(self, work: Work) -> list[Outgoing]:
        """View records of stored events, opened under the guard. Erased ones have none."""
        out: list[Outgoing] = []
        for row in work.stored_rows:
            if work.ciphers is None:
                break
            tenant = work.tenants.get(row["tenant_id"])
            if tenant is None or tenant.refusal or row["stream_type_class"] in tenant.erased_classes:
                continue  # shredded meanwhile: its plain events have no view record beyond the barrier either
            try:
                event = open_row(row, work.ciphers)
            except KeyShredded:
                continue
            except RecordError as error:
                telemetry.dead_letters.labels(error.reason).inc()
                telemetry.log.error(
                    "a stored event cannot be opened", extra={"action": "project", "error": error, "position": row["stream_position"]}
                )
                continue
            lease = self.owned.get((row["source_topic"], row["source_partition"]))
            out += project_event(self.ports.views, event, (lease, row["source_offset"], event.tenant))
        return out

    async def _without(self, outgoing: list[Outgoing], origins: list[Any]) -> list[Outgoing]:
        """Records that the view's topic does not take: stored, but dead letters instead of view records."""
        refused = {(lease.topic, lease.partition, offset) for lease, offset, _ in origins if lease is not None}
        await self.ports.session.note_view_too_large([(lease, offset, tenant) for lease, offset, tenant in origins if lease is not None])
        kept = [o for o in outgoing if o.origin is None or (o.origin[0].topic, o.origin[0].partition, o.origin[1]) not in refused]
        return kept + [self._dead_letter_record(*at, "view_too_large", None) for at in sorted(refused)]

    def _count(self, work: Work, store_seconds: float, project_seconds: float) -> None:
        self._attempts = 0
        telemetry.batch_seconds.labels("store").observe(store_seconds)
        telemetry.batch_seconds.labels("project").observe(project_seconds)
        telemetry.events_stored.labels("encrypted").inc(work.sealed)
        telemetry.events_stored.labels("plain").inc(work.rows.count - work.sealed)
        for letter in work.dead_letters:
            telemetry.dead_letters.labels(letter.reason).inc()
        for refusal in work.refusals:
            telemetry.refusals.labels(refusal.reason).inc()
        for row in work.fresh.deks:
            telemetry.keys_created.labels(row.name.scope.kind.value).inc()
