"""Residue in views: one scan of a topic serves every shred that waits on it, and each hears what is left of its own scope below its own barrier."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import view_partition
from sidecar.kafka import scan
from sidecar.kafka.admin import Admin
from sidecar.kafka.receipts import ViewRecord, ViewWriter
from sidecar.notices import Notices
from sidecar.postgres import migrations, residue
from sidecar.postgres.connection import connected, open_pool, transaction
from sidecar.postgres.residue import Planned
from sidecar.residue import Residue
from sidecar.residue_topics import _Search
from sidecar.settings import Settings
from sidecar.steps import Steps
from sidecar.testing import control_plane as kit

STREAMS = {("acme", "a"): "C", ("acme", "b"): "C", ("acme", "c"): "D", ("globex", "a"): "C"}
JANE = Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane")
SHREDS = (
    Scope(tenant="acme", kind=ScopeKind.STREAM, id="a"),
    Scope(tenant="acme", kind=ScopeKind.CLASS, id="C"),
    JANE,
    Scope.of_tenant("globex"),
)


class Clock:
    def __init__(self) -> None:
        self.at = datetime.now(UTC)

    def now(self) -> datetime:
        return self.at


class Watched:
    """A view of two partitions, what stands in it, and shreds whose records in it are watched."""

    def __init__(self, settings: Settings, pool: Any, topic: str) -> None:
        self.pool, self.topic, self.clock, self.admin = pool, topic, Clock(), Admin(settings)
        self._settings, self._writer = settings, ViewWriter(settings)
        steps = Steps(pool, self.admin, self.clock, cast(Any, None))
        self._residue = Residue(settings, steps, Notices(pool, self.admin, self._writer), cast(Any, None))
        self.written: list[tuple[str, str, int, int, int]] = []
        """tenant, stream, position, partition, offset of each record"""
        self.shreds: dict[Any, tuple[Scope, dict[int, int]]] = {}
        """Of each command: its scope and its barrier."""

    def ends(self) -> dict[int, int]:
        return self.admin.offsets({self.topic: 2})[self.topic]

    def write(self, position: int) -> None:
        """One more event of each stream."""
        for (tenant, stream), stream_class in STREAMS.items():
            path, carried = (
                f"{tenant}/{stream}",
                {"tenantid": tenant, "streamid": stream, "streamtype": stream_class, "streamposition": str(position)},
            )
            partition = view_partition(path, 2)
            self.written.append((tenant, stream, position, partition, self.ends()[partition]))
            headers = [(f"ce_{name}", value.encode()) for name, value in carried.items()]
            self._writer.write([ViewRecord(topic=self.topic, partition=partition, key=f"{path}/{position}".encode(), value=b"v", headers=headers)])

    async def shred(self, scope: Scope) -> None:
        """As if it had just been carried out, and was due."""
        command_id, value = kit.command(self._settings, "shred", scope)
        self.shreds[command_id] = scope, self.ends()
        details = {"method": "tombstones", "topic_id": self.admin.describe([self.topic])[self.topic].topic_id, "key": "event"}
        details |= {"barrier": {str(p): offset for p, offset in self.ends().items()}}
        async with transaction(self.pool) as connection:
            await connection.execute(
                """INSERT INTO commands (command_id, op, tenant_id, payload, payload_sha256, status, result, finished_at)
                   VALUES ($1, 'shred', $2, $3, '', 'inaccessible', '{"inaccessible_at": "2026-01-01T00:00:00Z"}', now())""",
                command_id,
                scope.tenant,
                value,
            )
            await residue.insert(connection, command_id, [Planned(kind="view", place=self.topic, details=details)], self.clock.now())

    async def look(self, later: timedelta = timedelta(0)) -> dict[Any, int | None]:
        """One look at what is due then; -> command → what is on record as remaining."""
        self.clock.at += later
        await self._residue.work()
        async with transaction(self.pool) as connection:
            rows = await connection.fetch("SELECT command_id, details FROM residue WHERE kind = 'view'")
        return {row["command_id"]: row["details"].get("remaining") for row in rows}

    def truly(self) -> dict[Any, int]:
        """Told record by record, with what the topic still has."""
        starts = self.admin.offsets({self.topic: 2}, end=False)[self.topic]
        return {
            command_id: sum(
                1
                for tenant, stream, position, partition, offset in self.written
                if starts[partition] <= offset < barrier[partition] and _is_of(scope, tenant, stream, position)
            )
            for command_id, (scope, barrier) in self.shreds.items()
        }


def _is_of(scope: Scope, tenant: str, stream: str, position: int) -> bool:
    if scope == JANE:  # the second event of c is hers
        return (tenant, stream, position) == ("acme", "c", 2)
    return tenant == scope.tenant and (scope.kind is ScopeKind.TENANT or scope.id in (stream, STREAMS[tenant, stream]))


@pytest.fixture
async def watched(settings: Settings, database: str) -> AsyncIterator[Watched]:
    topic = f"{settings.deployment}.view"
    async with connected(database) as connection:
        await migrations.migrate(connection)
        for tenant in ("acme", "globex"):
            await kit.seed(connection, tenant, {stream: of for (whose, stream), of in STREAMS.items() if whose == tenant})
        [(key_id, _)] = (await kit.seed(connection, "acme", {"of a person": "D"}, shared=JANE)).values()
        await connection.execute(
            """INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position) VALUES ('acme', 'c', $1, 1, 2)""",
            key_id,
        )
        await kit.add_events(connection, "acme", "c", 2)
        await connection.execute(
            """UPDATE messages SET data_encrypted = '\\x0000000000'::bytea || $1::bytea || '\\x00' WHERE stream_id = 'c' AND stream_position = 2""",
            key_id.bytes,
        )
        await connection.execute("INSERT INTO views (name, topic, partitions, key_mode, definition) VALUES ('v', $1, 2, 'event', '{}')", topic)
    pool = await open_pool(database, application_name="control", max_size=4)
    found = Watched(settings, pool, topic)
    found.admin.create(topic, 2, {"cleanup.policy": "delete", "segment.ms": "3600000"})
    for position, scopes in ((1, SHREDS[:1]), (2, SHREDS[1:]), (3, ())):
        found.write(position)
        for scope in scopes:
            await found.shred(scope)
    yield found
    await pool.close()


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The topic of each scan."""
    real, seen = scan.payloads, list[str]()

    def counted(settings: Any, topic: str, *arguments: Any) -> Any:
        seen.append(topic)
        return real(settings, topic, *arguments)

    monkeypatch.setattr(scan, "payloads", counted)
    return seen


async def test_one_scan_serves_every_shred_that_waits_on_a_topic(watched: Watched, scans: list[str]) -> None:
    await watched.look()
    assert scans == [], "first all of them write their tombstones"
    assert await watched.look() == watched.truly()
    assert list(watched.truly().values()) == [1, 4, 1, 2]
    assert len(scans) == 1


async def test_a_shred_that_would_look_later_hears_at_once_what_another_ones_scan_found(watched: Watched, scans: list[str]) -> None:
    await watched.look()
    await watched.look()
    [late, *_] = watched.shreds
    async with transaction(watched.pool) as connection:
        await connection.execute("UPDATE residue SET next_at = $2 WHERE command_id = $1", late, watched.clock.now() + timedelta(days=9))
    watched.admin.delete_records({(watched.topic, p): offset for p, offset in watched.shreds[late][1].items()})
    await watched.look(timedelta(days=1))
    assert await watched.look() == watched.truly()
    assert len(scans) == 2
    async with transaction(watched.pool) as connection:
        ended = await connection.fetch("SELECT command_id FROM residue WHERE kind = 'view' AND state = 'done'")
    assert [row["command_id"] for row in ended] == [late]


async def test_control_shreds_that_do_not_know_of_each_other_scan_once_each(
    watched: Watched, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def alone(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(residue, "searching", alone)
    await watched.look()
    assert await watched.look() == watched.truly()
    assert len(scans) == len(SHREDS)


async def test_control_a_search_without_a_barrier_of_its_own_counts_what_came_later(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _Search.wants
    monkeypatch.setattr(_Search, "wants", lambda search, partition, _offset, *of: real(search, partition, -1, *of))
    await watched.look()
    assert await watched.look() != watched.truly()
