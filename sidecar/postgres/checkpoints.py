"""Where consumers of the store stand, and what they set aside."""

from collections.abc import Iterable
from typing import Any
from zlib import crc32

from sidecar.core.store import Cursor
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

CHANNEL = "sidecar_messages"
LISTENING_SECONDS = 30


async def take(connection: Connection, consumer: str) -> bool:
    """Become the one that works under this name, for as long as the session lives."""
    with mapped():
        return bool(await connection.fetchval("SELECT pg_try_advisory_lock(6, $1)", crc32(consumer.encode()) - 2**31))


async def listen(connection: Connection, consumer: str) -> tuple[Cursor, Cursor]:
    """Say that this consumer wants to be woken for a while; -> where it stands, the beginning if it is new, and the horizon: whoever reads
    after this call misses nothing that stands before it. A transaction that is open now keeps it where it began."""
    with mapped():
        row: Any = await connection.fetchrow(
            """INSERT INTO consumer_checkpoints AS c (consumer, listening_until) VALUES ($1, now() + make_interval(secs => $2))
               ON CONFLICT (consumer) DO UPDATE SET listening_until = excluded.listening_until
               RETURNING transaction_id, global_position, pg_snapshot_xmin(pg_current_snapshot()) AS horizon""",
            consumer,
            LISTENING_SECONDS,
        )
    return Cursor(int(row["transaction_id"]), row["global_position"]), Cursor(int(row["horizon"]), 0)


async def advance(connection: Connection, consumer: str, cursor: Cursor) -> None:
    """What is before the cursor is handled."""
    with mapped():
        await connection.execute(
            "UPDATE consumer_checkpoints SET transaction_id = $2::text::xid8, global_position = $3, updated_at = now() WHERE consumer = $1",
            consumer,
            str(cursor.transaction),
            cursor.position,
        )


async def epochs(connection: Connection, tenants: Iterable[str]) -> dict[str, int]:
    """Of each tenant. What was opened as of another one may have been shredded since."""
    with mapped():
        rows = await connection.fetch("SELECT tenant_id, epoch FROM tenants WHERE tenant_id = ANY ($1)", list(tenants))
    return {row["tenant_id"]: row["epoch"] for row in rows}


async def set_aside(connection: Connection, consumer: str, tenant: str, stream: str, position: int, error: str) -> None:
    """An event that the handler gave up on: it holds up nothing."""
    with mapped():
        await connection.execute(
            """INSERT INTO consumer_set_aside (consumer, tenant_id, stream_id, stream_position, error) VALUES ($1, $2, $3, $4, $5)
               ON CONFLICT (consumer, tenant_id, stream_id, stream_position) DO UPDATE SET error = excluded.error, at = now()""",
            consumer,
            tenant,
            stream,
            position,
            error,
        )


async def set_asides(connection: Connection, consumer: str) -> list[dict[str, Any]]:
    """What a person must look at, oldest first."""
    with mapped():
        rows = await connection.fetch("SELECT * FROM consumer_set_aside WHERE consumer = $1 ORDER BY at", consumer)
    return [dict(row) for row in rows]
