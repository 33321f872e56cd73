"""Residue on record: where copies outlive a shred's keys, one row each; and what the jobs ask of the database itself.

In the caller's transaction, but for `vacuum`, which can be in none.
"""

# ruff: noqa: S608 (statements are put together from constants; what comes from outside is a parameter)

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sidecar.core.command import Command, rfc3339, stored
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import Connection, Pool
from sidecar.postgres.errors import mapped
from sidecar.postgres.scopes import messages_of

KEY_TABLES: Final = ("tenant_keys", "encryption_keys", "quarantined_keys")
REWRITE_BELOW_BYTES: Final = 64 * 2**20
"""VACUUM leaves a dead row's bytes in the unused space of its page (measured: 37 of 50). A table up to this size is rewritten instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A job to come. `until`: when it ends by itself, as far as that is known."""

    kind: str
    place: str
    until: datetime | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of `residue`, with the command that it comes from and what its steps found out."""

    command_id: UUID
    kind: str
    place: str
    until: datetime | None
    details: dict[str, Any]
    attempts: int
    created_at: datetime
    command: Command
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look at a place found. `again`: seconds until the next one; None: nothing is left there."""

    again: float | None
    until: datetime | None = None
    details: dict[str, Any] = field(default_factory=dict)


async def insert(connection: Connection, command_id: UUID, planned: Iterable[Planned], now: datetime) -> None:
    """Each place once: a step that is repeated changes nothing."""
    with mapped():
        await connection.executemany(
            """INSERT INTO residue (command_id, kind, place, until, details, next_at, created_at) VALUES ($1,$2,$3,$4,$5,$6,$6)
               ON CONFLICT DO NOTHING""",
            [(command_id, p.kind, p.place, p.until, p.details, now) for p in planned],
        )


_PENDING = """SELECT r.*, c.payload, c.result FROM residue r JOIN commands c USING (command_id)
  WHERE r.state = 'pending' AND c.finished_at IS NOT NULL"""


async def due(connection: Connection, now: datetime, limit: int = 100) -> list[Entry]:
    """Of commands that are carried out: the notice stands before the tombstones."""
    with mapped():
        rows = await connection.fetch(f"{_PENDING} AND r.next_at <= $1 ORDER BY r.next_at LIMIT $2", now, limit)
    return [_entry(row) for row in rows]


async def searching(connection: Connection, topic: str, topic_id: str, limit: int = 100) -> list[Entry]:
    """Those of a view that have done what they can there, and only look whether anything of their scope is left."""
    with mapped():
        rows = await connection.fetch(
            f"""{_PENDING} AND r.kind = 'view' AND r.place = $1 AND r.details ->> 'topic_id' = $2
                AND (r.details ?| '{{tombstones,remaining}}' OR r.details ->> 'method' = 'retention') ORDER BY r.next_at LIMIT $3""",
            topic,
            topic_id,
            limit,
        )
    return [_entry(row) for row in rows]


async def hasten(connection: Connection, topic: str, command_ids: Iterable[UUID], now: datetime) -> None:
    """What was found for these jobs of a view is theirs to hear now."""
    with mapped():
        await connection.execute(
            """UPDATE residue SET next_at = least(next_at, $3)
               WHERE kind = 'view' AND place = $1 AND command_id = ANY ($2::uuid[]) AND state = 'pending'""",
            topic,
            list(command_ids),
            now,
        )


def _entry(row: Any) -> Entry:
    names = ("command_id", "kind", "place", "until", "details", "attempts", "created_at")
    return Entry(**{n: row[n] for n in names}, command=stored(row["payload"]), facts=row["result"] or {})


async def record(connection: Connection, entry: Entry, look: Look, now: datetime, next_at: datetime | None) -> bool:
    """`next_at` None: it is done. False for a row that another process did, or that was taken back meanwhile (a restore within the grace).

    Of a command's rows one is recorded at a time: so that of two processes the later sees what the other did, and that nothing is left.
    """
    with mapped():
        await connection.execute("SELECT FROM commands WHERE command_id = $1 FOR UPDATE", entry.command_id)
        done = await connection.execute(
            """UPDATE residue SET state = CASE WHEN $6::timestamptz IS NULL THEN 'done' ELSE 'pending' END, until = $4, details = $5,
                 attempts = attempts + 1, next_at = coalesce($6, next_at), done_at = CASE WHEN $6::timestamptz IS NULL THEN $7::timestamptz END
               WHERE command_id = $1 AND kind = $2 AND place = $3 AND state = 'pending'""",
            entry.command_id,
            entry.kind,
            entry.place,
            look.until,
            look.details,
            next_at,
            now,
        )
    return str(done) == "UPDATE 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A row as people see it."""

    kind: str
    place: str
    state: str
    until: datetime | None
    details: dict[str, Any]
    done_at: datetime | None

    def on_receipt(self) -> dict[str, Any]:
        where = {"view": f"topic {self.place}", "source": f"topic {self.place}", "consumers": f"readers of topic {self.place}"}
        out: dict[str, Any] = {"where": where.get(self.kind, self.place), "until": self.until and rfc3339(self.until)}
        out |= {"kind": self.kind, "state": self.state, "done_at": self.done_at and rfc3339(self.done_at)}
        return out | {"details": {name: value for name, value in self.details.items() if name != "progress"}}


async def of_command(connection: Connection, command_id: UUID) -> list[Shown]:
    """By kind and place."""
    with mapped():
        rows = await connection.fetch(
            "SELECT kind, place, state, until, details, done_at FROM residue WHERE command_id = $1 ORDER BY kind, place", command_id
        )
    return [Shown(**dict(row)) for row in rows]


async def done_at(connection: Connection, command_id: UUID, kind: str) -> datetime | None:
    """When the last of that kind was done; None while one is pending."""
    with mapped():
        found: datetime | None = await connection.fetchval(
            "SELECT CASE WHEN bool_and(state = 'done') THEN max(done_at) END FROM residue WHERE command_id = $1 AND kind = $2", command_id, kind
        )
    return found


async def pending(connection: Connection, command_id: UUID, kind: str) -> bool:
    """Whether any of that kind is."""
    with mapped():
        return bool(
            await connection.fetchval(
                "SELECT EXISTS (SELECT FROM residue WHERE command_id = $1 AND kind = $2 AND state = 'pending')", command_id, kind
            )
        )


# ── what a view can hold of a scope ─────────────────────────────────────────────────────────────────────────────────


async def sealed_events(
    connection: Connection, scope: Scope, after: tuple[str, int], limit: int, stood_at: datetime | None
) -> list[tuple[str, int]]:  # fmt: skip
    """The scope's encrypted events behind (stream, position), in that order; all, or those that stood then."""
    with mapped():
        rows = await connection.fetch(
            f"""SELECT m.stream_id, m.stream_position FROM messages m
                WHERE {messages_of(scope)} AND m.data_encrypted IS NOT NULL AND (m.stream_id, m.stream_position) > ($3, $4)
                  AND ($6::timestamptz IS NULL OR m.created_at <= $6) ORDER BY m.stream_id, m.stream_position LIMIT $5""",
            scope.tenant,
            scope.id,
            *after,
            limit,
            stood_at,
        )
    return [(row["stream_id"], row["stream_position"]) for row in rows]


async def gone_on(connection: Connection, tenant: str, streams: Iterable[str], since: datetime) -> set[str]:
    """Those of the streams that have an event from after then, and from a source: what the library appends is in no view."""
    with mapped():
        rows = await connection.fetch(
            """SELECT x.s FROM unnest($2::text[]) x(s) CROSS JOIN LATERAL (
                 SELECT m.created_at FROM messages m WHERE m.tenant_id = $1 AND m.stream_id = x.s AND m.source_id IS NOT NULL
                 ORDER BY m.stream_position DESC LIMIT 1) newest
               WHERE newest.created_at > $3""",
            tenant,
            list(streams),
            since,
        )
    return {row["s"] for row in rows}


async def sealed_streams(connection: Connection, scope: Scope, after: str, limit: int) -> list[str]:
    """The encrypted streams that are the scope's as a whole, behind `after`. A person's are none: others' events lie in them too."""
    of = {ScopeKind.TENANT: "$2::text IS NOT NULL", ScopeKind.STREAM: "stream_id = $2", ScopeKind.CLASS: "stream_type_class = $2"}
    if scope.kind not in of:
        return []
    with mapped():
        rows = await connection.fetch(
            f"SELECT stream_id FROM streams WHERE tenant_id = $1 AND {of[scope.kind]} AND is_encrypted AND stream_id > $3 ORDER BY stream_id LIMIT $4",
            scope.tenant,
            scope.id,
            after,
            limit,
        )
    return [row["stream_id"] for row in rows]


async def encrypted_from(connection: Connection, tenant: str, streams: list[str]) -> dict[str, int]:
    """Stream → the position from which its events are encrypted; plain streams are left out."""
    with mapped():
        rows = await connection.fetch(
            """SELECT stream_id, coalesce(encrypted_from_position, 1) AS first FROM streams
               WHERE tenant_id = $1 AND is_encrypted AND stream_id = ANY ($2)""",
            tenant,
            streams,
        )
    return {row["stream_id"]: row["first"] for row in rows}


# ── the database's own copies ───────────────────────────────────────────────────────────────────────────────────────


async def own_xid(connection: Connection) -> int:
    """Of this transaction: who sees the rows as they were before it holds their old versions back."""
    with mapped():
        return int(await connection.fetchval("SELECT pg_current_xact_id()::text"))


async def old_snapshots(connection: Connection, xid: int) -> list[str]:
    """Who can still see rows as they were before that transaction: sessions, replication slots, prepared transactions."""
    with mapped():
        rows = await connection.fetch(
            """
            WITH mark AS (SELECT age($1::text::xid8::xid) AS age)
            SELECT 'session ' || pid || coalesce(' (' || nullif(application_name, '') || ')', '') AS who FROM pg_stat_activity, mark
              WHERE (datname = current_database() OR datname IS NULL) AND pid <> pg_backend_pid()
                AND (age(backend_xmin) >= mark.age OR age(backend_xid) >= mark.age)
            UNION ALL SELECT 'replication slot ' || slot_name FROM pg_replication_slots, mark WHERE age(xmin) >= mark.age OR age(catalog_xmin) >= mark.age
            UNION ALL SELECT 'prepared transaction ' || gid FROM pg_prepared_xacts, mark WHERE database = current_database() AND age(transaction) >= mark.age
            ORDER BY who""",
            str(xid),
        )
    return [row["who"] for row in rows]


async def horizon(connection: Connection) -> int:
    """The transaction before which nobody sees a row as it was: a VACUUM that begins from now on removes all that died before it."""
    with mapped():
        oldest = await connection.fetchval(
            """
            SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint - coalesce(max(age), 0) FROM (
              SELECT greatest(age(backend_xmin), age(backend_xid)) FROM pg_stat_activity
                WHERE (datname = current_database() OR datname IS NULL) AND pid <> pg_backend_pid()
              UNION ALL SELECT greatest(age(xmin), age(catalog_xmin)) FROM pg_replication_slots
              UNION ALL SELECT age(transaction) FROM pg_prepared_xacts WHERE database = current_database()) s (age)"""
        )
    return int(oldest)


async def unseen_since(connection: Connection) -> str | None:
    """Now, by the database's clock, for a caller who found no old snapshot: a VACUUM that ends later than that removes what they saw. None while
    one runs: it may have begun under them."""
    with mapped():
        now: str | None = await connection.fetchval(
            "SELECT clock_timestamp()::text WHERE NOT EXISTS (SELECT FROM pg_stat_progress_vacuum WHERE datname = current_database())"
        )
    return now


async def vacuum(pool: Pool, tables: Iterable[str], since: str | None) -> dict[str, str]:
    """Rid tables of dead rows; -> table → rewritten, vacuumed, autovacuumed (since then, of `unseen_since`), or what stands in the way.

    Raises Conflict where a lock does not come within a second: nobody is made to wait longer for us.
    """
    out: dict[str, str] = {}
    with mapped():
        async with pool.acquire() as connection:
            await connection.execute("SET lock_timeout = '1s'")
            try:
                for table in tables:
                    size, allowed, auto = await connection.fetchrow(_TABLE, table, since)  # type: ignore[misc]
                    if not allowed:
                        out[table] = (
                            "autovacuumed" if auto else "the control role may not VACUUM it: own the table or GRANT MAINTAIN; autovacuum will"
                        )
                        continue
                    rewrite = size <= REWRITE_BELOW_BYTES
                    await connection.execute(f"VACUUM {'(FULL)' if rewrite else ''} {table}")
                    out[table] = "rewritten" if rewrite else "vacuumed; unused space of its pages is overwritten only as it is used again"
            finally:
                await connection.execute("RESET lock_timeout")
    return out


# Who is a member of the owner may vacuum, from Postgres 17 on also who has MAINTAIN (which older ones do not know as a privilege).
_TABLE = """
SELECT pg_total_relation_size(c.oid), pg_has_role(c.relowner, 'USAGE')
    OR EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.privilege_type = 'MAINTAIN' AND (a.grantee = 0 OR pg_has_role(a.grantee, 'USAGE'))),
  (SELECT greatest(last_vacuum, last_autovacuum) > $2::text::timestamptz FROM pg_stat_all_tables s WHERE s.relid = c.oid)
FROM pg_class c WHERE c.oid = $1::text::regclass"""


async def wal_position(connection: Connection) -> str:
    with mapped():
        return str(await connection.fetchval("SELECT pg_current_wal_insert_lsn()::text"))


async def wal_behind(connection: Connection, lsn: str) -> tuple[int, list[str]]:
    """-> WAL files that hold anything up to that position, and the replication slots that keep them. Needs pg_monitor, else AccessDenied."""
    with mapped():
        files = await connection.fetchval(
            r"""SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' AND substr(name, 9) <= substr(pg_walfile_name($1::text::pg_lsn), 9)""",
            lsn,
        )
        slots = await connection.fetch("SELECT slot_name FROM pg_replication_slots WHERE restart_lsn <= $1::text::pg_lsn ORDER BY slot_name", lsn)
    return int(files), [row["slot_name"] for row in slots]
