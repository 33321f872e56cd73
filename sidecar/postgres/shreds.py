"""What a shred does, as SQL: which it refuses, the fence, the keys, where the sources ended, what stands in clear. Always in the caller's
transaction, mostly under the exclusive guard, so each statement is set-based and goes by an index where a tenant has millions of keys.
"""

# ruff: noqa: S608 (statements are put together from constants of this package; what comes from outside is a parameter)

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sidecar.core.errors import CommandRejected
from sidecar.core.keys import Keys
from sidecar.core.ledger import SourceEnd
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import scopes
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

SHARERS_NAMED: Final = 20

_SET_ASIDE = "key_material = NULL, is_active = false, retired_at = coalesce(retired_at, now())"
_DESTROY = "key_material = NULL, is_active = false, is_destroyed = true, destroyed_at = now()"


async def take_keys(connection: Connection, scope: Scope, command_id: UUID, kept_until: datetime | None) -> Keys:
    """Fence the scope, and take its keys from where anybody finds them: destroyed at once, or kept in quarantine until the end of a grace.

    A shred without grace ends the grace of an earlier one. The caller has asked `refuse_shared`.
    """
    if scope.kind is ScopeKind.TENANT:
        return await _take_tenant_keys(connection, scope.tenant, command_id, kept_until)
    await fence(connection, scope, command_id)
    condition = scopes.keys_of(scope)  # by scope, not by history: whatever a retired version was used for, it goes
    with mapped():
        if kept_until is None:
            await connection.execute(
                f"""DELETE FROM quarantined_keys q USING encryption_keys k WHERE {condition}
                      AND q.tenant_id = k.tenant_id AND q.key_id = k.key_id AND q.key_version = k.key_version""",
                scope.tenant,
                scope.id,
            )
        else:
            await connection.execute(
                f"""INSERT INTO quarantined_keys (command_id, tenant_id, generation, kek_version, key_id, key_version, wrapped, until, was)
                    SELECT $3, tenant_id, generation, kek_version, key_id, key_version, key_material, $4,
                      CASE WHEN is_active THEN 'active' ELSE 'retired' END
                    FROM encryption_keys k WHERE {condition} AND key_material IS NOT NULL""",
                scope.tenant,
                scope.id,
                command_id,
                kept_until,
            )
        change = _DESTROY if kept_until is None else _SET_ASIDE
        await connection.execute(f"UPDATE encryption_keys k SET {change} WHERE {condition} AND NOT is_destroyed", scope.tenant, scope.id)
    # All of them have no bytes any more. To say so here would make the planner, whose statistics know of none, join row by row.
    # below_kek: a roll between the fence and this has moved the keys to its new KEK.
    return await scopes.which_keys(
        connection,
        f"""k AS (SELECT sha256(k.commitment) AS fingerprint, k.key_id || '/' || k.key_version AS name FROM encryption_keys k WHERE {condition}),
            noted AS (UPDATE erased_scopes SET fingerprints = (SELECT coalesce(array_agg(fingerprint ORDER BY fingerprint), '{{}}') FROM k), below_kek = NULL
                      WHERE tenant_id = $1 AND scope_kind = $3 AND scope_id = $2 AND command_id = $4)""",
        scope.tenant,
        scope.id,
        scope.kind.value,
        command_id,
    )


async def _take_tenant_keys(connection: Connection, tenant: str, command_id: UUID, kept_until: datetime | None) -> Keys:
    with mapped():
        if kept_until is None:
            await connection.execute("DELETE FROM quarantined_keys WHERE tenant_id = $1", tenant)
            change = "wrapped = NULL, state = 'destroyed', destroyed_at = now()"
        else:
            await connection.execute(
                """INSERT INTO quarantined_keys (command_id, tenant_id, generation, kek_version, wrapped, until, was)
                   SELECT $2, tenant_id, generation, kek_version, wrapped, $3, state FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL""",
                tenant,
                command_id,
                kept_until,
            )
            change = "wrapped = NULL, state = 'retired'"
        await connection.execute(f"UPDATE tenant_keys SET {change} WHERE tenant_id = $1 AND state <> 'destroyed'", tenant)
        rows = await connection.fetch("SELECT generation, kek_version, fingerprint FROM tenant_keys WHERE tenant_id = $1", tenant)
    return Keys.of([f"kek/{r['generation']}/{r['kek_version']}" for r in rows], [r["fingerprint"] for r in rows])


async def fence(connection: Connection, scope: Scope, command_id: UUID) -> None:
    """Of a scope below tenant level: from the commit on it gets no key."""
    with mapped():
        await connection.execute(
            """INSERT INTO erased_scopes (tenant_id, scope_kind, scope_id, command_id, fingerprints) VALUES ($1, $2, $3, $4, '{}')
               ON CONFLICT DO NOTHING""",
            scope.tenant,
            scope.kind.value,
            scope.id,
            command_id,
        )


async def more_keys_than(connection: Connection, scope: Scope, limit: int) -> bool:
    """Keys of the scope that are not destroyed; counts no further than that."""
    with mapped():
        statement = f"SELECT count(*) FROM (SELECT FROM encryption_keys k WHERE {scopes.keys_of(scope)} AND NOT is_destroyed LIMIT $3) k"
        return bool(await connection.fetchval(statement, scope.tenant, scope.id, limit + 1) > limit)


async def refuse_second_grace(connection: Connection, scope: Scope) -> None:
    """While a restore of this scope, or of the class around it, would bring its keys back: one shred's restore must not undo another's."""
    of_command = "q.command_id IN (SELECT command_id FROM erased_scopes WHERE tenant_id = $1 AND readmitted_at IS NULL{})"
    condition = {
        ScopeKind.TENANT: "q.key_id IS NULL AND q.generation = (SELECT generation FROM tenants WHERE tenant_id = $1) AND $2::text IS NOT NULL",
        ScopeKind.CLASS: of_command.format(" AND scope_kind = 'class' AND scope_id = $2"),
    }.get(scope.kind) or f"{of_command.format('')} AND q.key_id IN (SELECT k.key_id FROM encryption_keys k WHERE {scopes.keys_of(scope)})"
    with mapped():
        until = await connection.fetchval(f"SELECT max(until) FROM quarantined_keys q WHERE q.tenant_id = $1 AND {condition}", scope.tenant, scope.id)
    if until is not None:
        mend = "shred without a grace to destroy them now"
        raise CommandRejected("in_grace", f"its keys are set aside already, by an earlier shred whose grace ends at {until.isoformat()}: {mend}")


# Every key that a stream's events can have: its own scope's, what its history names, what it uses now. Each by an index.
_STREAM_KEY_IDS = """
  SELECT key_id FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = 'stream' AND scope_id = $2
  UNION SELECT key_id FROM stream_key_history WHERE tenant_id = $1 AND stream_id = $2
  UNION SELECT encryption_key_id FROM streams WHERE tenant_id = $1 AND stream_id = $2 AND encryption_key_id IS NOT NULL"""

# Keys that the scope's events need and that are not the scope's own, so cannot be destroyed with it. Of older generations there are none.
_OF_NOW = "generation = (SELECT generation FROM tenants WHERE tenant_id = $1)"
_SHARED = {
    ScopeKind.STREAM: f"""SELECT DISTINCT key_id, scope_kind, scope_id FROM encryption_keys WHERE tenant_id = $1 AND NOT is_destroyed
        AND {_OF_NOW} AND key_id IN ({_STREAM_KEY_IDS}) AND (scope_kind <> 'stream' OR scope_id <> $2)""",
    ScopeKind.CLASS: f"""
        WITH of_class AS MATERIALIZED (SELECT stream_id, encryption_key_id FROM streams WHERE tenant_id = $1 AND stream_type_class = $2),
        used AS (SELECT h.key_id FROM of_class c JOIN stream_key_history h ON h.tenant_id = $1 AND h.stream_id = c.stream_id
                 UNION SELECT encryption_key_id FROM of_class WHERE encryption_key_id IS NOT NULL)
        SELECT DISTINCT key_id, scope_kind, scope_id FROM encryption_keys k JOIN used USING (key_id)
          LEFT JOIN of_class own ON k.scope_kind = 'stream' AND k.scope_id = own.stream_id
        WHERE k.tenant_id = $1 AND NOT k.is_destroyed AND {_OF_NOW} AND own.stream_id IS NULL AND NOT (k.scope_kind = 'class' AND k.scope_id = $2)""",
}


async def refuse_shared(connection: Connection, scope: Scope) -> None:
    """A person's key is the person's alone: in whichever streams, it goes with the person. So is a tenant's."""
    if scope.kind in (ScopeKind.SUBJECT, ScopeKind.TENANT):
        return
    with mapped():
        shared = await connection.fetch(_SHARED[scope.kind], scope.tenant, scope.id)
    if shared:
        raise CommandRejected("shared_key", await _name_sharers(connection, scope, shared))


async def _name_sharers(connection: Connection, scope: Scope, shared: list[Any]) -> str:
    ids = [row["key_id"] for row in shared]
    own = "stream_id = $3" if scope.kind is ScopeKind.STREAM else "stream_type_class = $3"
    with mapped():
        rows = await connection.fetch(
            f"""SELECT stream_id, count(*) OVER () AS total FROM streams s WHERE tenant_id = $1 AND NOT {own} AND (encryption_key_id = ANY ($2)
                  OR EXISTS (SELECT FROM stream_key_history h WHERE h.tenant_id = $1 AND h.stream_id = s.stream_id AND h.key_id = ANY ($2)))
                ORDER BY stream_id LIMIT {SHARERS_NAMED}""",
            scope.tenant,
            ids,
            scope.id,
        )
    owners = sorted({"the tenant" if row["scope_kind"] == "tenant" else f"{row['scope_kind']} {row['scope_id']}" for row in shared})
    of = ", ".join(owners[:SHARERS_NAMED]) + (f" and {len(owners) - SHARERS_NAMED} more" if len(owners) > SHARERS_NAMED else "")
    if not rows:
        return f"its events are under a key of {of}; no other stream uses it yet"
    more = rows[0]["total"] - len(rows)
    return f"its events share a key of {of} with {', '.join(row['stream_id'] for row in rows)}{f' and {more} more' if more else ''}"


async def record_barriers(connection: Connection, command_id: UUID, tenant: str, ends: Sequence[SourceEnd]) -> None:
    """What stands below a source's end is refused for ever, also after a readmission; a source that nobody has read yet is on record from now on."""
    topics, topic_ids = [end.topic for end in ends], [end.topic_id for end in ends]
    with mapped():
        await connection.execute(
            """INSERT INTO source_topics (topic, topic_id) SELECT DISTINCT * FROM unnest($1::text[], $2::text[]) x(topic, topic_id)
               WHERE NOT EXISTS (SELECT FROM source_topics s WHERE (s.topic, s.topic_id) = (x.topic, x.topic_id)) ORDER BY 1, 2
               ON CONFLICT DO NOTHING""",
            topics,
            topic_ids,
        )
        await connection.execute(
            """INSERT INTO shred_barriers (command_id, tenant_id, source_id, partition, end_offset)
               SELECT $1, $2, s.source_id, x.partition, x.end_offset
               FROM unnest($3::text[], $4::text[], $5::int[], $6::bigint[]) x(topic, topic_id, partition, end_offset)
               JOIN source_topics s USING (topic, topic_id) ON CONFLICT DO NOTHING""",
            command_id,
            tenant,
            topics,
            topic_ids,
            [end.partition for end in ends],
            [end.end_offset for end in ends],
        )


async def source_ends(connection: Connection, command_id: UUID) -> dict[int, dict[int, int]]:
    """{source_id: {partition: end offset}} of the shred."""
    with mapped():
        rows = await connection.fetch("SELECT source_id, partition, end_offset FROM shred_barriers WHERE command_id = $1", command_id)
    out: dict[int, dict[int, int]] = {}
    for row in rows:
        out.setdefault(row["source_id"], {})[row["partition"]] = row["end_offset"]
    return out


async def source_topics(connection: Connection) -> list[tuple[int, str, str]]:
    """-> (source_id, topic, topic_id)."""
    with mapped():
        rows = await connection.fetch("SELECT source_id, topic, topic_id FROM source_topics ORDER BY source_id")
    return [(row["source_id"], row["topic"], row["topic_id"]) for row in rows]


async def delete_plain(connection: Connection, scope: Scope, after: tuple[str, int], limit: int) -> list[Any]:
    """Delete the next plain events behind (stream, position); -> stream_id, stream_position, class, topic, metadata (JSON text).

    The streams keep their positions: one that was given is never given again, not even after a readmission.
    """
    with mapped():
        return await connection.fetch(
            f"""
            WITH next AS (
              SELECT m.stream_id, m.stream_position FROM messages m
              WHERE {scopes.messages_of(scope)} AND m.data_encrypted IS NULL AND (m.stream_id, m.stream_position) > ($3, $4)
              ORDER BY m.stream_id, m.stream_position LIMIT $5
            ), gone AS (
              DELETE FROM messages m USING next n WHERE m.tenant_id = $1 AND m.stream_id = n.stream_id AND m.stream_position = n.stream_position
              RETURNING m.stream_id, m.stream_position, m.metadata::text AS metadata, m.source_id
            ), kept AS (
              UPDATE streams s SET position = greatest(s.position, g.newest)
              FROM (SELECT stream_id, max(stream_position) AS newest FROM gone GROUP BY stream_id) g
              WHERE s.tenant_id = $1 AND s.stream_id = g.stream_id
            )
            SELECT g.*, s.stream_type_class AS class, t.topic FROM gone g
            LEFT JOIN streams s ON s.tenant_id = $1 AND s.stream_id = g.stream_id LEFT JOIN source_topics t ON t.source_id = g.source_id
            ORDER BY g.stream_id, g.stream_position""",
            scope.tenant,
            scope.id,
            after[0],
            after[1],
            limit,
        )


async def clear_remainders(connection: Connection, scope: Scope, after: tuple[str, int], limit: int) -> list[Any]:
    """Of the next events behind (stream, position) whose fields alone were encrypted: delete the clear rest of the document. -> where they stand."""
    with mapped():
        return await connection.fetch(
            f"""
            WITH next AS (
              SELECT m.stream_id, m.stream_position FROM messages m
              WHERE {scopes.messages_of(scope)} AND m.data IS NOT NULL AND m.data_encrypted IS NOT NULL AND (m.stream_id, m.stream_position) > ($3, $4)
              ORDER BY m.stream_id, m.stream_position LIMIT $5
            ), cleared AS (
              UPDATE messages m SET data = NULL FROM next n WHERE m.tenant_id = $1 AND m.stream_id = n.stream_id AND m.stream_position = n.stream_position
              RETURNING m.stream_id, m.stream_position
            )
            SELECT * FROM cleared ORDER BY stream_id, stream_position""",
            scope.tenant,
            scope.id,
            after[0],
            after[1],
            limit,
        )
