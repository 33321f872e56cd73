"""What a compliance report is made of. Each statement answers for one tenant ($1) or, where it is NULL, for all; set-based, in one snapshot.

$1 tenant or NULL · $2 from, $3 to (the period: from ≤ t < to) · $4 rows at most
"""

# ruff: noqa: S608 (statements are put together from constants; what comes from outside is a parameter)

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.rotations import LIVE_KEYS

_OF = "($1::text IS NULL OR {}.tenant_id = $1)"
_COMMANDS = f"""FROM commands c WHERE {_OF.format("c")} AND c.received_at >= $2 AND c.received_at < $3"""

STATEMENTS: Final = {
    "policies": """
        SELECT p.stream_type_class AS class, p.tenant_id AS for_tenant, p.encryption_required AS encrypted, p.encryption_algorithm AS algorithm,
          p.key_scope, p.key_rotation_interval_days AS rotation_days, p.version, p.updated_at
        FROM encryption_policies p WHERE $1::text IS NULL OR p.tenant_id IN ('*', $1) ORDER BY 1, 2""",
    "policy_changes": """
        SELECT a.at, a.actor, p ->> 'class' AS class, p ->> 'tenant' AS for_tenant, (p ->> 'encrypt')::boolean AS encrypted, p ->> 'algorithm' AS algorithm,
          p ->> 'key_scope' AS key_scope, p ->> 'rotation_days' AS rotation_days, p ->> 'version' AS version
        FROM audit_log a CROSS JOIN LATERAL jsonb_array_elements(a.details -> 'policies') p
        WHERE a.writer = 'policy' AND a.action = 'change_policies' AND a.at >= $2 AND a.at < $3
          AND ($1::text IS NULL OR p ->> 'tenant' IN ('*', $1)) ORDER BY a.at DESC, a.seq DESC, 3, 4""",
    "streams": f"""
        SELECT s.stream_type_class AS class, count(*) AS streams, count(*) FILTER (WHERE s.is_encrypted) AS encrypted
        FROM streams s WHERE {_OF.format("s")} GROUP BY 1 ORDER BY 1""",
    "keys": f"""
        SELECT key, state, count(*) AS keys, min(created_at) AS oldest, max(created_at) AS newest FROM (
          SELECT 'tenant key' AS key, k.state, k.created_at FROM tenant_keys k WHERE {_OF.format("k")}
          UNION ALL
          SELECT k.scope_kind || '''s data key', CASE WHEN k.is_destroyed THEN 'destroyed' WHEN t.state = 'destroyed' THEN 'unreadable: its tenant key is destroyed'
            WHEN k.is_active THEN 'active' ELSE 'retired' END, k.created_at
          FROM encryption_keys k LEFT JOIN tenant_keys t USING (tenant_id, generation, kek_version) WHERE {_OF.format("k")}
        ) x GROUP BY 1, 2 ORDER BY key = 'tenant key' DESC, 1, 2""",
    "rotations_due": f"""
        SELECT k.class, p.days AS rotation_days, count(DISTINCT (k.key_id, k.key_version)) AS keys, min(k.created_at) AS oldest
        FROM ({LIVE_KEYS}) k JOIN tenants t USING (tenant_id, generation)
        CROSS JOIN LATERAL (
          SELECT key_rotation_interval_days AS days FROM encryption_policies
          WHERE stream_type_class = k.class AND tenant_id IN (k.tenant_id, '*') ORDER BY tenant_id = '*' LIMIT 1
        ) p
        WHERE {_OF.format("k")} AND t.state = 'active'
          AND k.created_at < now() - make_interval(days => p.days)
        GROUP BY 1, 2 ORDER BY oldest""",
    "rotations": f"""
        SELECT c.received_at, c.tenant_id AS tenant, c.receipt -> 'scope' AS scope, c.issuer, c.status, (c.receipt #>> '{{keys,count}}')::bigint AS keys
        {_COMMANDS} AND c.op = 'rotate' ORDER BY c.received_at DESC""",
    "shreds": f"""
        SELECT c.received_at, c.tenant_id AS tenant, c.receipt -> 'scope' AS scope, c.payload, c.issuer,
          CASE WHEN c.result ? 'restored' THEN 'taken back' ELSE c.status END AS status, c.receipt ->> 'inaccessible_at' AS inaccessible_at, c.receipt ->> 'irrecoverable_at' AS irrecoverable_at,
          (c.receipt #>> '{{keys,count}}')::bigint AS keys, (c.receipt #>> '{{events,unreadable}}')::bigint AS events_unreadable,
          (c.receipt #>> '{{events,plain_remaining}}')::bigint AS plain_events_remaining,
          (c.receipt #>> '{{events,clear_remainders}}')::bigint AS clear_remainders,
          (SELECT count(*) FILTER (WHERE r.state <> 'done') || ' of ' || count(*) FROM residue r WHERE r.command_id = c.command_id) AS outstanding,
          (SELECT coalesce(jsonb_agg(e.certificate_id ORDER BY e.created_at), '[]') FROM certificates e WHERE e.command_id = c.command_id) AS certificates,
          c.command_id
        {_COMMANDS} AND c.op = 'shred' AND coalesce(c.receipt ->> 'dry_run', 'false') = 'false' AND c.status NOT IN ('rejected', 'failed')
        ORDER BY c.received_at DESC""",
    "residue": f"""
        SELECT c.command_id, c.tenant_id AS tenant, r.kind, r.place, r.state, r.until, r.done_at
        FROM residue r JOIN commands c USING (command_id)
        WHERE {_OF.format("c")} AND c.received_at < $3 AND (r.state <> 'done' OR c.received_at >= $2)
        ORDER BY r.state = 'done', c.received_at DESC, r.kind, r.place""",
    "holds": f"""
        SELECT h.placed_at, h.tenant_id AS tenant, jsonb_build_object('kind', h.scope_kind, 'id', h.scope_id) AS scope, h.reason, h.placed_by,
          h.released_at, h.hold_id
        FROM legal_holds h WHERE {_OF.format("h")} AND h.placed_at < $3 AND (h.released_at IS NULL OR h.released_at >= $2) ORDER BY h.placed_at DESC""",
    "readmissions": f"""
        SELECT c.received_at, c.tenant_id AS tenant, c.receipt -> 'scope' AS scope, c.payload, c.status,
          c.result ->> 'old_data' AS old_data, c.command_id
        {_COMMANDS} AND c.op = 'readmit' AND c.status NOT IN ('rejected', 'failed') ORDER BY c.received_at DESC""",
    "refused_commands": f"""
        SELECT c.received_at, c.tenant_id AS tenant, c.op, c.receipt -> 'scope' AS scope, c.issuer, c.receipt #>> '{{error,code}}' AS reason, c.command_id
        {_COMMANDS} AND c.status IN ('rejected', 'failed') ORDER BY c.received_at DESC""",
    "refusals": f"""
        SELECT r.reason, count(*) AS records, min(r.at) AS first, max(r.at) AS last
        FROM refusals r WHERE {_OF.format("r")} AND r.at >= $2 AND r.at < $3 GROUP BY 1 ORDER BY 1""",
    "dead_letters": f"""
        SELECT d.reason, count(*) AS records, min(d.at) AS first, max(d.at) AS last
        FROM dead_letters d WHERE {_OF.format("d")} AND d.at >= $2 AND d.at < $3 GROUP BY 1 ORDER BY 1""",
    "actors": """
        SELECT a.actor, a.action, count(*) AS acts, min(a.at) AS first, max(a.at) AS last
        FROM audit_log a WHERE ($1::text IS NULL OR a.tenant_ref = tenant_ref($1)) AND a.at >= $2 AND a.at < $3 GROUP BY 1, 2 ORDER BY 1, 2""",
    "acts": """
        SELECT a.at, a.actor, a.action, a.details ->> 'command_id' AS command_id, a.writer, a.seq
        FROM audit_log a WHERE ($1::text IS NULL OR a.tenant_ref = tenant_ref($1)) AND a.at >= $2 AND a.at < $3
        ORDER BY a.at DESC, a.writer, a.seq DESC""",
    "seal_epochs": """
        SELECT e.kms_uri, e.kms_key_version AS version, e.state, e.created_at, e.retired_at, e.backup_confirmed_at, e.destroyed_at
        FROM seal_epochs e WHERE $1::text IS NULL OR (coalesce(e.tenant_id, $1) = $1 AND EXISTS (
          SELECT FROM tenant_keys k WHERE k.tenant_id = $1 AND k.kms_uri = e.kms_uri AND k.kms_key_version = e.kms_key_version))
        ORDER BY e.created_at DESC""",
}


FIGURES: Final = f"""
SELECT
  (SELECT count(*) {_COMMANDS} AND c.op = 'shred' AND EXISTS (SELECT FROM residue r WHERE r.command_id = c.command_id AND r.state <> 'done'))
    AS shreds_with_something_outstanding,
  (SELECT count(*) FROM legal_holds h WHERE {_OF.format("h")} AND h.released_at IS NULL) AS holds_in_force"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Of `total`, those that come first."""

    rows: list[dict[str, Any]]
    total: int


async def sections(connection: Connection, tenant: str | None, start: datetime, end: datetime, limit: int) -> tuple[dict[str, Rows], dict[str, int]]:
    """Every section, and figures that are not in one; of one snapshot."""
    out: dict[str, Rows] = {}
    with mapped():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            for name, statement in STATEMENTS.items():
                query = f"""WITH asked AS (SELECT $1::text, $2::timestamptz, $3::timestamptz), found AS ({statement})
                  SELECT f.*, count(*) OVER () AS total_rows FROM found f CROSS JOIN asked LIMIT $4"""
                rows = [dict(row) for row in await connection.fetch(query, tenant, start, end, limit)]
                total = rows[0]["total_rows"] if rows else 0
                out[name] = Rows(rows=[{column: row[column] for column in row if column != "total_rows"} for row in rows], total=total)
            figures = await connection.fetchrow(FIGURES, tenant, start, end)
    return out, dict(figures or {})


async def known(connection: Connection, tenant: str) -> str | None:
    """The tenant's state; None for one that there never was."""
    with mapped():
        state: str | None = await connection.fetchval("SELECT state FROM tenants WHERE tenant_id = $1", tenant)
    return state


async def last_checkpoint(connection: Connection) -> datetime | None:
    """None before the first."""
    with mapped():
        at: datetime | None = await connection.fetchval("SELECT max(at) FROM audit_checkpoints")
    return at
