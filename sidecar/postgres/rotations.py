"""Which keys are due for rotation, and what rotate does to them, as SQL: a mark, from which their successors follow. In the caller's transaction."""

# ruff: noqa: S608 (statements are put together from constants of this package; what comes from outside is a parameter)

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.commands import TIMER_ISSUER
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.scopes import keys_of

LIVE_KEYS: Final = """
SELECT k.tenant_id, k.generation, k.key_id, k.key_version, k.created_at, coalesce(s.stream_type_class, k.outside_class, k.scope_id) AS class FROM encryption_keys k
  LEFT JOIN streams s ON k.scope_kind = 'stream' AND s.tenant_id = k.tenant_id AND s.stream_id = k.scope_id
  WHERE k.is_active AND k.scope_kind IN ('stream', 'class')
UNION ALL
SELECT k.tenant_id, k.generation, k.key_id, k.key_version, k.created_at, s.stream_type_class FROM encryption_keys k
  JOIN stream_key_history h USING (tenant_id, key_id, key_version) JOIN streams s USING (tenant_id, stream_id)
  WHERE k.is_active AND k.scope_kind IN ('subject', 'tenant') AND h.used_to_position IS NULL"""
"""Keys that seal, by the classes whose policies say how old they may become: a person's, and the tenant's, by the streams that they are used in."""


async def due(connection: Connection, now: datetime, limit: int = 500) -> list[tuple[str, str, datetime]]:
    """-> (tenant, class, keys made before that are too old): by the tenant's own policy before the one of `*`; none twice at a time."""
    with mapped():
        # Of a century at most, which a datetime can be taken back by.
        ask = "SELECT min(least(key_rotation_interval_days, 36500)) FROM encryption_policies WHERE encryption_required"
        shortest: int | None = await connection.fetchval(ask)
        if shortest is None:
            return []
        # As a value, not as a subquery: the planner looks up how few keys are older, and takes the index.
        rows = await connection.fetch(
            f"""
            WITH oldest AS (
              SELECT k.tenant_id, k.class, min(k.created_at) AS made FROM ({LIVE_KEYS}) k JOIN tenants USING (tenant_id, generation)
              WHERE k.created_at < $4::timestamptz GROUP BY 1, 2
            )
            SELECT o.tenant_id, o.class, $1::timestamptz - make_interval(days => p.days) AS older_than
            FROM oldest o JOIN tenants t USING (tenant_id)
            CROSS JOIN LATERAL (
              SELECT key_rotation_interval_days AS days FROM encryption_policies
              WHERE stream_type_class = o.class AND tenant_id IN (o.tenant_id, '*') ORDER BY tenant_id = '*' LIMIT 1
            ) p
            WHERE t.state = 'active' AND o.made < $1::timestamptz - make_interval(days => p.days)
              AND NOT EXISTS (SELECT FROM commands c WHERE c.finished_at IS NULL AND c.issuer = $2 AND c.tenant_id = o.tenant_id
                              AND c.result ->> 'class' = o.class)
            ORDER BY o.made LIMIT $3
            """,
            now,
            TIMER_ISSUER,
            limit,
            now - timedelta(days=shortest),
        )
    return [(row["tenant_id"], row["class"], row["older_than"]) for row in rows]


def _live(scope: Scope) -> str:
    """A condition on encryption_keys: live keys that the scope's events are sealed with. $1 the tenant, $2 the scope's id, $3 made before, or NULL."""
    of = {
        ScopeKind.TENANT: "$2::text IS NOT NULL",
        ScopeKind.CLASS: f"""key_id IN (
            SELECT k.key_id FROM encryption_keys k WHERE {keys_of(Scope(tenant=scope.tenant, kind=ScopeKind.CLASS, id=scope.id))} AND k.is_active
            UNION SELECT p.key_id FROM encryption_keys p JOIN stream_key_history h USING (tenant_id, key_id) JOIN streams s USING (tenant_id, stream_id)
            WHERE p.tenant_id = $1 AND p.scope_kind IN ('subject', 'tenant') AND p.is_active AND s.stream_type_class = $2 AND h.used_to_position IS NULL)""",
        ScopeKind.STREAM: """key_id IN (
            SELECT key_id FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = 'stream' AND scope_id = $2 AND is_active
            UNION SELECT encryption_key_id FROM streams WHERE tenant_id = $1 AND stream_id = $2 AND encryption_key_id IS NOT NULL
            UNION SELECT key_id FROM stream_key_history WHERE tenant_id = $1 AND stream_id = $2 AND used_to_position IS NULL)""",
        ScopeKind.SUBJECT: "scope_kind = 'subject' AND scope_id = $2",
    }[scope.kind]
    return f"tenant_id = $1 AND is_active AND {of} AND ($3::timestamptz IS NULL OR created_at < $3)"


async def more_live_than(connection: Connection, scope: Scope, older_than: datetime | None, limit: int) -> bool:
    """Live keys of the scope, made before then; counts no further than that."""
    statement = f"SELECT count(*) FROM (SELECT FROM encryption_keys WHERE {_live(scope)} LIMIT $4) k"
    with mapped():
        return bool(await connection.fetchval(statement, scope.tenant, scope.id, older_than, limit + 1) > limit)


# As `_live`, of a key k of a class, asked about this key alone: a look at the whole class for each of its chunks is a look too many.
_IN_CLASS = """(k.scope_kind = 'class' AND k.scope_id = $2
  OR k.scope_kind = 'stream' AND $2 = coalesce((SELECT s.stream_type_class FROM streams s WHERE s.tenant_id = $1 AND s.stream_id = k.scope_id), k.outside_class)
  OR k.scope_kind IN ('subject', 'tenant') AND EXISTS (SELECT FROM stream_key_history h JOIN streams s USING (tenant_id, stream_id)
    WHERE h.tenant_id = $1 AND h.key_id = k.key_id AND h.used_to_position IS NULL AND s.stream_type_class = $2))"""


async def retire_some(
    connection: Connection, scope: Scope, older_than: datetime, after: Sequence[str], limit: int
) -> tuple[list[str], list[str] | None]:  # fmt: skip
    """As `retire`, of the next keys of a class or tenant behind `after`, which is a scope's kind and id; none that somebody else is changing now.

    -> names, and behind what to go on; None: those were the last.
    """
    with mapped():
        rows = await connection.fetch(
            f"""
            WITH next AS (
              SELECT k.ctid FROM encryption_keys k
              WHERE k.tenant_id = $1 AND k.is_active AND (k.scope_kind, k.scope_id) > ($4, $5) AND k.created_at < $3
                AND {_IN_CLASS if scope.kind is ScopeKind.CLASS else "$2::text IS NOT NULL"}
              ORDER BY k.scope_kind, k.scope_id LIMIT $6 FOR UPDATE SKIP LOCKED
            ), marked AS (
              UPDATE encryption_keys SET is_active = false, retired_at = now() WHERE ctid = ANY (ARRAY(SELECT ctid FROM next))
              RETURNING key_id, key_version, scope_kind, scope_id
            )
            SELECT * FROM marked ORDER BY scope_kind, scope_id""",
            scope.tenant,
            scope.id,
            older_than,
            *after,
            limit,
        )
    last = [rows[-1]["scope_kind"], rows[-1]["scope_id"]] if len(rows) == limit else None
    return [f"{row['key_id']}/{row['key_version']}" for row in rows], last


async def retire(connection: Connection, scope: Scope, older_than: datetime | None) -> list[str]:
    """Mark the live keys that the scope's events are sealed with; each gets its successor at its next write. -> names."""
    own_key = f"EXISTS (SELECT FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = '{scope.kind}' AND scope_id = $2)"
    known = {
        ScopeKind.STREAM: f"SELECT EXISTS (SELECT FROM streams WHERE tenant_id = $1 AND stream_id = $2) OR {own_key}",  # or in another store
        ScopeKind.SUBJECT: f"SELECT {own_key}",
    }.get(scope.kind)
    with mapped():
        if known is not None and not await connection.fetchval(known, scope.tenant, scope.id):
            raise CommandRejected(f"unknown_{scope.kind}", f"the tenant has no such {scope.kind}")
        rows = await connection.fetch(
            f"UPDATE encryption_keys SET is_active = false, retired_at = now() WHERE {_live(scope)} RETURNING key_id, key_version",
            scope.tenant,
            scope.id,
            older_than,
        )
    return [f"{row['key_id']}/{row['key_version']}" for row in rows]
