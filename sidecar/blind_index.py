"""Search by the value of a sealed field, and what a shred must remove so that nothing of its scope is found.

A row of the index counts only while its event's key lives: from a shred's receipt on the search finds nothing of the scope. The rows
themselves, and what is left of them in the table's pages, are residue of the shred: `complete` waits for them.
"""

from dataclasses import dataclass
from typing import Any, Final

import orjson

from sidecar.core.blind_index import IndexKey, searched
from sidecar.core.errors import ConfigurationError, MalformedRecord
from sidecar.core.keys import TenantState
from sidecar.core.view import guard_stripe
from sidecar.keys import KeyManagement, dek_row, kek_row, open_dek
from sidecar.ledger import LedgerGate
from sidecar.postgres import blind_index, residue
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.keystore import KeyStore
from sidecar.postgres.residue import Entry, Look, Planned

PLACE: Final = "blind index"
CHUNK: Final = 5000
_LONGEST_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Found:
    """An event that holds the value."""

    stream: str
    position: int


class BlindIndex:
    """Reads as `EventStore` does: under the guard. Raises Unavailable, UnknownKey, ConfigurationError for a field that no policy indexes."""

    def __init__(self, pool: Pool, keys: KeyManagement, ledger: LedgerGate) -> None:
        self._pool, self._keys, self._ledger = pool, keys, ledger

    async def find_by_field(self, tenant: str, field: str, value: Any, *, after: Found | None = None, limit: int = 1000) -> list[Found]:
        """Events of the tenant, of any class, whose sealed field has this value; by stream and position, behind `after`.

        `field` is the pointer as policy spells it, wildcards and all. Erased events are not found. Events from before the field was
        indexed are not in it. One KMS call.
        """
        wanted = _json(value)
        while True:
            epoch, keys = await self._open(tenant)
            try:
                async with transaction(self._pool) as connection:
                    await connection.execute("SELECT pg_advisory_xact_lock_shared(1, $1)", guard_stripe(tenant))
                    if await connection.fetchval("SELECT epoch FROM tenants WHERE tenant_id = $1", tenant) != epoch:
                        continue
                    tokens = [key.token(field, wanted) for key in keys]
                    start = ("", 0) if after is None else (after.stream, after.position)
                    rows = await blind_index.find(connection, tenant, tokens, start, limit) if tokens else []
                    if not rows and not await blind_index.is_indexed(connection, tenant, field):
                        raise ConfigurationError(f"no policy indexes {field}", where=f"tenant {tenant}", mend="`blind_index` of a policy names it")
            finally:
                for key in keys:
                    key.destroy()
            return [Found(*row) for row in rows]

    async def _open(self, tenant: str) -> tuple[int | None, list[IndexKey]]:
        """-> the epoch, and every version of the index key as of it; none of a tenant that is gone or was never indexed."""
        async with transaction(self._pool) as connection:
            await self._ledger.check(connection)
            epoch = await connection.fetchval("SELECT epoch FROM tenants WHERE tenant_id = $1", tenant)
            versions = await blind_index.keys(connection, tenant)
        rows = [row for row in await KeyStore(self._pool).tenants([tenant])]
        if not rows or rows[0]["state"] != TenantState.ACTIVE:
            return (rows[0]["epoch"] if rows else None), []
        if rows[0]["epoch"] != epoch:
            return -1, []  # the tenant changed in between: again
        keks = {row["kek_version"]: await self._keys.open_kek(kek_row(row)) for row in rows if row["kek_version"] is not None} if versions else {}
        try:
            return epoch, [open_dek(keks, dek_row(row)).into_index_key() for row in versions]
        finally:
            for kek in keks.values():
                kek.destroy()


def _json(value: Any) -> bytes:
    try:
        return searched(orjson.dumps(value).decode())
    except TypeError:
        raise MalformedRecord("an index finds texts, numbers and truth values") from None


# ── residue ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_index(has_rows: bool) -> list[Planned]:
    """Kind `database`, as the dead rows of key tables are: the log and the backups wait for it too."""
    return [Planned(kind="database", place=PLACE)] if has_rows else []


class IndexRows:
    """Removes the rows of a shred's events, a chunk at a time, and then what is left of them in the table's pages."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def act(self, entry: Entry) -> Look:
        scope, again = entry.command.scope, min(1.5 ** min(entry.attempts, 20), _LONGEST_SECONDS)
        async with transaction(self._pool) as connection:
            if await residue.pending(connection, entry.command_id, "grace"):
                return Look(again=again, details={"reason": "waits for the end of the grace"})
            removed = await blind_index.remove_gone(connection, scope, CHUNK)
            so_far = int(entry.details.get("removed", 0)) + removed
        if removed:
            return Look(again=0.0, details={"removed": so_far})
        async with transaction(self._pool) as connection:
            details = {"removed": so_far, "xid": entry.details.get("xid") or await residue.own_xid(connection)}
            held_by = await residue.old_snapshots(connection, int(details["xid"]))
            since = entry.details.get("unseen_since") or await residue.unseen_since(connection)
        if held_by:
            return Look(again=again, details=details | {"held_by": held_by})
        tables = await residue.vacuum(self._pool, ("blind_index",), since)
        if any("may not" in said for said in tables.values()):
            return Look(again=again, details=details | {"tables": tables, "unseen_since": since})
        return Look(again=None, details=details | {"tables": tables})
