"""Sources by topic id, and the lease of each partition: who may store its records, and from which offset on."""

from dataclasses import dataclass
from typing import Any

from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


@dataclass(slots=True)
class Lease:
    """A partition in hand. Offsets are the next ones: `stored` in Postgres, `projected` in Kafka, `staged` by batches under way.

    `low` is where the topic began when the lease was taken: what is below can be had from the store alone.
    """

    topic: str
    partition: int
    source_id: int
    epoch: int
    stored: int
    projected: int
    staged: int
    low: int = 0


async def register_source(connection: Connection, topic: str, topic_id: str) -> tuple[int, bool]:
    """-> (source id, whether the topic stood under another id before: it was deleted and made again)."""
    with mapped():
        await connection.execute("INSERT INTO source_topics (topic, topic_id) VALUES ($1, $2) ON CONFLICT DO NOTHING", topic, topic_id)
        rows = await connection.fetch("SELECT source_id, topic_id FROM source_topics WHERE topic = $1", topic)
    return next(row["source_id"] for row in rows if row["topic_id"] == topic_id), len(rows) > 1


async def stored_cursor(connection: Connection, source_id: int, partition: int) -> int | None:
    """The next offset to store; None if nobody ever held the lease. Waits for a transaction that is moving it."""
    with mapped():
        cursor: int | None = await connection.fetchval(
            "SELECT next_offset FROM partition_leases WHERE source_id = $1 AND partition = $2 FOR UPDATE", source_id, partition
        )
    return cursor


async def claim(connection: Connection, source_id: int, partition: int, owner: str, start: int) -> tuple[int, int]:
    """Take the lease: -> (epoch, next offset to store). From here on whoever held it before is fenced."""
    with mapped():
        row = await connection.fetchrow(
            """INSERT INTO partition_leases AS l (source_id, partition, epoch, owner, next_offset) VALUES ($1, $2, 1, $3, $4)
               ON CONFLICT (source_id, partition) DO UPDATE SET epoch = l.epoch + 1, owner = excluded.owner
               RETURNING epoch, next_offset""",
            source_id,
            partition,
            owner,
            start,
        )
    assert row is not None  # noqa: S101 - RETURNING of an upsert
    return row["epoch"], row["next_offset"]


async def still_ours(connection: Connection, leases: list[Lease]) -> set[tuple[int, int]]:
    """(source id, partition) of the leases whose epoch is still the remembered one."""
    with mapped():
        rows: list[Any] = await connection.fetch(
            """SELECT l.source_id, l.partition FROM unnest($1::int[], $2::int[], $3::bigint[]) x(s, p, e)
               JOIN partition_leases l ON l.source_id = x.s AND l.partition = x.p AND l.epoch = x.e""",
            [lease.source_id for lease in leases],
            [lease.partition for lease in leases],
            [lease.epoch for lease in leases],
        )
    return {(row["source_id"], row["partition"]) for row in rows}
