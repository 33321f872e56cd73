"""Which retired key versions no stored byte needs any more, and their destruction, as SQL. In the caller's transaction."""

# ruff: noqa: S608 (statements are put together from constants of this file; what comes from outside is a parameter)

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sidecar.core.blind_index import SCOPE_ID
from sidecar.core.model import ScopeKind
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

# Bytes 5 to 24 of an envelope name its key version (docs/FORMAT.md).
_NAME = "substring({} FROM 6 FOR 20)"
_NAME_OF_KEY = "uuid_send(k.key_id) || int4send(k.key_version)"

# Tokens of the blind index do not say which version of its key made them: a search takes all.
_RETIRED = f"""k.scope_id <> '{SCOPE_ID}' AND k.tenant_id = $1 AND NOT k.is_active AND NOT k.is_destroyed AND k.key_material IS NOT NULL
  AND k.retired_at < $2 AND NOT k.used_outside
  AND k.generation = (SELECT t.generation FROM tenants t WHERE t.tenant_id = $1 AND t.state = 'active')"""

# The history names the streams and the positions, so each look-up goes by the primary key of `messages`.
_UNNEEDED = f"""
  NOT EXISTS (SELECT FROM stream_key_history h JOIN messages m ON m.tenant_id = $1 AND m.stream_id = h.stream_id
      AND m.stream_position BETWEEN h.used_from_position AND coalesce(h.used_to_position, 9223372036854775807)
    WHERE h.tenant_id = $1 AND h.key_id = k.key_id AND h.key_version = k.key_version AND {_NAME.format("m.data_encrypted")} = {_NAME_OF_KEY})
  AND {_NAME_OF_KEY} NOT IN (
    SELECT {_NAME.format("d.value_encrypted")} FROM dead_letters d WHERE d.tenant_id = $1 AND d.value_encrypted IS NOT NULL)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A key version, as `keys list` names it."""

    key_id: UUID
    key_version: int
    scope_kind: str
    scope_id: str
    fingerprint: bytes

    @property
    def in_envelopes(self) -> bytes:
        return self.key_id.bytes + self.key_version.to_bytes(4)


def _version(row: Any) -> Version:
    return Version(**{name: row[name] for name in ("key_id", "key_version", "scope_kind", "scope_id", "fingerprint")})


async def tenants(connection: Connection, before: datetime, only: str | None) -> list[str]:
    """Active tenants with versions that were retired before then; sorted."""
    with mapped():
        rows = await connection.fetch(
            """SELECT t.tenant_id FROM tenants t WHERE t.state = 'active' AND ($2::text IS NULL OR t.tenant_id = $2) AND EXISTS (
                 SELECT FROM encryption_keys k WHERE k.tenant_id = t.tenant_id AND NOT k.is_active AND NOT k.is_destroyed AND k.retired_at < $1)
               ORDER BY 1""",
            before,
            only,
        )
    return [row["tenant_id"] for row in rows]


async def candidates(
    connection: Connection, tenant: str, before: datetime, after: tuple[UUID, int], limit: int
) -> tuple[list[Version], tuple[UUID, int] | None]:
    """Of the next `limit` retired versions behind `after`, those that the history knows no stored event of; and where to go on, None at the end."""
    with mapped():
        rows = await connection.fetch(
            f"""WITH next AS MATERIALIZED (
                  SELECT k.* FROM encryption_keys k WHERE {_RETIRED} AND (k.key_id, k.key_version) > ($3, $4) ORDER BY k.key_id, k.key_version LIMIT $5)
                SELECT k.key_id, k.key_version, k.scope_kind, k.scope_id, sha256(k.commitment) AS fingerprint, {_UNNEEDED} AS unneeded
                FROM next k ORDER BY k.key_id, k.key_version""",
            tenant,
            before,
            *after,
            limit,
        )
    last = (rows[-1]["key_id"], rows[-1]["key_version"]) if len(rows) == limit else None
    return [_version(row) for row in rows if row["unneeded"]], last


async def in_use(connection: Connection, tenant: str, versions: list[Version]) -> set[bytes]:
    """Which of them an event names all the same, as their `in_envelopes`: looks at the events themselves, of the keys' streams or of the tenant."""
    found: set[bytes] = set()
    own = [v for v in versions if v.scope_kind == ScopeKind.STREAM]
    for of, streams in ((own, [v.scope_id for v in own]), ([v for v in versions if v.scope_kind != ScopeKind.STREAM], None)):
        if of:
            with mapped():
                rows = await connection.fetch(
                    f"""SELECT DISTINCT {_NAME.format("m.data_encrypted")} AS name FROM messages m
                        WHERE m.tenant_id = $1 AND ($3::text[] IS NULL OR m.stream_id = ANY ($3))
                          AND {_NAME.format("m.data_encrypted")} = ANY ($2::bytea[])""",
                    tenant,
                    [v.in_envelopes for v in of],
                    streams,
                )
            found |= {bytes(row["name"]) for row in rows}
    return found


async def destroy(connection: Connection, tenant: str, before: datetime, versions: list[Version]) -> list[Version]:
    """Those of them that are still retired and still needed by nothing, as of now; their bytes are gone with the commit."""
    with mapped():
        rows = await connection.fetch(
            f"""UPDATE encryption_keys k SET key_material = NULL, is_destroyed = true, destroyed_at = now()
                FROM unnest($3::uuid[], $4::int[]) x(id, version)
                WHERE k.key_id = x.id AND k.key_version = x.version AND {_RETIRED} AND {_UNNEEDED}
                RETURNING k.key_id, k.key_version, k.scope_kind, k.scope_id, sha256(k.commitment) AS fingerprint""",
            tenant,
            before,
            [v.key_id for v in versions],
            [v.key_version for v in versions],
        )
    return [_version(row) for row in rows]
