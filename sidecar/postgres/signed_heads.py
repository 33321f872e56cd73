"""Signed heads of the audit chains, as the database has them. The topic has them too, where nobody can take one back."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from sidecar.core.checkpoint import Head
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

# One step through the index per writer, however many rows there are.
_HEADS = """
WITH RECURSIVE writers AS (
  (SELECT writer FROM audit_log ORDER BY writer LIMIT 1)
  UNION ALL SELECT (SELECT a.writer FROM audit_log a WHERE a.writer > w.writer ORDER BY a.writer LIMIT 1) FROM writers w WHERE w.writer IS NOT NULL
)
SELECT h.writer, h.seq, h.hash, h.at FROM writers w
CROSS JOIN LATERAL (SELECT writer, seq, hash, at FROM audit_log a WHERE a.writer = w.writer ORDER BY seq DESC LIMIT 1) h ORDER BY h.writer"""


async def heads(connection: Connection) -> list[Head]:
    """The newest row of each chain, of one snapshot."""
    with mapped():
        return [Head(writer=r["writer"], seq=r["seq"], hash=r["hash"], at=r["at"]) for r in await connection.fetch(_HEADS)]


async def newest_heads(connection: Connection) -> dict[str, Any] | None:
    """What the newest checkpoint signed: writer → seq; None if there is none."""
    with mapped():
        found: dict[str, Any] | None = await connection.fetchval("SELECT heads FROM audit_checkpoints ORDER BY checkpoint_id DESC LIMIT 1")
    return found


async def add(connection: Connection, at: datetime, signed: list[Head], envelope: bytes) -> None:
    with mapped():
        await connection.execute(
            "INSERT INTO audit_checkpoints (at, heads, envelope) VALUES ($1, $2, $3)", at, {head.writer: head.seq for head in signed}, envelope
        )


async def unpublished(connection: Connection, limit: int = 500) -> list[tuple[int, bytes]]:
    """-> (checkpoint_id, envelope), oldest first."""
    with mapped():
        rows = await connection.fetch(
            "SELECT checkpoint_id, envelope FROM audit_checkpoints WHERE published_at IS NULL ORDER BY checkpoint_id LIMIT $1", limit
        )
    return [(row["checkpoint_id"], row["envelope"]) for row in rows]


async def mark_published(connection: Connection, ids: list[int]) -> None:
    """They are on the topic."""
    with mapped():
        await connection.execute("UPDATE audit_checkpoints SET published_at = clock_timestamp() WHERE checkpoint_id = ANY ($1)", ids)


async def envelopes(connection: Connection) -> AsyncIterator[tuple[int, bytes, bool]]:
    """-> (checkpoint_id, envelope, whether it went out to the topic), oldest first, in chunks."""
    with mapped():
        async with connection.transaction(readonly=True):
            query = "SELECT checkpoint_id, envelope, published_at FROM audit_checkpoints ORDER BY checkpoint_id"
            async for row in connection.cursor(query, prefetch=1000):
                yield row["checkpoint_id"], row["envelope"], row["published_at"] is not None
