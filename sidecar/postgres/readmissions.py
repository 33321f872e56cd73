"""What readmit does to fences, as SQL: in the caller's transaction, under the exclusive guard. No key is touched: none comes back."""

from uuid import UUID

from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


async def next_generation(connection: Connection, tenant: str) -> int:
    """A shredded tenant is active again, under keys that are yet to be made: no key of an older generation is ever looked for."""
    with mapped():
        generation: int = await connection.fetchval(
            """UPDATE tenants SET state = 'active', generation = generation + 1
               WHERE tenant_id = $1 AND state = 'shredded' RETURNING generation""",
            tenant,
        )
    return generation


async def take_back(connection: Connection, scope: Scope, shreds: list[UUID]) -> None:
    """These shreds of the scope are as if they had not been: the tenant's generation stays, and their source offsets bar nothing."""
    with mapped():
        await connection.execute("UPDATE tenants SET state = 'active' WHERE tenant_id = $1 AND $2 = 'tenant'", scope.tenant, scope.kind.value)
        await connection.execute("UPDATE erased_scopes SET readmitted_at = now() WHERE command_id = ANY ($1) AND readmitted_at IS NULL", shreds)
        await connection.execute("DELETE FROM shred_barriers WHERE command_id = ANY ($1)", shreds)


async def is_fenced(connection: Connection, scope: Scope) -> bool:
    """By a shred of exactly this scope; not of the class or the tenant around it."""
    with mapped():
        return bool(
            await connection.fetchval(
                """SELECT EXISTS (SELECT FROM erased_scopes
                     WHERE tenant_id = $1 AND scope_kind = $2 AND scope_id = $3 AND readmitted_at IS NULL)""",
                scope.tenant,
                scope.kind.value,
                scope.id,
            )
        )


async def stays_shredded(connection: Connection, scope: Scope, command_id: UUID) -> bool:
    """Whether the shred's scope is shredded, by this shred or with the tenant; and if so, until the end of the transaction: a readmission waits."""
    with mapped():
        state = await connection.fetchval("SELECT state FROM tenants WHERE tenant_id = $1 FOR SHARE", scope.tenant)
        fenced = await connection.fetchval(  # on its own: of what the lock was waited for, the statement before sees the tenant's row alone
            "SELECT EXISTS (SELECT FROM erased_scopes WHERE tenant_id = $1 AND command_id = $2 AND readmitted_at IS NULL)", scope.tenant, command_id
        )
    return bool(state != "active" or fenced)


async def lift_fence(connection: Connection, scope: Scope) -> None:
    """Of exactly this scope: it gets keys again."""
    with mapped():
        await connection.execute(
            """UPDATE erased_scopes SET readmitted_at = now()
               WHERE tenant_id = $1 AND scope_kind = $2 AND scope_id = $3 AND readmitted_at IS NULL""",
            scope.tenant,
            scope.kind.value,
            scope.id,
        )


async def erased_class_of(connection: Connection, stream: Scope) -> str | None:
    """The stream's class, if that is fenced itself."""
    with mapped():
        found: str | None = await connection.fetchval(
            """SELECT s.stream_type_class FROM streams s JOIN erased_scopes e ON e.tenant_id = s.tenant_id AND e.scope_kind = 'class'
                 AND e.scope_id = s.stream_type_class AND e.readmitted_at IS NULL
               WHERE s.tenant_id = $1 AND s.stream_id = $2 LIMIT 1""",
            stream.tenant,
            stream.id,
        )
    return found
