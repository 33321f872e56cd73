"""A tenant's row, as SQL: its state, its generation, and the epoch that calls back every key in hand. In the caller's transaction."""

from dataclasses import dataclass

from sidecar.core.errors import CommandRejected
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant's row; `state` as core.keys.TenantState."""

    state: str
    generation: int
    epoch: int


async def find(connection: Connection, tenant: str) -> Tenant | None:
    """None for one that does not exist."""
    with mapped():
        row = await connection.fetchrow("SELECT state, generation, epoch FROM tenants WHERE tenant_id = $1", tenant)
    return Tenant(**row) if row else None


async def lock(connection: Connection, tenant: str) -> Tenant:
    """Raises CommandRejected for one that does not exist."""
    with mapped():
        row = await connection.fetchrow("SELECT state, generation, epoch FROM tenants WHERE tenant_id = $1 FOR UPDATE", tenant)
    if row is None:
        raise CommandRejected("unknown_tenant", "there is no such tenant")
    return Tenant(**row)


async def next_epoch(connection: Connection, tenant: str, *, shredding: bool) -> None:
    """No batch that was sealed under the epoch before is stored any more."""
    with mapped():
        await connection.execute(
            """UPDATE tenants SET epoch = epoch + 1, state = CASE WHEN $2 AND state = 'active' THEN 'shredding' ELSE state END
               WHERE tenant_id = $1""",
            tenant,
            shredding,
        )


async def mark_shredded(connection: Connection, tenant: str) -> None:
    """The last step of its shred; one that is active again by now stays so."""
    with mapped():
        await connection.execute("UPDATE tenants SET state = 'shredded' WHERE tenant_id = $1 AND state = 'shredding'", tenant)
