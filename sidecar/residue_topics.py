"""Residue in Kafka: decrypted records in views, plaintext in source topics, and the consumers that have read a view.

A topic is clean when its log starts at or beyond the shred's end offsets, when a scan finds no payload of the scope below them,
or when the topic is gone. Compaction cannot be forced: a topic's last segment is not compacted, and a segment ends only as something
is written after `segment.ms`. So the job writes tombstones, and later its notice again, until nothing is left.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sidecar.core.command import receipt_id
from sidecar.core.errors import Conflict
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import view_partition
from sidecar.kafka import scan
from sidecar.kafka.admin import Admin, TopicInfo
from sidecar.kafka.receipts import ViewRecord
from sidecar.notices import Notices, erasing_keys, notice, tombstones
from sidecar.postgres import commands, guard, readmissions, residue
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.residue import Entry, Look
from sidecar.postgres.views import View, views_on_record
from sidecar.settings import Settings
from sidecar.steps import Steps, failpoint

CHUNK: Final = 5000
CHUNKS_AT_A_TIME: Final = 20
LOOK_SECONDS: Final = (1.0, 3600.0)
GONE: Final = "the topic was deleted"


class ViewRecords:
    """Kind `view`: tombstones by the view's keys, or where a view is this tenant's alone and all of it is shredded, its records deleted."""

    def __init__(self, settings: Settings, steps: Steps, notices: Notices) -> None:
        self._settings, self._notices, self._foreground = settings, notices, steps.foreground
        self._pool, self._admin, self._clock = steps.pool, steps.admin, steps.clock
        self._seen: dict[str, dict[UUID, scan.Payloads]] = {}
        """Topic → what its last scan found for shreds that have not heard of it yet. Below a barrier there is never more than that again."""

    async def act(self, entry: Entry) -> Look:
        found = (await asyncio.to_thread(self._admin.describe, [entry.place])).get(entry.place)
        if found is None or found.topic_id != entry.details["topic_id"]:
            return Look(again=None, details=entry.details | {"removed": GONE})
        view = await self._view(entry)
        scope = entry.command.scope
        if entry.details["method"] == "delete_records":
            below = {(entry.place, int(partition)): offset for partition, offset in entry.details["barrier"].items()}
            await asyncio.to_thread(self._admin.delete_records, below)
        elif entry.details["method"] == "tombstones" and "tombstones" not in entry.details:
            entry = await self._write_tombstones(entry, view)
            failpoint("residue:tombstones")
            return Look(again=0.0, until=entry.until, details=entry.details)
        left = await self._left(entry, found, scope)
        details = entry.details | {"remaining": sum(left.values())}
        if not details["remaining"]:
            return Look(again=None, details=details | {"removed": "no record of the scope stands below the barrier"})
        config = await asyncio.to_thread(self._admin.topic_config, entry.place)
        lag = min(_ms(config, "segment.ms"), _ms(config, "max.compaction.lag.ms")) / 1000
        now = self._clock.now()
        if entry.details["method"] == "tombstones" and now.timestamp() - details["progress"].get("rolled_at", 0) > lag:
            # Something written behind the last segment's time ends it; only then is it compacted.
            records = [notice(entry.command_id, scope, entry.facts["inaccessible_at"], view, int(p)) for p, n in left.items() if n]
            await self._notices.write(records)
            details |= {"progress": details["progress"] | {"rolled_at": now.timestamp()}}
        return Look(again=min(max(lag / 4, LOOK_SECONDS[0]), LOOK_SECONDS[1]), until=entry.until, details=details)

    async def _view(self, entry: Entry) -> View:
        async with transaction(self._pool) as connection:
            return next(view for view in await views_on_record(connection) if view.topic == entry.place)

    async def _write_tombstones(self, entry: Entry, view: View) -> Entry:
        """Some of them; behind the last one `details.tombstones` says how many they are."""
        progress = dict(entry.details.get("progress") or {"after": ["", 0], "written": 0})
        modes = erasing_keys(view, entry.command.scope)
        for _ in range(CHUNKS_AT_A_TIME):
            async with self._undisturbed(entry) if "stream" in modes else transaction(self._pool) as connection:
                records, last = await self._next_tombstones(connection, entry, view, modes, progress["after"])
                await self._notices.write(records)
            progress = {"after": last or progress["after"], "written": progress["written"] + len(records)}
            if last is None:
                now = self._clock.now().timestamp()
                return replace(entry, details=entry.details | {"tombstones": progress["written"], "progress": {"rolled_at": now}})
        return replace(entry, details=entry.details | {"progress": progress})

    @asynccontextmanager
    async def _undisturbed(self, entry: Entry) -> AsyncIterator[Connection]:
        """A transaction in which no event of the scope gets into a view, where a tombstone of its stream would erase it: the scope is shredded
        and stays so to the end; or, readmitted by now, its guard is ours. Raises Conflict where a batch does not let go of that in time."""
        scope = entry.command.scope
        async with transaction(self._pool) as connection:
            if await readmissions.stays_shredded(connection, scope, entry.command_id):
                yield connection
                return
        async with transaction(self._pool) as connection:
            if not await guard.take(connection, scope.tenant):
                raise Conflict("a batch did not let go of the guard in time")
            yield connection

    async def _next_tombstones(
        self, connection: Connection, entry: Entry, view: View, modes: list[str], after: list[Any]
    ) -> tuple[list[ViewRecord], list[Any] | None]:
        """-> tombstones, and behind which (stream, position) the next are; None: these were the last. What came since a readmission has none."""
        scope, at = entry.command.scope, await commands.written_at(connection, receipt_id(entry.command_id, "inaccessible"))
        if modes == ["stream"]:
            events = [(stream, 0) for stream in await residue.sealed_streams(connection, scope, after[0], CHUNK)]
        else:
            events = await residue.sealed_events(connection, scope, (after[0], after[1]), CHUNK, at)
        live = await residue.gone_on(connection, scope.tenant, {stream for stream, _ in events}, at) if "stream" in modes else set()
        of = {stream: [mode for mode in modes if mode != "stream" or stream not in live] for stream, _ in events}
        found = {t.key: t for stream, position in events for t in tombstones(scope.tenant, stream, position, view, of[stream])}
        return list(found.values()), list(events[-1]) if len(events) == CHUNK else None

    async def _left(self, entry: Entry, info: TopicInfo, scope: Scope) -> dict[int, int]:
        """Partition → payload records below the barrier of the events that were shredded; partitions without any are left out."""
        if entry.command_id not in self._seen.get(entry.place, {}):
            self._seen[entry.place] = await self._scan(entry, info)
        seen = self._seen[entry.place].pop(entry.command_id)
        async with transaction(self._pool) as connection:
            first = await residue.encrypted_from(connection, scope.tenant, list({stream for _, stream in seen}))
        left: dict[int, int] = {}
        for (partition, stream), (count, newest) in seen.items():
            # a tenant's plain events are not its encrypted ones, and stay, unless they were to go too
            if entry.command.include_plain or (stream in first and newest >= first[stream]):
                left[partition] = left.get(partition, 0) + count
        return left

    async def _scan(self, entry: Entry, info: TopicInfo) -> dict[UUID, scan.Payloads]:
        """One scan for all shreds that look for something in the topic: it takes a core, and costs the same for one as for a hundred."""
        async with transaction(self._pool) as connection:
            entries = {e.command_id: e for e in (*await residue.searching(connection, entry.place, info.topic_id), entry)}
        searches: dict[str, list[_Search]] = {}
        ends: dict[int, int] = {}
        for search in [await self._search(e, info) for e in entries.values()]:
            searches.setdefault(search.scope.tenant, []).append(search)
            for partition, offset in search.barrier.items():
                ends[partition] = max(ends.get(partition, 0), offset)
        starts = (await asyncio.to_thread(self._admin.offsets, {entry.place: info.partitions}, end=False))[entry.place]
        span = {p: (starts.get(p, 0), end) for p, end in ends.items() if starts.get(p, 0) < end}

        def whose(partition: int, offset: int, tenant: str, *of: Any) -> list[UUID]:
            return [search.command_id for search in searches.get(tenant, ()) if search.wants(partition, offset, *of)]

        seen = await asyncio.to_thread(scan.payloads, self._settings, entry.place, span, whose, self._foreground.stand_back)
        async with transaction(self._pool) as connection:
            await residue.hasten(connection, entry.place, entries, self._clock.now())
        return {command_id: seen.get(command_id, {}) for command_id in entries}

    async def _search(self, entry: Entry, info: TopicInfo) -> "_Search":
        scope = entry.command.scope
        barrier = {int(partition): offset for partition, offset in entry.details["barrier"].items()}
        if scope.kind is ScopeKind.STREAM:
            barrier = {p: offset for p, offset in barrier.items() if p == view_partition(f"{scope.tenant}/{scope.id}", info.partitions)}
        events = await self._persons_events(scope) if scope.kind is ScopeKind.SUBJECT else None
        return _Search(command_id=entry.command_id, scope=scope, barrier=barrier, events=events)

    async def _persons_events(self, scope: Scope) -> set[tuple[str, int]]:
        """A person's events lie in streams of others: told by place."""
        out: set[tuple[str, int]] = set()
        after = ("", 0)
        while True:
            async with transaction(self._pool) as connection:
                events = await residue.sealed_events(connection, scope, after, CHUNK, None)
            out.update(events)
            if len(events) < CHUNK:
                return out
            after = events[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What a shred looks for in a view's topic: records of its scope, of a person's the ones named, below its own barrier."""

    command_id: UUID
    scope: Scope
    barrier: dict[int, int]
    events: set[tuple[str, int]] | None

    def wants(self, partition: int, offset: int, stream: str, stream_class: str, position: int) -> bool:
        """Of a record of the scope's tenant."""
        if offset >= self.barrier.get(partition, 0):
            return False
        if self.events is not None:
            return (stream, position) in self.events
        return self.scope.kind is ScopeKind.TENANT or self.scope.id == (stream if self.scope.kind is ScopeKind.STREAM else stream_class)


def plan_view(view: View, info: TopicInfo, config: dict[str, str], barrier: dict[str, int], scope: Scope, now: datetime) -> residue.Planned:
    """How a view is rid of the scope, and by when."""
    retained = retained_until(config, now)
    until: datetime | None = now
    modes = erasing_keys(view, scope)
    # its segment has to end, the tombstones' one too; then compaction is due
    compacted = now + timedelta(milliseconds=2 * min(_ms(config, "segment.ms"), _ms(config, "max.compaction.lag.ms")))
    if scope.kind is ScopeKind.TENANT and all(match.tenants == [scope.tenant] for match in view.matches):
        method = "delete_records"
    elif len(modes) < len(view.keys):  # what stands under another key only ends
        method, until = "tombstones" if modes else "retention", retained
    else:
        method, until = "tombstones", min(compacted, retained or compacted)
    return residue.Planned(
        kind="view",
        place=view.topic,
        until=until,
        details={"method": method, "topic_id": info.topic_id, "barrier": barrier, "key": ", ".join(view.keys)},
    )


class SourceRecords:
    """Kind `source`: ends by `purge`, by the topic's retention, or by the hand of whoever owns it."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    async def act(self, entry: Entry) -> Look:
        found = (await asyncio.to_thread(self._admin.describe, [entry.place])).get(entry.place)
        if found is None or found.topic_id != entry.details["topic_id"]:
            return Look(again=None, details=entry.details | {"removed": GONE})
        starts = (await asyncio.to_thread(self._admin.offsets, {entry.place: found.partitions}, end=False))[entry.place]
        ends: dict[str, int] = entry.details["ends"]
        left = sum(max(0, end - starts.get(int(partition), 0)) for partition, end in ends.items())
        details = entry.details | {"offsets_left": left}
        if not left:
            return Look(again=None, details=details)
        config = await asyncio.to_thread(self._admin.topic_config, entry.place)
        return Look(again=_patience(entry.attempts), until=retained_until(config, entry.created_at), details=details)


def plan_source(settings: Settings, topic: str, info: TopicInfo, config: dict[str, str], ends: dict[int, int], now: datetime) -> residue.Planned:
    """The source topic's records from before the shred, up to `ends`."""
    purged = any(source.purge == "after_projection" for source in settings.sources if source.topic == topic)
    details: dict[str, Any] = {"topic_id": info.topic_id, "ends": {str(p): end for p, end in sorted(ends.items())}}
    until = retained_until(config, now)
    if purged:
        details["ends_by"] = "purge: after_projection"
    else:
        details["ends_by"] = "retention" if until else "nothing: its retention has no end; delete its records yourself"
    return residue.Planned(kind="source", place=topic, until=until, details=details)


class Readers:
    """Kind `consumers`: groups that committed offsets on the view. Whether they deleted what they had is for their owners to say."""

    def __init__(self, settings: Settings, admin: Admin) -> None:
        self._settings, self._admin = settings, admin

    async def act(self, entry: Entry) -> Look:
        groups = await asyncio.to_thread(self._admin.groups_of, entry.place)
        named = [{"group": group, "committed": at} for group, at in sorted(groups.items()) if group != self._settings.group_id]
        note = "tell their owners; who reads without committing is not listed"
        return Look(again=None, details={"groups": named, "told": False, "note": note})


def plan_readers(views: Iterable[View]) -> list[residue.Planned]:
    """Who read the views."""
    return [residue.Planned(kind="consumers", place=view.topic) for view in views]


def retained_until(config: dict[str, str], now: datetime) -> datetime | None:
    """The end of what was written by now, by the topic's own retention; None: none is configured.

    A record goes with its segment, whose age is that of its newest record: a segment may take records for another `segment.ms`.
    """
    limit = int(config.get("retention.ms", "-1"))
    if limit < 0 or "delete" not in config.get("cleanup.policy", "delete"):
        return None
    try:
        return now + timedelta(milliseconds=limit + _ms(config, "segment.ms"))
    except OverflowError:
        return None


def _ms(config: dict[str, str], name: str) -> int:
    """Bounded, so that it fits a date: what Kafka takes for endless is a hundred years."""
    return min(int(config.get(name) or 604_800_000), 3_155_760_000_000)


def _patience(attempts: int) -> float:
    return min(LOOK_SECONDS[0] * 1.5 ** min(attempts, 20), 300.0)
