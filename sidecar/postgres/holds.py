"""Legal holds: which are in force, and whether one stands in the way. In the caller's transaction, with the tenant's row locked.

A hold overlaps a shred if there is data that both are about: a tenant's hold covers all that is in it, a stream lies in its class, and
a person's events lie in every stream that the person's key was used in.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sidecar.core.audit import tenant_ref
from sidecar.core.errors import CommandRejected
from sidecar.core.ledger import Entry
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import ledger
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.scopes import STREAMS

NAMED_AT_MOST: Final = 5


# Whether the scope (kind, id) has to do with the stream s of the tenant $1.
def _touches(kind: str, scope_id: str) -> str:
    return f"""CASE {kind}
          WHEN 'stream' THEN s.stream_id = {scope_id}
          WHEN 'class' THEN s.stream_type_class = {scope_id}
          WHEN 'subject' THEN EXISTS (
            SELECT FROM stream_key_history u JOIN encryption_keys k USING (tenant_id, key_id, key_version)
            WHERE u.tenant_id = $1 AND u.stream_id = s.stream_id AND k.scope_kind = 'subject' AND k.scope_id = {scope_id})
        END"""


_OVERLAPPING = f"""
  SELECT * FROM legal_holds h
  WHERE h.tenant_id = $1 AND h.released_at IS NULL AND (
    'tenant' IN (h.scope_kind, $2::text) OR (h.scope_kind, h.scope_id) = ($2, $3) OR (
      h.scope_kind <> $2 AND EXISTS (SELECT FROM {STREAMS} s WHERE {_touches("$2", "$3")}
        AND {_touches("h.scope_kind", "h.scope_id")})))
  ORDER BY placed_at, hold_id"""  # noqa: S608 (constants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """As it stands in the table; `hold_id` is the id of the command that placed it."""

    hold_id: UUID
    tenant_id: str
    scope_kind: str
    scope_id: str
    reason: str
    placed_by: str
    placed_at: datetime
    released_at: datetime | None
    released_by: str | None


async def overlapping(connection: Connection, scope: Scope) -> list[Hold]:
    """The holds in force that stand in the way of a shred of the scope, oldest first."""
    with mapped():
        rows = await connection.fetch(_OVERLAPPING, scope.tenant, scope.kind.value, scope.id)
    return [Hold(**dict(row)) for row in rows] + await _foretold(connection, scope)


async def _foretold(connection: Connection, scope: Scope) -> list[Hold]:
    """Holds that the ledger has under pseudonyms whose names have not come up here since a restore. What they cover cannot be told yet, so
    they stand in the way of all but another scope of their own kind."""
    with mapped():
        rows = await connection.fetch("SELECT ref FROM erased_refs WHERE tenant_ref = tenant_ref($1)", scope.tenant)
    unnamed = {row["ref"] for row in rows}
    held: dict[UUID, Entry] = {}
    for entry in await ledger.entries_of(connection, tenant_ref(scope.tenant)) if unnamed else ():
        if entry.act == "hold" and entry.scope_ref in unnamed:
            held[entry.command_id] = entry
        elif entry.act == "release":
            gone = {entry.undoes} if entry.undoes else {hold for hold, placed in held.items() if placed.scope_ref == entry.scope_ref}
            held = {hold: placed for hold, placed in held.items() if hold not in gone}
    return [
        Hold(
            hold_id=entry.command_id, tenant_id=scope.tenant, scope_kind=entry.kind.value, scope_id="", placed_by="ledger", placed_at=entry.at,
            reason=f"of a {entry.kind} whose name has not come up since the restore", released_at=None, released_by=None,
        )
        for entry in held.values()
        if scope.kind is ScopeKind.TENANT or entry.kind is not scope.kind
    ]  # fmt: skip


async def refuse_held(connection: Connection, scope: Scope) -> None:
    """Raises CommandRejected (`legal_hold`) with reasons and hold ids if any hold in force overlaps the scope.

    Call it in the transaction of what cannot be taken back, after `tenants.lock`: a hold is placed under the same lock, so one that
    has its receipt is seen here.
    """
    held = await overlapping(connection, scope)
    if held:
        reasons = "; ".join(f"{hold.reason} (hold {hold.hold_id})" for hold in held[:NAMED_AT_MOST])
        more = f" and {len(held) - NAMED_AT_MOST} more" if len(held) > NAMED_AT_MOST else ""
        raise CommandRejected("legal_hold", f"a legal hold is in force: {reasons}{more}", holds=[str(hold.hold_id) for hold in held])


async def refuse_gone(connection: Connection, scope: Scope, now: datetime) -> None:
    """Raises CommandRejected if the scope's keys are destroyed: a receipt for a hold on them would promise what nobody can keep.

    Within a shred's grace their bytes are still there, and a hold keeps them from being destroyed; a grace that is over counts where another hold
    made it longer.
    """
    lasts = "(q.until > $4 OR $5)"
    with mapped():
        tenant_gone, scope_gone = await connection.fetchrow(  # type: ignore[misc]
            f"""SELECT t.state <> 'active' AND NOT EXISTS (
                   SELECT FROM quarantined_keys q WHERE q.tenant_id = $1 AND q.generation = t.generation AND q.key_id IS NULL AND {lasts}),
                 EXISTS (SELECT FROM erased_scopes e WHERE e.tenant_id = $1 AND e.readmitted_at IS NULL
                   AND ((e.scope_kind, e.scope_id) = ($2, $3) OR (e.scope_kind, e.scope_id) IN (
                     SELECT 'class', s.stream_type_class FROM {STREAMS} s WHERE $2 = 'stream' AND s.stream_id = $3))
                   AND NOT EXISTS (SELECT FROM quarantined_keys q WHERE q.command_id = e.command_id AND {lasts}))
               FROM tenants t WHERE t.tenant_id = $1""",  # noqa: S608 (constants)
            scope.tenant,
            scope.kind.value,
            scope.id,
            now,
            bool(await overlapping(connection, scope)),
        )
    if tenant_gone:
        raise CommandRejected("tenant_shredded", "the tenant's data is unreadable already; there is nothing to hold")
    if scope_gone:
        raise CommandRejected("scope_erased", "the scope's data is unreadable already; there is nothing to hold")


async def place(connection: Connection, scope: Scope, *, hold_id: UUID, reason: str, by: str, at: datetime) -> None:
    """In force from the commit on."""
    with mapped():
        await connection.execute(
            """INSERT INTO legal_holds (hold_id, tenant_id, scope_kind, scope_id, reason, placed_by, placed_at) VALUES ($1, $2, $3, $4, $5, $6, $7)""",
            hold_id,
            scope.tenant,
            scope.kind.value,
            scope.id,
            reason,
            by,
            at,
        )


async def release(connection: Connection, scope: Scope, hold_id: UUID | None, *, by: str, at: datetime) -> list[UUID]:
    """End the tenant's hold with this id or, without one, those on just this scope; -> the ids of those that were in force.

    One that only the ledger knows has no row to be ended: the entry of the release there does it.
    """
    with mapped():
        rows = await connection.fetch(
            """UPDATE legal_holds SET released_at = $5, released_by = $6 WHERE tenant_id = $1 AND released_at IS NULL
                 AND CASE WHEN $4::uuid IS NULL THEN (scope_kind, scope_id) = ($2, $3) ELSE hold_id = $4 END RETURNING hold_id""",
            scope.tenant,
            scope.kind.value,
            scope.id,
            hold_id,
            at,
            by,
        )
    return [row["hold_id"] for row in rows] or [
        hold.hold_id for hold in await _foretold(connection, Scope.of_tenant(scope.tenant)) if hold.hold_id == hold_id
    ]


async def listed(connection: Connection, *, tenant: str | None = None, hold_id: UUID | None = None, released: bool = False) -> list[Hold]:
    """Oldest first; with `released`, those too that are not in force any more."""
    with mapped():
        rows = await connection.fetch(
            """SELECT * FROM legal_holds WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::uuid IS NULL OR hold_id = $2)
                 AND ($3 OR released_at IS NULL) ORDER BY placed_at, hold_id""",
            tenant,
            hold_id,
            released,
        )
    return [Hold(**dict(row)) for row in rows]
