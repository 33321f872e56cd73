"""What an entry of the ledger does to a database that lacks it, as SQL. In the caller's transaction.

An entry names its scope by pseudonym. A scope that the database knows is found by computing the pseudonyms of those that it has; one that it
does not know (yet) is kept in `erased_refs`, and `adopt` applies its entries when it shows its name, before anything of it is accepted:
the data plane asks (`foretold`) and waits, the control plane answers. A tenant that it does not know is found by its entries in `ledger`.
"""

from collections.abc import Iterable
from typing import Any, Final
from uuid import UUID

from sidecar.core.audit import scope_ref, tenant_ref
from sidecar.core.keys import Keys
from sidecar.core.ledger import Entry
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import holds, ledger, quarantine, readmissions, shreds, tenants
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

CHUNK: Final = 5000

# Every name of the kind that this database has of the tenant $1, whose pseudonym is $2.
_BY_REF: Final = {
    ScopeKind.STREAM: """SELECT stream_id FROM streams WHERE tenant_id = $1 AND scope_ref(tenant_id, 'stream', stream_id) = $2
          UNION ALL SELECT scope_id FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = 'stream'
          AND scope_ref(tenant_id, 'stream', scope_id) = $2 LIMIT 1""",
    ScopeKind.CLASS: """SELECT id FROM (SELECT stream_type_class AS id FROM streams WHERE tenant_id = $1
          UNION SELECT stream_type_class FROM encryption_policies
          UNION SELECT outside_class FROM encryption_keys WHERE tenant_id = $1 AND outside_class IS NOT NULL
          UNION SELECT scope_id FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = 'class') c WHERE scope_ref($1, 'class', id) = $2""",
    ScopeKind.SUBJECT: """SELECT scope_id FROM encryption_keys WHERE tenant_id = $1 AND scope_kind = 'subject'
          AND scope_ref(tenant_id, 'subject', scope_id) = $2 LIMIT 1""",
}


async def tenant_of(connection: Connection, entry: Entry) -> str | None:
    """Whose pseudonym it is; None for a name that has not come up here."""
    with mapped():
        found: str | None = await connection.fetchval("SELECT tenant_id FROM tenants WHERE tenant_ref(tenant_id) = $1", entry.tenant_ref)
    return found


async def scope_of(connection: Connection, tenant: str, entry: Entry) -> Scope | None:
    """None where the database has nothing of that name; a fence that it has already counts as a name."""
    if entry.kind is ScopeKind.TENANT:
        return Scope.of_tenant(tenant)
    fenced = "SELECT scope_id FROM erased_scopes WHERE tenant_id = $1 AND scope_kind = $3 AND scope_ref(tenant_id, scope_kind, scope_id) = $2 LIMIT 1"
    with mapped():
        found = await connection.fetchval(_BY_REF[entry.kind], tenant, entry.scope_ref)
        found = found or await connection.fetchval(fenced, tenant, entry.scope_ref, entry.kind.value)
    return None if found is None else Scope(tenant=tenant, kind=entry.kind, id=found)


async def foretell(connection: Connection, entry: Entry) -> None:
    """The scope has no name here yet."""
    with mapped():
        await connection.execute(
            "INSERT INTO erased_refs (ref, tenant_ref, scope_kind, command_id, erased_at) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
            entry.scope_ref,
            entry.tenant_ref,
            entry.kind.value,
            entry.command_id,
            entry.at,
        )


async def apply(connection: Connection, entry: Entry, scope: Scope) -> Keys:
    """The act again; repeatable. The tenant's row is locked, its epoch moves. Raises CommandRejected where others need a key of the scope."""
    keys = Keys.of()
    if entry.act == "shred":
        keys = await _shred(connection, entry, scope)
    elif entry.act == "readmit" and entry.undoes is not None:
        keys = await _restore(connection, scope)
    elif entry.act == "readmit":
        await _readmit(connection, entry, scope)
    else:
        await _hold(connection, entry, scope)
    await tenants.next_epoch(connection, scope.tenant, shredding=False)
    return keys


async def _shred(connection: Connection, entry: Entry, scope: Scope) -> Keys:
    # Within a grace, or behind one that a hold made longer: `grace.destroy_unwatched` ends it once the holds since are known.
    await shreds.refuse_shared(connection, scope)
    keys = await shreds.take_keys(connection, scope, entry.command_id, entry.kept_until)
    if scope.kind is ScopeKind.TENANT:
        await _set_tenant(connection, entry, scope.tenant, "shredded")
    await shreds.record_barriers(connection, entry.command_id, scope.tenant, entry.sources)
    if entry.include_plain:
        await _delete_plain(connection, scope)
    return keys


async def _delete_plain(connection: Connection, scope: Scope) -> None:
    """Views have the tombstones."""
    for delete in (shreds.delete_plain, shreds.clear_remainders):
        after = ("", 0)
        while rows := await delete(connection, scope, after, CHUNK):
            after = rows[-1]["stream_id"], rows[-1]["stream_position"]


async def _readmit(connection: Connection, entry: Entry, scope: Scope) -> None:
    """The shred before it may have been under way in the backup: what that had not deleted yet goes. Nothing of after it is here."""
    before = [e for e in await _entries_of(connection, scope.tenant) if e.act == "shred" and e.scope_ref == entry.scope_ref]
    if before and before[-1].include_plain:
        await _delete_plain(connection, scope)
    if scope.kind is ScopeKind.TENANT:
        await _set_tenant(connection, entry, scope.tenant, "active")
    else:
        await readmissions.lift_fence(connection, scope)


async def _restore(connection: Connection, scope: Scope) -> Keys:
    """Out of quarantine; nothing, where another of the act's entries did it, or the shred never was here."""
    shredded = await quarantine.commands_of(connection, scope)
    keys = await quarantine.restore(connection, scope)
    if shredded:
        await readmissions.take_back(connection, scope, shredded)
    return keys


async def _set_tenant(connection: Connection, entry: Entry, tenant: str, state: str) -> None:
    with mapped():
        await connection.execute(
            "UPDATE tenants SET state = $2, generation = greatest(generation, $3) WHERE tenant_id = $1", tenant, state, entry.generation
        )


async def _hold(connection: Connection, entry: Entry, scope: Scope) -> None:
    if entry.act == "release":
        await holds.release(connection, scope, entry.undoes, by="ledger", at=entry.at)
    elif not await holds.listed(connection, hold_id=entry.command_id, released=True):
        reason = "restored from the ledger; the command with this id has the reason"
        await holds.place(connection, scope, hold_id=entry.command_id, reason=reason, by="ledger", at=entry.at)


def undone(entries: Iterable[Entry]) -> set[Any]:
    """Shreds that were taken back within their grace: command ids. They, and what took them back, leave no trace in a database without them."""
    return {entry.undoes for entry in entries if entry.act == "readmit" and entry.undoes is not None}


async def _entries_of(connection: Connection, tenant: str) -> list[Entry]:
    found = await ledger.entries_of(connection, tenant_ref(tenant))
    gone = undone(found)
    return [entry for entry in found if entry.command_id not in gone and entry.undoes not in gone]


async def foretold_tenants(connection: Connection, tenants: list[str]) -> list[str]:
    """Those that the ledger has entries of; asked for tenants that this database does not know."""
    with mapped():
        rows = await connection.fetch(
            "SELECT t FROM unnest($1::text[]) t WHERE EXISTS (SELECT FROM ledger WHERE tenant_ref = tenant_ref(t)) ORDER BY t", tenants
        )
    return [row["t"] for row in rows]


async def ask(connection: Connection, scopes: list[Scope]) -> None:
    """The data plane's part: it may make no fence, and take none away."""
    with mapped():
        await connection.executemany(
            "INSERT INTO foretold (tenant_id, scope_kind, scope_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            [(scope.tenant, scope.kind.value, scope.id) for scope in scopes],
        )


async def asked(connection: Connection) -> list[Scope]:
    """Tenants first."""
    with mapped():
        rows = await connection.fetch("SELECT * FROM foretold ORDER BY scope_kind <> 'tenant', asked_at LIMIT 1000")
    return [Scope(tenant=row["tenant_id"], kind=ScopeKind(row["scope_kind"]), id=row["scope_id"]) for row in rows]


async def answer(connection: Connection, scope: Scope) -> bool:
    """The control plane's: apply what the ledger says of the scope. False if that was done."""
    with mapped():
        await connection.execute(
            "DELETE FROM foretold WHERE tenant_id = $1 AND scope_kind = $2 AND scope_id = $3", scope.tenant, scope.kind.value, scope.id
        )
    if scope.kind is ScopeKind.TENANT:
        return await adopt_tenant(connection, scope.tenant)
    await tenants.lock(connection, scope.tenant)
    return await adopt(connection, scope)


async def adopt_tenant(connection: Connection, tenant: str) -> bool:
    """Make a tenant that shows its name what the ledger says it is. False, if it is there."""
    with mapped():
        made = await connection.execute("INSERT INTO tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
    if str(made) != "INSERT 0 1":
        return False
    for entry in await _entries_of(connection, tenant):
        if entry.kind is ScopeKind.TENANT:
            await apply(connection, entry, Scope.of_tenant(tenant))
        else:
            await foretell(connection, entry)
    return True


async def adopt(connection: Connection, scope: Scope) -> bool:
    """Apply what the ledger says of a scope below tenant level that shows its name; False if it says nothing, or it is done."""
    ref = scope_ref(scope)
    with mapped():
        done = await connection.execute("DELETE FROM erased_refs WHERE ref = $1", ref)
    if str(done) != "DELETE 1":
        return False
    placed: set[UUID] = set()
    for entry in await _entries_of(connection, scope.tenant):
        if entry.scope_ref == ref or entry.undoes in placed:  # a hold may have been released by its id alone
            await apply(connection, entry, scope)
            placed |= {entry.command_id} if entry.act == "hold" else set()
    return True
