"""The ledger's entries in this database, what is still to be published, and what the database remembers of the topic and of its own server."""

from dataclasses import dataclass
from uuid import UUID

import orjson

from sidecar.core import dsse
from sidecar.core.ledger import Entry, parse_entry
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Which database this is. Whatever puts older contents in its place changes one of these, or the ledger tells."""

    system_identifier: str
    timeline: int
    started: str
    contents: str
    """The database's and the ledger table's own ids: other ones after a dump was restored over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """What is on record. None: nothing yet."""

    deployment: str | None
    topic_id: str | None
    next_offset: int
    system_identifier: str | None
    timeline: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """An entry that is not on the topic yet."""

    seq: int
    entry_id: UUID
    envelope: bytes


async def server(connection: Connection) -> Server | None:
    """None for a standby: it may lag, and shows no guard of the primary's."""
    with mapped():
        row = await connection.fetchrow(
            # the timeline of the WAL that is being written; pg_control_checkpoint() names the old one until the first checkpoint after a promotion
            """SELECT (SELECT system_identifier::text FROM pg_control_system()) AS system_identifier,
                 CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline,
                 pg_postmaster_start_time()::text AS started,
                 concat_ws('/', (SELECT oid FROM pg_database WHERE datname = current_database()),
                   (SELECT string_agg(pg_relation_filenode(oid)::text, ',' ORDER BY oid) FROM pg_class WHERE relname = 'ledger' AND relkind = 'r')) AS contents"""
        )
    assert row is not None  # noqa: S101 (a query of constants)
    if row["timeline"] is None:
        return None
    return Server(system_identifier=row["system_identifier"], timeline=int(row["timeline"], 16), started=row["started"], contents=row["contents"])


async def watermark(connection: Connection) -> Watermark:
    """How far this database has the topic, and from where it is served."""
    with mapped():
        row = await connection.fetchrow("SELECT deployment, topic_id, next_offset, system_identifier, timeline FROM ledger_watermark")
    assert row is not None  # noqa: S101 (the migration made it)
    return Watermark(**dict(row))


async def remember(connection: Connection, deployment: str, topic_id: str, next_offset: int, on: Server) -> None:
    """This database has every entry of the deployment below the offset, and is served from here by right."""
    with mapped():
        await connection.execute(
            """UPDATE ledger_watermark SET deployment = $1, next_offset = CASE WHEN topic_id = $2 THEN greatest(next_offset, $3) ELSE $3 END,
                 topic_id = $2, system_identifier = $4, timeline = $5""",
            deployment,
            topic_id,
            next_offset,
            on.system_identifier,
            on.timeline,
        )


async def mark_replayed(connection: Connection) -> None:
    with mapped():
        await connection.execute("UPDATE ledger_watermark SET replayed_at = now()")


async def lacking(connection: Connection, ids: set[UUID]) -> set[UUID]:
    """Those of the entries that this database does not have."""
    with mapped():
        rows = await connection.fetch("SELECT entry_id FROM ledger WHERE entry_id = ANY ($1)", list(ids))
    return ids - {row["entry_id"] for row in rows}


async def knows(connection: Connection, command_id: UUID) -> bool:
    """Whether a command was carried out, be it before this database was restored."""
    with mapped():
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM ledger WHERE command_id = $1)", command_id))


async def enter(connection: Connection, entry: Entry, envelope: bytes, *, published: bool = False) -> bool:
    """In the transaction of the act. False if the database has the entry."""
    with mapped():
        done = await connection.execute(
            """INSERT INTO ledger (entry_id, command_id, tenant_ref, envelope, published_at)
               VALUES ($1, $2, $3, $4, CASE WHEN $5 THEN now() END) ON CONFLICT DO NOTHING""",
            entry.entry_id,
            entry.command_id,
            entry.tenant_ref,
            envelope,
            published,
        )
    return str(done) == "INSERT 0 1"


async def unpublished(connection: Connection) -> list[Waiting]:
    """In the order of the acts: of one tenant they follow each other under its guard."""
    with mapped():
        rows = await connection.fetch("SELECT seq, entry_id, envelope FROM ledger WHERE published_at IS NULL ORDER BY seq LIMIT 500")
    return [Waiting(**dict(row)) for row in rows]


async def count_unpublished(connection: Connection) -> int:
    """Entries that are not on the topic yet."""
    with mapped():
        return int(await connection.fetchval("SELECT count(*) FROM ledger WHERE published_at IS NULL") or 0)


async def mark_published(connection: Connection, seqs: list[int]) -> None:
    """They are on the topic."""
    with mapped():
        await connection.execute("UPDATE ledger SET published_at = clock_timestamp() WHERE seq = ANY ($1)", seqs)


async def entries(connection: Connection) -> list[Waiting]:
    """All, in order."""
    with mapped():
        rows = await connection.fetch("SELECT seq, entry_id, envelope FROM ledger ORDER BY seq")
    return [Waiting(**dict(row)) for row in rows]


async def entries_of(connection: Connection, tenant_ref: bytes) -> list[Entry]:
    """Those about a tenant, in order. Their signatures were verified when they came in."""
    with mapped():
        rows = await connection.fetch("SELECT envelope FROM ledger WHERE tenant_ref = $1 ORDER BY seq", tenant_ref)
    return [parse_entry(dsse.parse(orjson.loads(row["envelope"])).payload) for row in rows]
