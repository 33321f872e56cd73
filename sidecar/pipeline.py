"""The data path, top to bottom: consume → parse → classify → keys → seal → store → project → release.

One batch is sealed while the one before is in Postgres and Kafka; transactions stay serial. Two cursors say where a partition
stands: Postgres what is stored, Kafka's committed offset what is projected. A batch that does not commit drops everything it
had staged; whatever is not known for certain is asked of Postgres and Kafka again (`_recover`), never assumed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from sidecar import telemetry
from sidecar.core.aead import u32
from sidecar.core.blind_index import tokens
from sidecar.core.envelope import NO_FIELD, Sealer, event_aad
from sidecar.core.errors import Conflict, KeyUnavailable, RecordError, SidecarError, Unavailable
from sidecar.core.extract import Extractor
from sidecar.core.fields import Bind, Document, seal_document
from sidecar.core.policy import Classifier, PolicySet
from sidecar.core.streams import SealingKey, Stream, Tenant
from sidecar.core.view import attributes, frame
from sidecar.dead_letters import DeadLetters
from sidecar.event_store import Ciphers
from sidecar.intake import YIELD_EVERY_RECORDS, Intake
from sidecar.kafka.client import ProducerFenced
from sidecar.kafka.consumer import Batch, KafkaSource, Partition
from sidecar.kafka.producer import Outgoing, TooLarge, TransactionalProducer
from sidecar.ledger import LedgerGate
from sidecar.partitions import Claim, Partitions
from sidecar.persons import Persons
from sidecar.placement import Placement
from sidecar.ports import Clock
from sidecar.postgres.batches import GuardSession, Refusal, TenantStates
from sidecar.postgres.blind_index import Row
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import Fenced
from sidecar.postgres.leases import Lease
from sidecar.replay import Replay
from sidecar.settings import Settings
from sidecar.streams import Streams
from sidecar.views import Views, project
from sidecar.work import Redo, Work

FLUSH_EVERY_BATCHES = 20
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


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
    ledger: LedgerGate
    record: Callable[[Connection], Awaitable[None]]
    """Writes what this instance serves down, once the ledger lets it."""
    claim: Claim
    clock: Clock


class Pipeline:
    """One instance's data path. Its coroutines run in one event loop; `run` is the only one that moves anything."""

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        letters = ports.settings.dead_letters
        self._intake = Intake(ports.settings.limits, ports.extractor_of, ports.streams)
        self._dead_letters = DeadLetters(ports.streams, letters.topic, ports.dead_letter_partitions)
        self._placement = Placement(ports.streams, ports.classifier, Persons(ports.streams), self._dead_letters)
        self._replay = Replay(ports.streams, ports.new_ciphers, ports.views, self._dead_letters)
        self.partitions = Partitions(ports.claim)
        self.ready = (False, "starting")
        self.serving = asyncio.Event()
        self.source: KafkaSource | None = None
        self._forget: set[str] = set()
        self._voids = 0
        self._rewinds = 0
        self._inflight: asyncio.Task[None] | None = None
        self._inflight_work: Work | None = None
        self._fetching: asyncio.Task[Batch] | None = None
        self._recovering = True
        self._policies: PolicySet | None = None
        self._batches = 0
        self._attempts = 0
        """Recoveries since the last batch that was committed."""

    @property
    def owned(self) -> dict[Partition, Lease]:
        """The partitions in hand."""
        return self.partitions.owned

    # ── rebalance and news from outside ─────────────────────────────────────────────────────────────────────────────

    def assigned(self, partitions: list[Partition]) -> None:
        """New partitions, paused; they are claimed before the next batch."""
        self.partitions.waiting |= set(partitions)

    async def revoked(self, partitions: list[Partition], lost: bool) -> None:
        """Let go: what is sealed ahead is void; the batch in flight is waited for, unless the partitions are somebody else's already."""
        self.partitions.let_go(partitions)
        self._voids += 1
        if not lost and not self._recovering and self._inflight is not None:
            await asyncio.wait({self._inflight})

    def forget(self, tenant: str) -> None:
        """A tenant's epoch moved: its keys leave memory before the next batch. The epoch check does not depend on this."""
        self._forget.add(tenant)

    def reclaim(self, partitions: Iterable[Partition]) -> None:
        """Ask Postgres and Kafka again where these partitions stand: their topic was made again."""
        if self.partitions.reclaim(partitions):
            self._voids += 1

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, source: KafkaSource, stop: asyncio.Event) -> None:
        """Until `stop`; then the batch in flight is finished. Raises what no waiting mends (ConfigurationError, InstanceReplaced)."""
        self.source = source
        try:
            await self._recover(None, stop)
            if not stop.is_set():  # who may not serve, or not yet, takes no partitions from those who do
                await source.subscribe([s.topic for s in self.ports.settings.sources])
            while not stop.is_set():
                try:
                    await self._turn(source)
                except (Unavailable, ProducerFenced, Fenced, KeyUnavailable, RecordError) as error:
                    await self._recover(error, stop)
            await self._finish()
        finally:  # the source is closed next
            await self._fetched()

    async def _turn(self, source: KafkaSource) -> None:
        """One batch: seal it while the last one is committed, then commit it behind that."""
        if self.partitions.waiting or self._forget:
            await self._settle(None)
            self._drop_forgotten()
            if starts := await self.partitions.claim():
                self._rewinds += 1
                await self._project_vanished(source)
                await source.start(starts)
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

    async def _project_vanished(self, source: KafkaSource) -> None:
        """What was stored and not projected when its source records went (retention, DeleteRecords): the store alone has it."""
        for at, lease in list(self.owned.items()):
            while self.owned.get(at) is lease and lease.projected < (gone := min(lease.low, lease.stored)):
                end = await self._replay.chunk_end(lease, lease.projected, gone)
                await source.idle(0.01)
                work = await self._prepare(Batch([], await source.group_metadata(), self._rewinds, {at: (lease.projected, end)}))
                try:
                    await self._commit(work)
                except Redo as redo:
                    await self._redo(work, redo)

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
        if not self.ready[0]:  # a new producer ends what the last one may have left open; without one the outcome stays unknown
            try:
                await self.ports.producer.reopen()
                self.ready = (True, "stopped")
            except (SidecarError, ProducerFenced) as error:
                telemetry.log.warning("the last transaction's outcome is not known", extra={"action": "stop", "error": error})

    # ── recovery: ask, never assume ─────────────────────────────────────────────────────────────────────────────────

    async def _recover(self, error: SidecarError | None, stop: asyncio.Event) -> None:
        """Void all that is under way, end the Kafka transaction one way or the other, take a new guard session, read the cursors again.

        The order matters: the guard's locks are given up only after `reopen` has ended the transaction that they covered.
        """
        self._recovering = True
        if error is not None:
            self.ready = (False, f"waiting: {error}")  # also where a stop ends the waiting: then it is not on record as stopped
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
                await self.ports.ledger.check(self.ports.session.connection)
                if not self.serving.is_set():
                    await self.ports.record(self.ports.session.connection)
                await self.partitions.reclaim_all(self.ports.session.connection, self.source)
                self._voids += 1
                self._policies = await self.ports.load_policies()
                self._recovering = False
                self.ready = (True, "serving")
                self.serving.set()
                return
            except (Unavailable, ProducerFenced, Fenced, KeyUnavailable) as again:
                error = again

    async def _pause(self, seconds: float) -> None:
        """Back off, in the group."""
        await self._fetched()
        if self.source is not None:
            await self.source.idle(seconds)

    async def _fetched(self) -> None:
        """Wait for the fetch under way, and drop what it brings."""
        if self._fetching is not None:
            await asyncio.wait({self._fetching})
            fetched, self._fetching = self._fetching, None
            fetched.exception()

    async def _abandon(self) -> None:
        if self._inflight is not None:
            await asyncio.wait({self._inflight})
            self._inflight.exception()
        self._inflight = self._inflight_work = None
        self.ports.streams.discard_all()

    # ── seal ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self, batch: Batch) -> Work:
        """Parse, classify, get keys, seal: everything that needs no lock. Raises Unavailable; nothing is written."""
        started = perf_counter()
        if self._policies is None:
            self._policies = await self.ports.load_policies()
        work = Work(batch, self._voids, policy_version=self._policies.version)
        await self._intake.parse(work, self.partitions.owned)
        await self._placement.place(work, self._policies)
        if work.replays:
            await self._replay.load(work)
        await self._seal(work)
        telemetry.batch_seconds.labels("seal").observe(perf_counter() - started)
        return work

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
            tenant, lease, stream, subject = tenants[item.tenant], item.lease, item.place, item.subject
            if stream is None or stream.refusal is not None or tenant.barriers or (subject is not None and subject.refusal is not None):
                refusal = tenant.refusal_of(lease.source_id, lease.partition, item.offset, stream, subject)
                if stream is None or refusal is not None:
                    work.refusals.append(Refusal(lease.source_id, lease.partition, item.offset, tenant.id, refusal or "policy_refuse"))
                    continue
            if stream.source is not lease:
                _note_source(stream, lease)
            if stream not in undo:
                undo[stream] = stream.head
            stream.head = position = stream.head + 1
            if note_heads:
                heads[tenant.id, stream.id] = position
            value, id_lp, sealed, clear = item.value, u32(len(item.message_id)) + item.message_id, None, None
            key, person = (stream.key, None) if subject is None else (subject.key, subject.id)
            attrs = attributes(item.key, item.timestamp_ms, item.headers, value is None, person)
            if key is not stream.noted and key is not None:
                streams.note_use(tenant, stream, key, subject, position, work.fresh)
            if key is not None:
                if item.document is None:
                    aad = event_aad(tenant.aad + stream.id_lp, position, id_lp, item.type_lp, 1, NO_FIELD, key.prefix)
                    sealed = sealer.seal(key.cipher, key.prefix, aad, frame(attrs, value))
                else:
                    clear, sealed = _seal_fields(
                        item.document, attrs, key, partial(event_aad, tenant.aad + stream.id_lp, position, id_lp, item.type_lp, 1)
                    )
                    if stream.fields is not None and stream.fields.indexed:
                        work.index += _index_rows(tenant, stream, position, item.document, stream.fields.indexed)
                work.sealed += 1
            elif stream.by_subject is not None:
                raise KeyUnavailable("a record of a person's has no key")  # never plaintext instead
            add(
                tenant.id_lp, stream.id_lp, position, id_lp, item.type_lp, item.occurred_us, value if sealed is None else clear, attrs, sealed,
                lease.source_id, lease.partition, item.offset, value is None,
            )  # fmt: skip
            if item.projected and views and (wanting := views.matching(lease.topic, stream.stream_class, tenant.id)):
                work.outgoing += project(
                    wanting, topic=lease.topic, partition=lease.partition, offset=item.offset, tenant=tenant.id, stream=stream.id,
                    stream_class=stream.stream_class, position=position, message_id=item.message_id, type_=item.type_lp[4:],
                    value=value, key=item.key, timestamp_ms=item.timestamp_ms, headers=item.headers, subject=person, origin=(lease, item.offset, tenant.id),
                )  # fmt: skip

    # ── store and project ───────────────────────────────────────────────────────────────────────────────────────────

    async def _commit(self, work: Work) -> None:
        """One Postgres transaction under the guard, then one Kafka transaction, then the guard is given back.

        Raises Redo when what was sealed does not fit any more (nothing was written); Unavailable, Fenced or ProducerFenced when
        only `_recover` can tell what holds.
        """
        session, stripes, now = self.ports.session, work.stripes, self.ports.clock.now()
        started = perf_counter()
        try:
            await session.write(work.store_batch(), lambda states, version: self._verify(work, states, version), now)
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
        outgoing = self._replay.records(work) + work.outgoing
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
        for view, count in self.ports.views.counted(outgoing):
            telemetry.events_projected.labels(view).inc(count)

    async def _without(self, outgoing: list[Outgoing], origins: list[Any]) -> list[Outgoing]:
        """Records that the view's topic does not take: stored, but dead letters instead of view records."""
        refused = {(lease.topic, lease.partition, offset) for lease, offset, _ in origins}
        await self.ports.session.note_view_too_large(origins)
        kept = [o for o in outgoing if o.origin is None or (o.origin[0].topic, o.origin[0].partition, o.origin[1]) not in refused]
        return kept + [self._dead_letters.record(at, "view_too_large") for at in sorted(refused)]

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


def _seal_fields(document: Document, attrs: bytes, key: SealingKey, bind: Bind) -> tuple[bytes, bytes]:
    """-> the document as it is stored, and the envelope beside it."""
    return seal_document(document, attrs, key.prefix, bind, partial(Sealer(len(document.places) + 1).seal, key.cipher))


def _index_rows(tenant: Tenant, stream: Stream, position: int, document: Document, indexed: Sequence[str]) -> list[Row]:
    if tenant.index_key is None:
        raise KeyUnavailable("a tenant has no key of its index")  # it was forgotten in between
    return [(tenant.id, token, stream.id, position) for token in tokens(tenant.index_key, document, indexed)]


def _note_source(stream: Stream, lease: Lease) -> None:
    """A stream belongs on one partition: on several its positions are still free of gaps, but in commit order."""
    before, stream.source = stream.source, lease
    if before is not None and (before.source_id, before.partition) != (lease.source_id, lease.partition):
        telemetry.streams_on_several_partitions.inc()
