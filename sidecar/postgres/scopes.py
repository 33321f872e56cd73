"""What belongs to a scope, as SQL: its keys, its streams and its events as conditions, and how many there are of each. In the caller's transaction."""

# ruff: noqa: S608 (statements are put together from constants of this file; what comes from outside is a parameter)

from datetime import datetime
from typing import Any, Final

from sidecar.core.keys import NAMED_AT_MOST, Keys
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

# Streams of the tenant $1 by class, with those that have no event here yet, but text that the library sealed, or events in another store.
_OUTSIDE: Final = """SELECT o.scope_id, o.outside_class FROM encryption_keys o WHERE o.tenant_id = $1 AND o.outside_class IS NOT NULL
    AND NOT EXISTS (SELECT FROM streams t WHERE t.tenant_id = $1 AND t.stream_id = o.scope_id)"""
STREAMS: Final = f"(SELECT stream_id, stream_type_class FROM streams WHERE tenant_id = $1 UNION ALL {_OUTSIDE})"

# As `keys_of` has them, counted where that is cheap: a stream has one class, which the planner only knows of the table itself.
_KEYS_OF_CLASS: Final = f"""SELECT sum(n)::bigint FROM (
  SELECT count(*) AS n FROM encryption_keys k WHERE k.tenant_id = $1 AND k.scope_kind = 'class' AND k.scope_id = $2
  UNION ALL SELECT count(*) FROM encryption_keys k JOIN streams s ON s.tenant_id = k.tenant_id AND s.stream_id = k.scope_id
    WHERE k.tenant_id = $1 AND k.scope_kind = 'stream' AND s.stream_type_class = $2
  UNION ALL SELECT count(*) FROM encryption_keys k WHERE k.tenant_id = $1 AND k.scope_kind = 'stream'
    AND k.scope_id IN (SELECT scope_id FROM ({_OUTSIDE}) o WHERE outside_class = $2)) k"""


def keys_of(scope: Scope) -> str:
    """A condition on encryption_keys k; $1 the tenant, $2 the scope's id."""
    if scope.kind in (ScopeKind.STREAM, ScopeKind.SUBJECT):
        return f"k.tenant_id = $1 AND k.scope_kind = '{scope.kind}' AND k.scope_id = $2"
    # One IN, not two conditions with an OR: that is a join for the planner, where the other is a scan per key once a class is large.
    return f"""k.tenant_id = $1 AND (k.scope_kind, k.scope_id) IN (
      SELECT 'class', $2::text UNION ALL SELECT 'stream', stream_id FROM {STREAMS} s WHERE stream_type_class = $2)"""


def streams_of(scope: Scope) -> str:
    """A condition on streams s; $1 the tenant, $2 the scope's id."""
    return {
        ScopeKind.TENANT: "s.tenant_id = $1 AND $2::text IS NOT NULL",
        ScopeKind.STREAM: "s.tenant_id = $1 AND s.stream_id = $2",
        ScopeKind.CLASS: "s.tenant_id = $1 AND s.stream_type_class = $2",
        ScopeKind.SUBJECT: f"""s.tenant_id = $1 AND s.stream_id IN (SELECT h.stream_id FROM stream_key_history h
          WHERE h.tenant_id = $1 AND h.key_id IN (SELECT k.key_id FROM encryption_keys k WHERE {keys_of(scope)}))""",
    }[scope.kind]


def messages_of(scope: Scope) -> str:
    """A condition on messages m; $1 the tenant, $2 the scope's id."""
    if scope.kind is ScopeKind.TENANT:
        return "m.tenant_id = $1 AND $2::text IS NOT NULL"
    if scope.kind is ScopeKind.STREAM:
        return "m.tenant_id = $1 AND m.stream_id = $2"
    if scope.kind is ScopeKind.SUBJECT:
        return f"""m.tenant_id = $1 AND m.stream_id IN (SELECT h.stream_id FROM stream_key_history h JOIN encryption_keys k USING (tenant_id, key_id)
            WHERE {keys_of(scope)})
          AND substring(m.data_encrypted FROM 6 FOR 16) IN (SELECT uuid_send(k.key_id) FROM encryption_keys k WHERE {keys_of(scope)})"""
    return "m.tenant_id = $1 AND m.stream_id IN (SELECT stream_id FROM streams WHERE tenant_id = $1 AND stream_type_class = $2)"


async def which_keys(connection: Connection, found: str, *arguments: Any) -> Keys:
    """The keys (fingerprint, name) that the query k among the queries `found` has. Put together there: of a class they can be a million."""
    with mapped():
        row = await connection.fetchrow(
            f"""WITH {found}
                SELECT count(*) AS count, encode(sha256(coalesce(string_agg(fingerprint, ''::bytea ORDER BY fingerprint), '')), 'hex') AS fingerprints_sha256,
                  encode(sha256(convert_to(coalesce(string_agg(name, E'\n' ORDER BY name COLLATE "C"), ''), 'UTF8')), 'hex') AS names_sha256,
                  ARRAY(SELECT name FROM k ORDER BY name COLLATE "C" LIMIT {NAMED_AT_MOST}) AS names FROM k""",
            *arguments,
        )
    return Keys(**dict(row or ()))


async def stream_class(connection: Connection, tenant: str, stream: str) -> str | None:
    """None for a stream that is not known."""
    with mapped():
        found: str | None = await connection.fetchval("SELECT stream_type_class FROM streams WHERE tenant_id = $1 AND stream_id = $2", tenant, stream)
    return found


async def count_events(connection: Connection, scope: Scope, stood_at: datetime | None = None) -> tuple[int, int | None, int]:
    """-> events that were encrypted; events that are plain, None of a person, whom plain events do not name to us; and how many of the encrypted
    ones are so in named fields alone, with the rest of their document in clear.

    As they are; or as of then: a scope that was readmitted goes on.
    """
    with mapped():
        row = await connection.fetchrow(
            f"""SELECT count(m.data_encrypted) AS sealed, count(*) - count(m.data_encrypted) AS plain,
                  count(*) FILTER (WHERE m.data IS NOT NULL AND m.data_encrypted IS NOT NULL) AS partly FROM messages m
                WHERE {messages_of(scope)} AND ($3::timestamptz IS NULL OR m.created_at <= $3)""",
            scope.tenant,
            scope.id,
            stood_at,
        )
    assert row is not None  # noqa: S101 (an aggregate has one row)
    return row["sealed"], None if scope.kind is ScopeKind.SUBJECT else row["plain"], row["partly"]


async def estimate_events(connection: Connection, scope: Scope) -> tuple[int, int | None]:
    """As `count_events`, from the streams' positions on record: a lower bound, and of a person's streams all events."""
    with mapped():
        row = await connection.fetchrow(
            f"""SELECT coalesce(sum(position) FILTER (WHERE is_encrypted), 0)::bigint AS sealed,
                  coalesce(sum(position) FILTER (WHERE NOT is_encrypted), 0)::bigint AS plain FROM streams s WHERE {streams_of(scope)}""",
            scope.tenant,
            scope.id,
        )
    assert row is not None  # noqa: S101 (an aggregate has one row)
    return row["sealed"], None if scope.kind is ScopeKind.SUBJECT else row["plain"]


def events_on_receipt(unreadable: int, plain: int | None, partly: int = 0) -> dict[str, Any]:
    """As `count_events` has them. `clear_remainders`: of so many unreadable events the fields that policy does not name are still in the table."""
    counted: dict[str, Any] = {"unreadable": unreadable, "plain_remaining": plain} | ({"clear_remainders": partly} if partly else {})
    return counted if plain is not None else counted | {"note": "plain events do not say whose they are; they were not counted"}


async def count_streams(connection: Connection, scope: Scope) -> int:
    """Those that events of the scope lie in."""
    with mapped():
        return int(await connection.fetchval(f"SELECT count(*) FROM streams s WHERE {streams_of(scope)}", scope.tenant, scope.id) or 0)


async def count_keks(connection: Connection, tenant: str) -> int:
    """The tenant's own keys whose bytes are there."""
    with mapped():
        return int(await connection.fetchval("SELECT count(*) FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL", tenant) or 0)


async def count_deks(connection: Connection, scope: Scope) -> int:
    """Every version of the scope's keys, destroyed ones too."""
    condition = "k.tenant_id = $1 AND $2::text IS NOT NULL" if scope.kind is ScopeKind.TENANT else keys_of(scope)
    statement = _KEYS_OF_CLASS if scope.kind is ScopeKind.CLASS else f"SELECT count(*) FROM encryption_keys k WHERE {condition}"
    with mapped():
        return int(await connection.fetchval(statement, scope.tenant, scope.id) or 0)
