"""What a batch must know before it seals: tenants, stream heads, keys. Each answered for many at once, in one round trip."""

from collections.abc import Iterable, Sequence
from typing import Any, cast
from uuid import UUID

from sidecar.core.aead import Suite
from sidecar.core.errors import StoreUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.policy import Policy, PolicySet, Unmatched
from sidecar.postgres import replays
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import mapped

# One statement, so one snapshot: a tenant shredded between two would look active and have no key.
_TENANTS = """
SELECT t.tenant_id, t.state, t.generation, t.epoch,
  ARRAY(SELECT e.scope_id FROM erased_scopes e
        WHERE e.tenant_id = t.tenant_id AND e.scope_kind = 'class' AND e.readmitted_at IS NULL) AS erased_classes,
  t.generation > 1 OR EXISTS (SELECT FROM erased_scopes e WHERE e.tenant_id = t.tenant_id AND e.readmitted_at IS NOT NULL) AS has_barriers,
  CASE WHEN EXISTS (SELECT FROM erased_refs) THEN
    ARRAY(SELECT r.ref FROM erased_refs r WHERE r.tenant_ref = tenant_ref(t.tenant_id) AND r.scope_kind = 'class') END AS foretold_classes,
  k.kek_version, k.kms_uri, k.kms_key_version, k.wrapped, k.fingerprint, k.dedicated
FROM tenants t LEFT JOIN tenant_keys k ON k.tenant_id = t.tenant_id AND k.generation = t.generation AND k.state <> 'destroyed'
WHERE t.tenant_id = ANY ($1)"""

# The head is messages' primary key, the truth; streams.position is a hint that may lag but never leads.
_STREAMS = """
SELECT x.t AS tenant_id, x.s AS stream_id, st.stream_type_class, st.is_encrypted, st.encryption_key_id, st.own_key,
  greatest(coalesce(st.position, 0), coalesce((SELECT m.stream_position FROM messages m
    WHERE m.tenant_id = x.t AND m.stream_id = x.s ORDER BY m.stream_position DESC LIMIT 1), 0)) AS head,
  h.key_id AS last_key_id, h.key_version AS last_key_version,
  EXISTS (SELECT 1 FROM erased_scopes e WHERE e.tenant_id = x.t AND e.scope_kind = 'stream' AND e.scope_id = x.s AND e.readmitted_at IS NULL) AS erased,
  CASE WHEN st.stream_id IS NULL THEN EXISTS (SELECT FROM erased_refs r WHERE r.ref = scope_ref(x.t, 'stream', x.s)) ELSE false END AS foretold
FROM unnest($1::text[], $2::text[]) x(t, s)
LEFT JOIN streams st ON st.tenant_id = x.t AND st.stream_id = x.s
LEFT JOIN LATERAL (SELECT k.key_id, k.key_version FROM stream_key_history k
  WHERE k.tenant_id = x.t AND k.stream_id = x.s ORDER BY k.used_from_position DESC LIMIT 1) h ON true"""

# A shred whose command is not among the erased scopes was the tenant's.
_BARRIERS = """
SELECT b.tenant_id, coalesce(e.scope_kind, 'tenant') AS scope_kind, coalesce(e.scope_id, b.tenant_id) AS scope_id,
  b.source_id, b.partition, max(b.end_offset) AS end_offset
FROM shred_barriers b LEFT JOIN erased_scopes e ON e.tenant_id = b.tenant_id AND e.command_id = b.command_id
WHERE b.tenant_id = ANY ($1) GROUP BY 1, 2, 3, 4, 5"""

# Of the tenant's present generation: one that was readmitted has keys of older ones that look as if they lived.
_NEWEST = """(SELECT * FROM encryption_keys e WHERE e.tenant_id = x.t AND e.scope_kind = x.kind AND e.scope_id = x.id
    AND e.generation = (SELECT generation FROM tenants WHERE tenant_id = x.t)
  ORDER BY e.is_active DESC, e.key_version DESC LIMIT 1)"""

# A stream's key is used in this stream alone: its uses are the positions it sealed, here up to `open_from`.
_NEWEST_KEYS = f"""
SELECT k.*, u.closed, u.open_from FROM unnest($1::text[], $2::text[], $3::text[]) x(t, kind, id)
CROSS JOIN LATERAL {_NEWEST} k
LEFT JOIN LATERAL (SELECT sum(h.used_to_position - h.used_from_position + 1)::bigint AS closed,
    min(h.used_from_position) FILTER (WHERE h.used_to_position IS NULL) AS open_from
  FROM stream_key_history h WHERE k.scope_kind = 'stream' AND h.tenant_id = x.t AND h.stream_id = x.id AND h.key_id = k.key_id
    AND h.key_version = k.key_version) u ON true"""  # noqa: S608 (constants)

# Whether a person was erased, and the newest key, in one snapshot.
_SUBJECTS = f"""
SELECT x.t AS of_tenant, x.id AS subject, k.*,
  EXISTS (SELECT 1 FROM erased_scopes e WHERE e.tenant_id = x.t AND e.scope_kind = 'subject' AND e.scope_id = x.id AND e.readmitted_at IS NULL) AS erased,
  CASE WHEN k.key_id IS NULL THEN EXISTS (SELECT FROM erased_refs r WHERE r.ref = scope_ref(x.t, 'subject', x.id)) ELSE false END AS foretold
FROM unnest($1::text[], $2::text[], $3::text[]) x(t, kind, id)
LEFT JOIN LATERAL {_NEWEST} k ON true"""  # noqa: S608 (constants)

_KEYS = """
SELECT k.* FROM unnest($1::text[], $2::uuid[], $3::int[]) x(t, k, v)
JOIN encryption_keys k ON k.tenant_id = x.t AND k.key_id = x.k AND k.key_version = x.v"""

MAX_VERSION = 2**31 - 1
"""What the column holds."""


class KeyStore:
    """Reads on connections of its own, beside the batch in flight."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def fetch(self, sql: str, *arguments: Any) -> list[Any]:
        """Rows of a statement, on a connection beside the batch in flight."""
        with mapped():
            async with self._pool.acquire() as connection:
                return await connection.fetch(sql, *arguments)

    async def tenants(self, ids: Sequence[str]) -> list[Any]:
        """A row per tenant and KEK of its generation that is not destroyed; a tenant without one has a row with kek_version NULL."""
        return await self.fetch(_TENANTS, ids)

    async def barriers(self, tenants: Sequence[str]) -> list[Any]:
        """Per shredded scope, source and partition: where the log ended then."""
        return await self.fetch(_BARRIERS, tenants)

    async def streams(self, wanted: Sequence[tuple[str, str]]) -> list[Any]:
        return await self.fetch(_STREAMS, [t for t, _ in wanted], [s for _, s in wanted])

    async def newest_keys(self, scopes: Sequence[tuple[str, ScopeKind, str]]) -> list[Any]:
        """Per (tenant, kind, id), of its newest generation: the active key, else its newest version."""
        return await self.fetch(_NEWEST_KEYS, [t for t, _, _ in scopes], [k.value for _, k, _ in scopes], [i for _, _, i in scopes])

    async def subjects(self, wanted: Sequence[tuple[str, str]]) -> list[Any]:
        """Per (tenant, person): `erased`, and the active key or its newest version; key_id NULL where there is none."""
        return await self.fetch(_SUBJECTS, [t for t, _ in wanted], [ScopeKind.SUBJECT.value] * len(wanted), [s for _, s in wanted])

    async def keys(self, refs: Iterable[tuple[str, UUID, int]]) -> list[Any]:
        """Recorded versions, destroyed ones too. The refs come from stored bytes, which may be anybody's: a version may be any u32."""
        wanted = [ref for ref in refs if ref[2] <= MAX_VERSION]
        return await self.fetch(_KEYS, [t for t, _, _ in wanted], [k for _, k, _ in wanted], [v for _, _, v in wanted])

    async def ask_the_ledger(self, tenants: Sequence[str] = (), scopes: Iterable[Scope] = ()) -> None:
        """Names that this database hears for the first time since it was restored, and of which the ledger may know more (replays.py).

        Raises StoreUnavailable if it does, until the control plane has applied what it says: read again.
        """
        async with transaction(self._pool) as connection:
            found = [Scope.of_tenant(name) for name in await replays.foretold_tenants(connection, list(tenants))] if tenants else []
            found += scopes
            if found:
                await replays.ask(connection, found)
        if found:
            raise StoreUnavailable(
                "the ledger has entries of a scope that came up for the first time since the restore: the control plane applies them"
            )

    async def policies(self, unmatched: Unmatched) -> PolicySet:
        with mapped():
            async with self._pool.acquire() as connection:
                return await load_policies(cast(Connection, connection), unmatched)


def policy_from_row(row: Any) -> Policy:
    """A row of encryption_policies."""
    return Policy(
        policy_id=row["policy_id"],
        stream_class=row["stream_type_class"],
        tenant=row["tenant_id"],
        encrypt=row["encryption_required"],
        suite=Suite.from_label(row["encryption_algorithm"] or Suite.AES_256_GCM.label),
        key_scope=ScopeKind(row["key_scope"]),
        subject=row["subject"],
        rotation_days=row["key_rotation_interval_days"],
        fields=tuple(row["fields"] or ()),
        blind_index=tuple(row["blind_index"] or ()),
        version=row["version"],
    )


async def load_policies(connection: Connection, unmatched: Unmatched) -> PolicySet:
    """All policies and their common version, of one snapshot."""
    with mapped():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            version = await connection.fetchval("SELECT version FROM policy_version")
            rows = await connection.fetch("SELECT * FROM encryption_policies")
    return PolicySet([policy_from_row(row) for row in rows], unmatched, version)
