"""Residue in the key tables: one VACUUM serves every shred before it, and never one that an old snapshot still sees."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from sidecar.core.command import stored
from sidecar.core.model import Scope
from sidecar.postgres import migrations, residue
from sidecar.postgres.connection import connected, open_pool, transaction
from sidecar.postgres.residue import KEY_TABLES, Entry
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
    """As if one had just destroyed a key: its transaction, and the job that follows."""
    async with transaction(pool) as connection:
        xid = await residue.own_xid(connection)
    _, value = kit.command(settings, "shred", Scope.of_tenant("acme"))
    return Entry(
        command_id=uuid4(), kind="database", place="", until=None, details={"xid": xid}, attempts=0, created_at=datetime.now(UTC),
        command=stored(value), facts={},
    )  # fmt: skip


@pytest.fixture
def vacuumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each VACUUM of the tables."""
    real, times = residue.vacuum, list[int]()

    async def counted(*arguments: Any) -> dict[str, str]:
        times.append(len(times))
        return await real(*arguments)

    monkeypatch.setattr(residue, "vacuum", counted)
    return times


async def test_a_vacuum_serves_every_shred_before_it(settings: Settings, pool: Any, vacuumed: list[int]) -> None:
    earlier, later = await shred(settings, pool), await shred(settings, pool)
    rows = DeadRows(pool)
    for entry in (later, earlier):
        look = await rows.act(entry)
        assert look.again is None
        assert set(look.details["tables"]) == set(KEY_TABLES)
    assert len(vacuumed) == 1
    assert (await rows.act(await shred(settings, pool))).again is None  # control: what comes behind it needs one of its own
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
    assert (await rows.act(before)).again is None
    assert len(vacuumed) == 1
    held = await rows.act(behind)
    assert held.again is not None
    assert "session" in held.details["held_by"][0]
    await snapshot.rollback()
    await reader.close()
    assert (await rows.act(behind)).again is None
    assert len(vacuumed) == 2
