"""The exclusive side of the guard, the executor's lock, and the instances that hold the shared side.

Batches hold `pg_advisory_lock_shared(1, stripe)` from before their store transaction until their views are committed in Kafka.
Who takes the same lock exclusively therefore knows that no batch of the stripe is under way. A holder that does not let go within
a second loses its backend; what it may still commit in Kafka is voided by fencing its transactional id, before the receipt.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from zlib import crc32

import asyncpg

from sidecar.core.view import guard_stripe
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import mapped

PATIENCE_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class Backend:
    """A Postgres session: the pid alone may be somebody else's by now."""

    pid: int
    started: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A data plane process, as it registered itself. `alive`: the session that it holds the guard with is there."""

    instance_id: str
    transactional_id: str
    backend: Backend | None
    state: str
    alive: bool


async def take(connection: Connection, tenant: str) -> bool:
    """Lock the tenant's stripe until the end of the transaction; False if a holder did not let go, then roll back and `evict`."""
    try:
        await connection.execute(f"SET LOCAL lock_timeout = {PATIENCE_MS}; SET LOCAL synchronous_commit = on")
        await connection.execute("SELECT pg_advisory_xact_lock(1, $1)", guard_stripe(tenant))
    except asyncpg.LockNotAvailableError:
        return False
    return True


async def evict(connection: Connection, tenant: str) -> list[Backend]:
    """End the sessions that hold the stripe shared. Another command's exclusive hold is waited for, not ended."""
    with mapped():
        rows = await connection.fetch(
            """SELECT a.pid, a.backend_start, pg_terminate_backend(a.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND l.classid = 1 AND l.objid = $1 AND l.objsubid = 2 AND l.granted AND l.mode = 'ShareLock'""",
            guard_stripe(tenant),
        )
    return [Backend(row["pid"], row["backend_start"]) for row in rows]


@asynccontextmanager
async def exclusively(pool: Pool, tenant: str, evicted: set[Backend]) -> AsyncIterator[Connection]:
    """A transaction that holds the tenant's guard exclusively; to `evicted` it adds the sessions that lost theirs for it."""
    while True:
        async with transaction(pool) as connection:
            if await take(connection, tenant):
                yield connection
                return
        async with transaction(pool) as connection:
            evicted.update(await evict(connection, tenant))


async def instances(connection: Connection) -> list[Instance]:
    """Every one that ever registered; `alive`: its guard session is there."""
    with mapped():
        rows = await connection.fetch(
            """SELECT i.*, EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = i.guard_pid AND a.backend_start = i.guard_started) AS alive
               FROM instances i ORDER BY i.instance_id"""
        )
    return [
        Instance(
            instance_id=row["instance_id"],
            transactional_id=row["transactional_id"],
            backend=None if row["guard_pid"] is None else Backend(row["guard_pid"], row["guard_started"]),
            state=row["state"],
            alive=row["alive"],
        )
        for row in rows
    ]


async def mark_fenced(connection: Connection, fenced: list[Instance]) -> None:
    """Only where the row is still the one that was fenced: the instance may have come back, by the proper way, with a new session."""
    with mapped():
        await connection.execute(
            """UPDATE instances i SET state = 'fenced' FROM unnest($1::text[], $2::int[], $3::timestamptz[]) f(id, pid, started)
               WHERE i.instance_id = f.id AND i.state = 'running' AND i.guard_pid IS NOT DISTINCT FROM f.pid
                 AND i.guard_started IS NOT DISTINCT FROM f.started""",
            [i.instance_id for i in fenced],
            [i.backend and i.backend.pid for i in fenced],
            [i.backend and i.backend.started for i in fenced],
        )


async def try_lead(connection: Connection, deployment: str) -> Backend | None:
    """Become the one executor of the deployment, for as long as this session lives; None while somebody else is."""
    with mapped():
        if not await connection.fetchval("SELECT pg_try_advisory_lock(5, $1)", crc32(deployment.encode()) - 2**31):
            return None
        row = await connection.fetchrow("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    return None if row is None else Backend(row["pid"], row["backend_start"])


async def end_session(connection: Connection, backend: Backend) -> None:
    """End a session of our own that we lost sight of: over a broken network Postgres may keep it, and its lock, for hours."""
    with mapped():
        statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2"
        await connection.execute(statement, backend.pid, backend.started)
