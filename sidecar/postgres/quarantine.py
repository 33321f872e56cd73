"""Keys in quarantine, as SQL; in the caller's transaction, with the tenant's row locked. How they come in: `shreds.take_keys`."""

from datetime import datetime
from uuid import UUID

from sidecar.core.keys import Keys
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.scopes import which_keys

_DESTROY = """
of_tenant AS (DELETE FROM quarantined_keys WHERE command_id = $1 AND key_id IS NULL RETURNING *),
keks AS (
  UPDATE tenant_keys k SET state = 'destroyed', destroyed_at = now() FROM of_tenant q
  WHERE (k.tenant_id, k.generation, k.kek_version) = (q.tenant_id, q.generation, q.kek_version) AND k.wrapped IS NULL
  RETURNING k.fingerprint, 'kek/' || k.generation || '/' || k.kek_version AS name),
below AS (DELETE FROM quarantined_keys WHERE command_id = $1 AND key_id IS NOT NULL RETURNING *),
deks AS (
  UPDATE encryption_keys k SET is_destroyed = true, destroyed_at = now() FROM below q
  WHERE (k.tenant_id, k.key_id, k.key_version) = (q.tenant_id, q.key_id, q.key_version) AND k.key_material IS NULL
  RETURNING sha256(k.commitment) AS fingerprint, k.key_id || '/' || k.key_version AS name),
k AS (SELECT * FROM keks UNION ALL SELECT * FROM deks)"""

# The commands that shredded exactly this scope and are within their grace; not what a readmission made final.
_OF_SCOPE = {
    True: """q.tenant_id = $1 AND q.key_id IS NULL AND $2::text IS NOT NULL AND $3::text IS NOT NULL
      AND q.generation = (SELECT generation FROM tenants WHERE tenant_id = $1)""",
    False: """q.tenant_id = $1 AND q.key_id IS NOT NULL AND q.command_id IN (
      SELECT command_id FROM erased_scopes WHERE tenant_id = $1 AND scope_kind = $2 AND scope_id = $3 AND readmitted_at IS NULL)""",
}

_RESTORE = {
    True: """UPDATE tenant_keys k SET wrapped = q.wrapped, state = q.was FROM back q
      WHERE (k.tenant_id, k.generation, k.kek_version) = (q.tenant_id, q.generation, q.kek_version) AND k.state <> 'destroyed'
      RETURNING k.fingerprint, 'kek/' || k.generation || '/' || k.kek_version AS name""",
    False: """UPDATE encryption_keys k SET key_material = q.wrapped, is_active = (q.was = 'active'),
        retired_at = CASE WHEN q.was = 'active' THEN NULL ELSE retired_at END FROM back q
      WHERE (k.tenant_id, k.key_id, k.key_version) = (q.tenant_id, q.key_id, q.key_version) AND NOT k.is_destroyed
      RETURNING sha256(k.commitment) AS fingerprint, k.key_id || '/' || k.key_version AS name""",
}


async def destroy(connection: Connection, command_id: UUID) -> Keys:
    """The end of a command's grace: the bytes go, the keys are destroyed. -> which; none if they were gone."""
    return await which_keys(connection, _DESTROY, command_id)


async def unwatched(connection: Connection, now: datetime) -> list[tuple[UUID, Scope]]:
    """Shreds whose grace is over, and that no command of this database is about: it learned of them from the ledger."""
    with mapped():
        rows = await connection.fetch(
            """SELECT DISTINCT q.command_id, q.tenant_id, coalesce(e.scope_kind, 'tenant') AS kind, coalesce(e.scope_id, q.tenant_id) AS id
               FROM quarantined_keys q LEFT JOIN erased_scopes e USING (tenant_id, command_id)
               WHERE q.until <= $1 AND NOT EXISTS (SELECT FROM residue r WHERE r.command_id = q.command_id)
                 AND NOT EXISTS (SELECT FROM commands c WHERE c.command_id = q.command_id AND c.finished_at IS NULL)""",
            now,
        )
    return [(row["command_id"], Scope(tenant=row["tenant_id"], kind=ScopeKind(row["kind"]), id=row["id"])) for row in rows]


async def commands_of(connection: Connection, scope: Scope) -> list[UUID]:
    """The shreds of exactly this scope whose keys are here."""
    statement = f"SELECT DISTINCT command_id FROM quarantined_keys q WHERE {_OF_SCOPE[scope.kind is ScopeKind.TENANT]} ORDER BY 1"  # noqa: S608
    with mapped():
        rows = await connection.fetch(statement, scope.tenant, scope.kind.value, scope.id)
    return [row["command_id"] for row in rows]


async def ends(connection: Connection, scope: Scope) -> datetime | None:
    """When the grace of exactly this scope ends, or ended; None: nothing of it is here."""
    statement = f"SELECT max(until) FROM quarantined_keys q WHERE {_OF_SCOPE[scope.kind is ScopeKind.TENANT]}"  # noqa: S608
    with mapped():
        until: datetime | None = await connection.fetchval(statement, scope.tenant, scope.kind.value, scope.id)
    return until


async def restore(connection: Connection, scope: Scope) -> Keys:
    """Back to where they were. The command's residue is not watched any more: it will never be complete."""
    tenant, commands = scope.kind is ScopeKind.TENANT, await commands_of(connection, scope)
    back = f"back AS (DELETE FROM quarantined_keys q WHERE {_OF_SCOPE[tenant]} RETURNING *), k AS ({_RESTORE[tenant]})"  # noqa: S608 (constants)
    keys = await which_keys(connection, back, scope.tenant, scope.kind.value, scope.id)
    if keys.count:
        with mapped():
            await connection.execute("DELETE FROM residue WHERE command_id = ANY ($1)", commands)
            await connection.execute(
                """UPDATE commands SET result = coalesce(result, '{}') || '{"restored": true}', receipt = receipt || '{"note": "taken_back"}'
                   WHERE command_id = ANY ($1)""",
                commands,
            )
    return keys
