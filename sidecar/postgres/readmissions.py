"""What readmit does to fences, as SQL: in the caller's transaction, under the exclusive guard. No key is touched: none comes back."""

from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


async def next_generation(connection: Connection, tenant: str) -> int:
    """A shredded tenant is active again, under keys that are yet to be made: no key of an older generation is ever looked for."""
    with mapped():
        generation: int = await connection.fetchval(
            """UPDATE tenants SET state = 'active', generation = generation + 1, epoch = epoch + 1
               WHERE tenant_id = $1 AND state = 'shredded' RETURNING generation""",
            tenant,
        )
    return generation


async def lift_fence(connection: Connection, scope: Scope) -> bool:
    """False if there was none."""
    with mapped():
        done = await connection.execute(
            """UPDATE erased_scopes SET readmitted_at = now()
               WHERE tenant_id = $1 AND scope_kind = $2 AND scope_id = $3 AND readmitted_at IS NULL""",
            scope.tenant,
            scope.kind.value,
            scope.id,
        )
    return str(done) != "UPDATE 0"


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
