"""A tenant's move to a new KEK, as SQL: both are live while its DEKs are re-wrapped, then the old one is destroyed.

`start` and `finish` stand under the exclusive guard, the chunks between them do not. After `start` no DEK is made under the old KEK:
batches verify the tenant's epoch, which it moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sidecar.core.keys import KekRow
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped:
    """A DEK's new wrap, and the KEK that its row named when it was read."""

    key_id: UUID
    version: int
    was_under: int
    wrapped: bytes


async def keks(connection: Connection, tenant: str) -> list[Any]:
    """Rows of the KEKs that are not destroyed, of the tenant's generation, oldest first. None of a tenant that is not active."""
    with mapped():
        return await connection.fetch(
            """SELECT k.*, t.epoch FROM tenant_keys k JOIN tenants t USING (tenant_id, generation)
               WHERE k.tenant_id = $1 AND t.state = 'active' AND k.wrapped IS NOT NULL ORDER BY k.kek_version""",
            tenant,
        )


async def start(connection: Connection, row: KekRow) -> None:
    """The new KEK is the one that wraps from now on. What is erased already was never under it."""
    with mapped():
        await connection.execute(seal_epochs.INSERT_KEK, *seal_epochs.kek_record(row))
        await connection.execute(
            "UPDATE tenant_keys SET state = 'retired' WHERE tenant_id = $1 AND generation = $2 AND kek_version < $3 AND state = 'active'",
            row.tenant,
            row.generation,
            row.version,
        )
        await connection.execute("UPDATE erased_scopes SET below_kek = $2 WHERE tenant_id = $1 AND below_kek IS NULL", row.tenant, row.version)


async def deks_below(connection: Connection, kek: KekRow, after: tuple[UUID, int], limit: int) -> list[Any]:
    """The next live rows of encryption_keys behind (key id, version) that an older KEK wraps."""
    with mapped():
        return await connection.fetch(
            """SELECT * FROM encryption_keys WHERE tenant_id = $1 AND generation = $2 AND kek_version < $3 AND key_material IS NOT NULL
                 AND (key_id, key_version) > ($4, $5) ORDER BY key_id, key_version LIMIT $6""",
            kek.tenant,
            kek.generation,
            kek.version,
            *after,
            limit,
        )


async def rewrap(connection: Connection, kek: KekRow, deks: Sequence[Rewrapped]) -> int:
    """Where a row is as it was read. It waits for no row lock, so no shred waits for it in a circle; what is locked is left for the next pass."""
    with mapped():
        done = await connection.execute(
            """WITH free AS (
                 SELECT k.key_id, k.key_version, x.wrapped FROM unnest($3::uuid[], $4::int[], $5::int[], $6::bytea[]) x(id, version, kek, wrapped)
                 JOIN encryption_keys k ON k.tenant_id = $1 AND k.key_id = x.id AND k.key_version = x.version
                 WHERE k.kek_version = x.kek AND k.key_material IS NOT NULL FOR UPDATE OF k SKIP LOCKED
               )
               UPDATE encryption_keys k SET key_material = f.wrapped, kek_version = $2 FROM free f
               WHERE k.tenant_id = $1 AND k.key_id = f.key_id AND k.key_version = f.key_version""",
            kek.tenant,
            kek.version,
            [dek.key_id for dek in deks],
            [dek.version for dek in deks],
            [dek.was_under for dek in deks],
            [dek.wrapped for dek in deks],
        )
    return int(str(done).rpartition(" ")[2])


async def finish(connection: Connection, kek: KekRow) -> list[str] | None:
    """Destroy the older KEKs; -> their names. None while keys of the tenant are in quarantine: they need the KEK that wrapped them."""
    with mapped():
        if await connection.fetchval("SELECT EXISTS (SELECT FROM quarantined_keys WHERE tenant_id = $1)", kek.tenant):
            return None
        rows = await connection.fetch(
            """UPDATE tenant_keys SET wrapped = NULL, state = 'destroyed', destroyed_at = clock_timestamp()
               WHERE tenant_id = $1 AND generation = $2 AND kek_version < $3 AND state <> 'destroyed' RETURNING kek_version""",
            kek.tenant,
            kek.generation,
            kek.version,
        )
    return [f"kek/{kek.generation}/{row['kek_version']}" for row in sorted(rows, key=lambda r: r["kek_version"])]
