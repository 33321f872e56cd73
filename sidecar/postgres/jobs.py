"""Chunks of long jobs, and what re-encryption reads and writes, as SQL. In the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sidecar.core.history import Range
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

STREAMS_PER_CHUNK: Final = 20
_OF_SCOPE: Final = {
    ScopeKind.TENANT: "$2::text IS NOT NULL",
    ScopeKind.CLASS: "s.stream_type_class = $2",
    ScopeKind.STREAM: "s.stream_id = $2",
    ScopeKind.SUBJECT: "false",
}
# `planted`: plaintext where the stream is encrypted. Sealed, it would read as an event.
_READ: Final = """
SELECT m.stream_position, m.message_id, m.message_type, m.schema_version, m.occurred_at, m.data, m.data_encrypted, m.metadata, m.is_tombstone,
  m.data_encrypted IS NULL AND s.is_encrypted AND m.stream_position >= coalesce(s.encrypted_from_position, 1) AS planted
FROM messages m JOIN streams s USING (tenant_id, stream_id) WHERE"""
# An envelope's suite is at byte 3, its key id at byte 5, its key version at byte 21.
_KEY_ID: Final = "encode(substring(m.data_encrypted FROM 6 FOR 16), 'hex')::uuid"
_KEY_VERSION: Final = """(get_byte(m.data_encrypted, 21)::bigint << 24 | get_byte(m.data_encrypted, 22) << 16
  | get_byte(m.data_encrypted, 23) << 8 | get_byte(m.data_encrypted, 24))::int"""
_ASKED_FOR: Final = f"""($7::int IS NULL AND $8::int IS NULL OR CASE WHEN octet_length(m.data_encrypted) >= 25
  THEN ($7 IS NULL OR get_byte(m.data_encrypted, 3) = $7) AND ($8 IS NULL OR {_KEY_VERSION} = $8) ELSE false END)"""
# As in row order of the primary key from behind: what is sealed anew meanwhile stands no more in the way.
_ROWS: Final = f"""
{_READ} m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position < $3
  AND CASE WHEN m.data_encrypted IS NULL THEN $5 ELSE substring(m.data_encrypted FOR 25) <> $4 END AND {_ASKED_FOR}
ORDER BY m.stream_position DESC LIMIT $6"""

_ROWS_NOT_OF_PERSONS: Final = f"""
{_READ} m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position < $3
  AND CASE WHEN m.data_encrypted IS NULL THEN $5 WHEN octet_length(m.data_encrypted) < 25 THEN true
      ELSE get_byte(m.data_encrypted, 3) <> $4 OR NOT EXISTS (SELECT FROM encryption_keys k WHERE k.tenant_id = $1 AND k.key_id = {_KEY_ID}
             AND k.key_version = {_KEY_VERSION} AND k.is_active AND k.scope_kind = 'subject') END AND {_ASKED_FOR}
ORDER BY m.stream_position DESC LIMIT $6"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Streams of a tenant to be sealed under their present keys; `plain`: their plain events too. `into`: one stream, copied into a new one.

    `suite`, `key_version`: of the sealed events only those.
    """

    command_id: UUID
    chunk: int
    tenant: str
    streams: list[str]
    plain: bool
    into: str | None = None
    suite: int | None = None
    key_version: int | None = None


@dataclass(frozen=True, slots=True)
class Count:
    """Events: sealed anew; and left as they are, since they do not open, are a person's, or their scope is refused."""

    resealed: int = 0
    left: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.resealed + other.resealed, self.left + other.left)


async def plan(
    connection: Connection, command_id: UUID, scope: Scope, *, plain: bool, into: str | None = None, suite: int | None = None,
    key_version: int | None = None,
) -> int:  # fmt: skip
    """Cut the scope's streams into chunks; -> how many."""
    with mapped():
        done = await connection.execute(
            f"""INSERT INTO jobs (command_id, chunk, tenant_id, streams, plain, into_stream, suite, key_version)
                SELECT $3, n / {STREAMS_PER_CHUNK}, $1, array_agg(stream_id ORDER BY n), $4, $5::text, $6::int, $7::int
                FROM (SELECT s.stream_id, (row_number() OVER (ORDER BY s.stream_id) - 1)::int AS n FROM streams s
                      WHERE s.tenant_id = $1 AND {_OF_SCOPE[scope.kind]} AND (s.is_encrypted OR $4 OR $5::text IS NOT NULL)) x
                GROUP BY n / {STREAMS_PER_CHUNK} ON CONFLICT DO NOTHING""",  # noqa: S608 (constants)
            scope.tenant, scope.id, command_id, plain, into, suite, key_version,
        )  # fmt: skip
    return int(done.rpartition(" ")[2])


async def split_off(connection: Connection, scope: Scope) -> int:
    """From the next epoch on the scope's streams are sealed under keys of their own; -> how many were not before."""
    with mapped():
        done = await connection.execute(
            f"UPDATE streams s SET own_key = true WHERE s.tenant_id = $1 AND {_OF_SCOPE[scope.kind]} AND NOT s.own_key",  # noqa: S608 (constants)
            scope.tenant, scope.id,
        )  # fmt: skip
    return int(done.rpartition(" ")[2])


async def unpublished(connection: Connection, before: datetime, limit: int = 1000) -> list[tuple[UUID, int]]:
    """Pending chunks that are not on the topic, or are since long before: a chunk that comes twice does no harm."""
    with mapped():
        rows = await connection.fetch(
            """SELECT command_id, chunk FROM jobs WHERE state = 'pending' AND (published_at IS NULL OR published_at < $1)
               ORDER BY published_at NULLS FIRST, command_id, chunk LIMIT $2""",
            before, limit,
        )  # fmt: skip
    return [(row["command_id"], row["chunk"]) for row in rows]


async def published(connection: Connection, chunks: Sequence[tuple[UUID, int]], at: datetime) -> None:
    """On the jobs topic: if they are not done later, they go there again."""
    with mapped():
        await connection.execute(
            "UPDATE jobs j SET published_at = $3 FROM unnest($1::uuid[], $2::int[]) x(c, n) WHERE j.command_id = x.c AND j.chunk = x.n",
            [c for c, _ in chunks], [n for _, n in chunks], at,
        )  # fmt: skip


async def begin(connection: Connection, command_id: UUID, chunk: int, worker: str) -> Chunk | None:
    """The chunk, or None if it is done (or unknown) already. Two workers may have it at once: every write checks what it read."""
    with mapped():
        row = await connection.fetchrow(
            "UPDATE jobs SET attempts = attempts + 1, worker = $3 WHERE command_id = $1 AND chunk = $2 AND state = 'pending' RETURNING *",
            command_id, chunk, worker,
        )  # fmt: skip
    if row is None:
        return None
    return Chunk(
        command_id=command_id, chunk=chunk, tenant=row["tenant_id"], streams=row["streams"], plain=row["plain"], into=row["into_stream"],
        suite=row["suite"], key_version=row["key_version"],
    )  # fmt: skip


async def add(connection: Connection, chunk: Chunk, resealed: int) -> None:
    """Progress, in the transaction that made it."""
    with mapped():
        await connection.execute(
            "UPDATE jobs SET resealed = resealed + $3 WHERE command_id = $1 AND chunk = $2", chunk.command_id, chunk.chunk, resealed
        )


async def finish(connection: Connection, chunk: Chunk, left: int, worker: str) -> None:
    """`left`: events that were left as they were."""
    with mapped():
        await connection.execute(
            """UPDATE jobs SET state = 'done', left_alone = $3, worker = $4, done_at = clock_timestamp()
               WHERE command_id = $1 AND chunk = $2 AND state = 'pending'""",
            chunk.command_id, chunk.chunk, left, worker,
        )  # fmt: skip


async def any_resealed(connection: Connection, tenant: str) -> bool:
    """Whether events of the tenant were ever sealed anew."""
    with mapped():
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM jobs WHERE tenant_id = $1 AND resealed > 0)", tenant))


async def all_done(connection: Connection) -> list[Any]:
    """Re-encryptions whose chunks are all done and whose last receipt is still to come."""
    with mapped():
        return await connection.fetch(
            """SELECT c.command_id, c.op, c.tenant_id, c.payload, c.result, c.received_at FROM commands c
               WHERE c.op = 'reencrypt' AND c.step = 'done' AND c.status = 'accepted'
                 AND NOT EXISTS (SELECT FROM jobs j WHERE j.command_id = c.command_id AND j.state = 'pending') FOR UPDATE OF c SKIP LOCKED"""
        )


async def progress(connection: Connection, command_id: UUID | None = None) -> list[dict[str, Any]]:
    """A row per command, newest last."""
    with mapped():
        rows = await connection.fetch(
            """SELECT j.command_id::text, j.tenant_id AS tenant, count(*) AS chunks, count(*) FILTER (WHERE j.state = 'done') AS done,
                 sum(j.resealed)::bigint AS resealed, sum(j.left_alone)::bigint AS left_alone, sum(j.attempts)::bigint AS attempts,
                 count(DISTINCT j.worker) AS workers, CASE WHEN bool_and(j.state = 'done') THEN 'done' ELSE 'pending' END AS state
               FROM jobs j WHERE $1::uuid IS NULL OR j.command_id = $1 GROUP BY 1, 2 ORDER BY min(j.created_at), 1""",
            command_id,
        )
    return [dict(row) for row in rows]


# ── what a chunk reads and writes ───────────────────────────────────────────────────────────────────────────────────────


async def rows_not_under(connection: Connection, chunk: Chunk, stream: str, prefix: bytes, before: int, limit: int) -> list[Any]:
    """Events before that position whose envelope's first 25 bytes are others, from behind."""
    with mapped():
        return await connection.fetch(_ROWS, chunk.tenant, stream, before, prefix, chunk.plain, limit, chunk.suite, chunk.key_version)


async def rows_not_of_persons(connection: Connection, chunk: Chunk, stream: str, suite: int, before: int, limit: int) -> list[Any]:
    """Events before that position that are not under the live version of a person's key with that suite, from behind."""
    with mapped():
        return await connection.fetch(_ROWS_NOT_OF_PERSONS, chunk.tenant, stream, before, suite, chunk.plain, limit, chunk.suite, chunk.key_version)


async def classes(connection: Connection, tenant: str, streams: Sequence[str]) -> dict[str, str]:
    """{stream: class}"""
    with mapped():
        rows = await connection.fetch(
            "SELECT stream_id, stream_type_class FROM streams WHERE tenant_id = $1 AND stream_id = ANY ($2)", tenant, streams
        )
    return {row["stream_id"]: row["stream_type_class"] for row in rows}


async def replace(connection: Connection, tenant: str, stream: str, new: Sequence[tuple[int, bytes | None, bytes, bytes | None]]) -> list[Any]:
    """(position, the 25 bytes that were read or None of a plain event, envelope, document beside it): where the row is still as it was read.

    -> rows as they are now.
    """
    with mapped():
        return await connection.fetch(
            """UPDATE messages m SET data_encrypted = x.envelope, data = x.document, metadata = NULL
               FROM unnest($3::bigint[], $4::bytea[], $5::bytea[], $6::bytea[]) x(position, old, envelope, document)
               WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position = x.position
                 AND substring(m.data_encrypted FOR 25) IS NOT DISTINCT FROM x.old
               RETURNING m.stream_position, m.data_encrypted, m.data""",
            tenant, stream, *([n[column] for n in new] for column in range(4)),
        )  # fmt: skip


async def lock_history(connection: Connection, tenant: str, stream: str) -> tuple[list[Range], int]:
    """-> the ranges of keys that are no persons', and the last position. Who begins with another key updates the stream's row, and so waits."""
    with mapped():
        await connection.execute("SELECT FROM streams WHERE tenant_id = $1 AND stream_id = $2 FOR UPDATE", tenant, stream)
        rows = await connection.fetch(
            """SELECT h.* FROM stream_key_history h JOIN encryption_keys k USING (tenant_id, key_id, key_version)
               WHERE h.tenant_id = $1 AND h.stream_id = $2 AND k.scope_kind <> 'subject' ORDER BY used_from_position""",
            tenant, stream,
        )  # fmt: skip
        head = await connection.fetchval("SELECT max(stream_position) FROM messages WHERE tenant_id = $1 AND stream_id = $2", tenant, stream)
    return [Range(r["key_id"], r["key_version"], r["used_from_position"], r["used_to_position"]) for r in rows], head


async def ranges_of(connection: Connection, tenant: str, stream: str, keys: Sequence[tuple[UUID, int]]) -> list[Range]:
    """The stream's ranges of those key versions, which are persons'."""
    with mapped():
        rows = await connection.fetch(
            """SELECT h.* FROM stream_key_history h JOIN unnest($3::uuid[], $4::int[]) x(k, v) ON h.key_id = x.k AND h.key_version = x.v
               WHERE h.tenant_id = $1 AND h.stream_id = $2""",
            tenant, stream, [key_id for key_id, _ in keys], [version for _, version in keys],
        )  # fmt: skip
    return [Range(r["key_id"], r["key_version"], r["used_from_position"], r["used_to_position"]) for r in rows]


async def write_history(connection: Connection, tenant: str, stream: str, old: Sequence[Range], new: Sequence[Range]) -> None:
    """After `lock_history`."""
    with mapped():
        gone, made = [r for r in old if r not in new], [r for r in new if r not in old]
        await connection.execute(
            """DELETE FROM stream_key_history h USING unnest($3::uuid[], $4::int[], $5::bigint[]) x(k, v, p)
               WHERE h.tenant_id = $1 AND h.stream_id = $2 AND h.key_id = x.k AND h.key_version = x.v AND h.used_from_position = x.p""",
            tenant, stream, [r.key_id for r in gone], [r.key_version for r in gone], [r.first for r in gone],
        )  # fmt: skip
        await connection.executemany(
            """INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position, used_to_position)
               VALUES ($1, $2, $3, $4, $5, $6)""",
            [(tenant, stream, *r) for r in made],
        )


async def mark_sealed(connection: Connection, tenant: str, stream: str, key_id: UUID | None, suite: str, sealed_from: int) -> None:
    """`key_id`: the stream's key, None where it is sealed by person. `sealed_from`: nothing plain stands from there on, but what was left alone."""
    with mapped():
        await connection.execute(
            """UPDATE streams s SET is_encrypted = true, encryption_key_id = $3, encryption_algorithm = $4,
                 encrypted_from_position = least(s.encrypted_from_position, coalesce((
                   SELECT m.stream_position + 1 FROM messages m WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.data_encrypted IS NULL
                     AND m.stream_position >= $5 AND (s.encrypted_from_position IS NULL OR m.stream_position < s.encrypted_from_position)
                   ORDER BY m.stream_position DESC LIMIT 1), $5))
               WHERE s.tenant_id = $1 AND s.stream_id = $2""",
            tenant, stream, key_id, suite, sealed_from,
        )  # fmt: skip


async def drop_unused_ranges(connection: Connection, tenant: str, stream: str) -> None:
    """Of persons' retired key versions that no event of the stream is under any more. Theirs cannot be told from what a single step wrote."""
    with mapped():
        await connection.execute(
            f"""DELETE FROM stream_key_history h USING encryption_keys k
                WHERE h.tenant_id = $1 AND h.stream_id = $2 AND k.tenant_id = $1 AND k.key_id = h.key_id AND k.key_version = h.key_version
                  AND k.scope_kind = 'subject' AND NOT k.is_active
                  AND (h.key_id, h.key_version) NOT IN (
                    SELECT {_KEY_ID}, {_KEY_VERSION} FROM messages m
                    WHERE m.tenant_id = $1 AND m.stream_id = $2 AND octet_length(m.data_encrypted) >= 25)""",  # noqa: S608 (constants)
            tenant, stream,
        )  # fmt: skip


# ── what a copy reads and writes ────────────────────────────────────────────────────────────────────────────────────────


async def is_copy(connection: Connection, tenant: str, stream: str, into: str) -> bool:
    """Whether `into` has no events, or its last one is the other stream's at that position: then what stands before it is too."""
    with mapped():
        row = await connection.fetchrow(
            """SELECT c.message_id = (SELECT m.message_id FROM messages m
                                      WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position = c.stream_position) AS same
               FROM messages c WHERE c.tenant_id = $1 AND c.stream_id = $3 ORDER BY c.stream_position DESC LIMIT 1""",
            tenant, stream, into,
        )  # fmt: skip
    return row is None or bool(row["same"])


async def heads(connection: Connection, tenant: str, streams: Sequence[str]) -> list[int]:
    """The newest position of each, in this order; 0 without events."""
    with mapped():
        return [
            await connection.fetchval("SELECT coalesce(max(stream_position), 0) FROM messages WHERE tenant_id = $1 AND stream_id = $2", tenant, name)
            for name in streams
        ]


async def rows_behind(connection: Connection, tenant: str, stream: str, after: int, limit: int) -> list[Any]:
    """Events behind that position, in order."""
    with mapped():
        return await connection.fetch(
            f"{_READ} m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position > $3 ORDER BY m.stream_position LIMIT $4",
            tenant, stream, after, limit,
        )  # fmt: skip


async def append_copies(
    connection: Connection, stripe: int, tenant: str, stream: str, stream_class: str, *, head: int, epoch: int, policies: int,
    copies: Sequence[tuple[Any, bytes, bytes | None]],
) -> list[Any]:  # fmt: skip
    """(row, envelope, document beside it), behind `head`. -> rows as they are now. Raises WrongVersion, Moved, RecordRefused, AuthenticationFailed."""
    rows = [row for row, _, _ in copies]
    columns = [[row[name] for row in rows] for name in ("message_id", "message_type", "schema_version", "occurred_at")]
    with mapped():
        await connection.execute(
            "SELECT append_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
            stripe, tenant, stream, stream_class, head, epoch, policies, False, *columns, [document for *_, document in copies],
            [envelope for _, envelope, _ in copies], [None] * len(rows), [row["is_tombstone"] for row in rows],
        )  # fmt: skip
        return await connection.fetch(
            """SELECT stream_position, data_encrypted, data FROM messages WHERE tenant_id = $1 AND stream_id = $2 AND stream_position > $3
               ORDER BY stream_position""",
            tenant, stream, head,
        )  # fmt: skip
