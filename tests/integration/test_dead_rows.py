"""Residue in the key tables: one VACUUM serves every shred before it, and never one that an old snapshot still sees."""

# ruff: noqa: ASYNC110 (what is waited for happens in the database)

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
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


async def vacuum_by_the_owner(owner: Any) -> None:
    """Returns when the server's statistics tell of it, which sessions see late."""
    before = await owner.fetchval("SELECT clock_timestamp()")
    for table in KEY_TABLES:
        await owner.execute(f"VACUUM {table}")
    told = "SELECT count(*) FROM pg_stat_all_tables WHERE relname = ANY ($1) AND last_vacuum > $2"
    async with asyncio.timeout(120):
        while await owner.fetchval(told, list(KEY_TABLES), before) < len(KEY_TABLES):
            await asyncio.sleep(0.02)


@pytest.fixture
async def limited(pool: Any, database: str) -> Any:
    """A control role that may not VACUUM the key tables."""
    role = f"control_{uuid4().hex[:8]}"
    await pool.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    parts = urlsplit(database)
    own = await open_pool(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}").geturl(), max_size=2)
    yield own
    await own.close()
    await pool.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_vacuum_of_somebody_elses_counts_only_if_no_old_snapshot_stood_in_its_way(
    settings: Settings, pool: Any, limited: Any, database: str
) -> None:
    """Nor does one from before the shred, where the control plane's clock is behind the database's."""
    reader = await asyncpg.connect(database)
    snapshot = reader.transaction(isolation="repeatable_read")
    await snapshot.start()
    await reader.fetchval("SELECT count(*) FROM tenants")
    async with transaction(pool) as connection:
        xid = await residue.own_xid(connection)
    _, value = kit.command(settings, "shred", Scope.of_tenant("acme"))
    entry = Entry(
        command_id=uuid4(), kind="database", place="", until=None, details={"xid": xid}, attempts=0,
        created_at=datetime.now(UTC) - timedelta(minutes=10), command=stored(value), facts={},
    )  # fmt: skip
    await vacuum_by_the_owner(pool)
    await snapshot.rollback()
    await reader.close()
    async with asyncio.timeout(120):
        while (look := await DeadRows(limited).act(entry)).details.get("held_by"):
            await asyncio.sleep(0.02)
    assert look.again is not None
    assert all("may not" in said for said in look.details["tables"].values())
    await vacuum_by_the_owner(pool)
    last = await rid(DeadRows(limited), replace(entry, details=look.details))
    assert set(last.details["tables"].values()) == {"autovacuumed"}
