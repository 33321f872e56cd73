"""Residue in the key tables: one VACUUM serves every shred before it, and never one that an old snapshot still sees."""

# ruff: noqa: ASYNC110 (what is waited for happens in the database)

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from sidecar.core.command import stored
from sidecar.core.errors import Conflict
from sidecar.core.model import Scope
from sidecar.postgres import migrations, residue
from sidecar.postgres.connection import connected, open_pool, transaction
from sidecar.postgres.residue import KEY_TABLES, Entry, Look
from sidecar.residue_store import DeadRows
from sidecar.settings import Settings
from sidecar.testing import control_plane as kit


@pytest.fixture
async def pool(database: str) -> Any:
    async with connected(database) as connection:
        await migrations.check_or_migrate(connection, may_migrate=True)
    pool = await open_pool(database, application_name="control", max_size=4)
    yield pool
    await pool.close()


async def shred(settings: Settings, pool: Any) -> Entry:
    """As if one had just destroyed a key: its transaction, and the job that follows. No snapshot that is taken from now on sees behind it:
    one looks as far back as the oldest transaction that runs in any database, also in those of other tests."""
    async with transaction(pool) as connection:
        xid = await residue.own_xid(connection)
    async with asyncio.timeout(120):
        while int(await pool.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text")) <= xid:
            await asyncio.sleep(0.02)
    _, value = kit.command(settings, "shred", Scope.of_tenant("acme"))
    return Entry(
        command_id=uuid4(), kind="database", place="", until=None, details={"xid": xid}, attempts=0, created_at=datetime.now(UTC),
        command=stored(value), facts={},
    )  # fmt: skip


async def rid(rows: DeadRows, entry: Entry) -> Look:
    """Looks until nothing is left, as the job does: an autovacuum may hold a snapshot, or a lock, for a moment."""
    async with asyncio.timeout(120):
        while True:
            try:
                look = await rows.act(entry)
            except Conflict:
                continue
            if look.again is None:
                return look
            await asyncio.sleep(0.02)


@pytest.fixture
def vacuumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each VACUUM of the tables that came to its end."""
    real, times = residue.vacuum, list[int]()

    async def counted(*arguments: Any) -> dict[str, str]:
        said = await real(*arguments)
        times.append(len(times))
        return said

    monkeypatch.setattr(residue, "vacuum", counted)
    return times


async def test_a_vacuum_serves_every_shred_before_it(settings: Settings, pool: Any, vacuumed: list[int]) -> None:
    earlier, later = await shred(settings, pool), await shred(settings, pool)
    rows = DeadRows(pool)
    for entry in (later, earlier):
        look = await rid(rows, entry)
        assert set(look.details["tables"]) == set(KEY_TABLES)
    assert len(vacuumed) == 1
    await rid(rows, await shred(settings, pool))  # control: what comes behind it needs one of its own
    assert len(vacuumed) == 2


async def test_a_vacuum_under_an_old_snapshot_serves_no_shred_that_the_snapshot_sees(
    settings: Settings, pool: Any, database: str, vacuumed: list[int]
) -> None:
    before = await shred(settings, pool)
    reader = await asyncpg.connect(database)
    snapshot = reader.transaction(isolation="repeatable_read")
    await snapshot.start()
    await reader.fetchval("SELECT count(*) FROM tenants")
    behind = await shred(settings, pool)
    rows = DeadRows(pool)
    await rid(rows, before)
    assert len(vacuumed) == 1
    held = await rows.act(behind)
    assert held.again is not None
    assert f"session {reader.get_server_pid()}" in held.details["held_by"]
    await snapshot.rollback()
    await reader.close()
    await rid(rows, behind)
    assert len(vacuumed) == 2
