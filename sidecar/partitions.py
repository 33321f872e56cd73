"""Which partitions are ours and where they are read on: the group assigns, the lease fences, two cursors say where each stands."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from fnmatch import fnmatchcase

from sidecar import telemetry
from sidecar.core.errors import ConfigurationError
from sidecar.core.extract import Extractor
from sidecar.kafka.admin import Admin
from sidecar.kafka.consumer import KafkaSource, Partition
from sidecar.postgres import leases
from sidecar.postgres.batches import GuardSession
from sidecar.postgres.connection import Connection
from sidecar.postgres.leases import Lease, still_ours
from sidecar.settings import Settings, SourceSettings

Claim = Callable[[Partition], Awaitable[tuple[Lease, int] | None]]


class Partitions:
    """Assigned ones wait to be claimed; claimed ones are `owned`, until they are revoked."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self.owned: dict[Partition, Lease] = {}
        self.waiting: set[Partition] = set()

    def let_go(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.owned.pop(partition, None)
            self.waiting.discard(partition)

    def reclaim(self, partitions: Iterable[Partition]) -> bool:
        """Ask again where these stand. False: none of them was in hand."""
        again = {partition for partition in partitions if self.owned.pop(partition, None)}
        self.waiting |= again
        return bool(again)

    async def reclaim_all(self, connection: Connection, source: KafkaSource | None) -> None:
        """All that the group assigns to this instance is claimed again; what another took by right is not assigned any more.

        A lease alone does not tell: one who was late, and is out of the group, may have taken it from its rightful owner.
        """
        ours = await still_ours(connection, list(self.owned.values()))
        for lease in self.owned.values():
            if (lease.source_id, lease.partition) not in ours:
                telemetry.fenced.labels("lease").inc()
        self.owned.clear()
        if source is not None:
            self.waiting |= set(await source.assignment())

    async def claim(self) -> dict[Partition, int]:
        """Take the leases of those that wait; -> where to read on, of all in hand: at the lower of their two cursors. Empty: no change.

        What was fetched ahead is void with that, also of partitions that were in hand before: they are read again from where they stand.
        """
        starts: dict[Partition, int] = {}
        for partition in list(self.waiting):
            claimed = await self._claim(partition)
            if partition not in self.waiting:
                continue  # revoked meanwhile
            self.waiting.discard(partition)
            if claimed is not None:
                self.owned[partition], starts[partition] = claimed
        return starts and {at: max(min(lease.staged, lease.projected), lease.low) for at, lease in self.owned.items()} | starts


class Sources:
    """Which source a topic belongs to, and where its partitions begin."""

    def __init__(self, settings: Settings) -> None:
        self._sources = settings.sources
        self._known: dict[str, tuple[SourceSettings, Extractor]] = {}
        self.topic_ids: dict[str, str] = {}

    def of(self, topic: str) -> tuple[SourceSettings, Extractor]:
        if topic not in self._known:
            source = next((s for s in self._sources if fnmatchcase(topic, s.topic)), None)
            if source is None:
                raise ConfigurationError(f"no source names the topic {topic}", where="sources")
            self._known[topic] = (
                source,
                Extractor(tenant=source.tenant, stream=source.stream, type=source.type, id=source.id, tenants=source.tenants),
            )
        return self._known[topic]

    def extractor(self, topic: str) -> Extractor:
        return self.of(topic)[1]


class Claimer:
    """Takes the lease of an assigned partition: which source it is, and from where on it is read."""

    def __init__(self, sources: Sources, session: GuardSession, admin: Admin, instance_id: str) -> None:
        self._sources, self._session, self._admin, self._instance_id = sources, session, admin, instance_id
        self.source: KafkaSource | None = None

    async def claim(self, partition: Partition) -> tuple[Lease, int] | None:
        """-> the lease, the offset to read from; None if the partition must wait for a person (said in the log).

        No lease, no committed offset: the source's `start` says. A lease without a committed offset: what was projected is not
        known, and `on_lost_offsets` decides. The start is committed before the lease is made, so that the two are never confused.
        """
        topic, number = partition
        settings, _ = self._sources.of(topic)
        found = (await asyncio.to_thread(self._admin.describe, [topic])).get(topic)
        if found is None or self.source is None:
            return None
        self._sources.topic_ids[topic] = found.topic_id
        connection = self._session.connection
        source_id, made_again = await leases.register_source(connection, topic, found.topic_id)
        stored = await leases.stored_cursor(connection, source_id, number)
        committed = (await self.source.committed([partition]))[partition]
        low, high = await self.source.watermarks(partition)
        if stored is None:
            # a committed offset of a topic that was made again belongs to the one before
            start = low if made_again else committed if committed is not None else low if settings.start == "earliest" else high
            await self.source.commit_start(partition, start)
            committed = start
        else:
            start = stored
            if committed is None:
                if settings.on_lost_offsets == "stop":
                    telemetry.log.error(
                        "the group's committed offset is gone: what was projected is not known; set sources[].on_lost_offsets to store or replay",
                        extra={"action": "claim", "topic": topic, "partition": number},
                    )
                    return None
                committed = stored if settings.on_lost_offsets == "store" else low
        epoch, stored = await leases.claim(connection, source_id, number, self._instance_id, start)
        if stored < low:
            telemetry.log.error(
                "records were deleted from the source before they were stored: they are lost",
                extra={"action": "claim", "topic": topic, "partition": number, "from": stored, "to": low},
            )
        return Lease(topic, number, source_id, epoch, stored, committed, stored, low), max(min(stored, committed), low)
