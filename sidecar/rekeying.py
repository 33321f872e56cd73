"""A new KEK for a tenant of which a stream, class or person was shredded: the old KEK goes, and with it what an old backup has of their keys.

made → (chunks) → done     both KEKs are live in between; a restart goes on with the newest
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from sidecar.core.errors import Conflict
from sidecar.core.keys import Kek, KekRow
from sidecar.keys import KeyManagement, dek_row, kek_row, rewrap_dek
from sidecar.ports import Clock
from sidecar.postgres import audit, guard, rekeys, tenants
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.rekeys import Rewrapped
from sidecar.postgres.seal_epochs import SealEpoch
from sidecar.steps import WRITER, failpoint

CHUNK: Final = 2000
_FIRST: Final = (UUID(int=0), 0)


class Rekeying:
    """Repeatable at every point. Raises Unavailable, Conflict, AuthenticationFailed (a key row that was altered: then the old KEK stays)."""

    def __init__(self, pool: Pool, clock: Clock, keys: KeyManagement) -> None:
        self._pool, self._clock, self._keys = pool, clock, keys

    async def rekey(self, tenant: str, retiring: SealEpoch, actor: str) -> None:
        """Nothing of the tenant is under the retiring epoch afterwards, if it is active and no key of it is in quarantine."""
        rows = await self._rows(tenant)
        if not rows:
            return
        newest = kek_row(rows[-1])
        if (newest.kms_uri, newest.kms_key_version) == (retiring.kms_uri, retiring.key_version):
            newest = await self._start(newest, actor)
        failpoint("rekey:made")
        while not await self._finish(newest, await self._move(newest, actor), actor):
            pass

    async def _rows(self, tenant: str) -> list[Any]:
        async with transaction(self._pool) as connection:
            return await rekeys.keks(connection, tenant)

    async def _start(self, last: KekRow, actor: str) -> KekRow:
        kek, row = await self._keys.make_kek(last.tenant, last.generation, last.version + 1)
        kek.destroy()
        (await self._keys.open_kek(row)).destroy()  # before anything depends on it
        async with guard.exclusively(self._pool, last.tenant, set()) as connection:
            tenant = await tenants.lock(connection, last.tenant)
            if (tenant.state, tenant.generation) != ("active", last.generation):
                raise Conflict("the tenant changed meanwhile")
            await rekeys.start(connection, row)
            await tenants.next_epoch(connection, last.tenant, shredding=False)
            await self._audited(connection, "begin", row, actor, kms_uri=row.kms_uri, kms_key_version=row.kms_key_version)
        return row

    async def _move(self, newest: KekRow, actor: str) -> int:
        """Re-wrap every DEK that an older KEK wraps; -> the tenant epoch in which none was left."""
        rows = await self._rows(newest.tenant)
        keks = {row["kek_version"]: await self._keys.open_kek(kek_row(row)) for row in rows}
        if newest.version not in keks:
            raise Conflict("the tenant changed meanwhile")
        try:
            after, left = _FIRST, 0
            while True:
                async with transaction(self._pool) as connection:
                    deks = await rekeys.deks_below(connection, newest, after, CHUNK)
                if not deks and not left:
                    return int(rows[-1]["epoch"])
                if not deks:
                    after, left = _FIRST, 0  # some were locked by somebody: again from the beginning
                    await asyncio.sleep(0.05)
                    continue
                again = await asyncio.to_thread(_rewrapped, keks, deks, keks[newest.version])
                async with transaction(self._pool) as connection:
                    moved = await rekeys.rewrap(connection, newest, again)
                    if moved:
                        await self._audited(connection, "rewrap", newest, actor, count=moved)
                    left += len(deks) - moved
                after = (deks[-1]["key_id"], deks[-1]["key_version"])
                failpoint("rekey:moving")
        finally:
            for kek in keks.values():
                kek.destroy()

    async def _finish(self, newest: KekRow, epoch: int, actor: str) -> bool:
        """False if the tenant's epoch moved since the last look: then a key may have come back under an older KEK."""
        failpoint("rekey:moved")
        async with guard.exclusively(self._pool, newest.tenant, set()) as connection:
            tenant = await tenants.lock(connection, newest.tenant)
            if (tenant.state, tenant.generation) != ("active", newest.generation):
                return True  # shredded: there is nothing left to move
            if tenant.epoch != epoch:
                return False
            gone = await rekeys.finish(connection, newest)
            if gone:
                await tenants.next_epoch(connection, newest.tenant, shredding=False)
                await self._audited(connection, "done", newest, actor, destroyed=gone)
        return True

    async def _audited(self, connection: Connection, what: str, kek: KekRow, actor: str, **more: Any) -> None:
        details = {"generation": kek.generation, "version": kek.version, **more}
        at = self._clock.now()
        await audit.append(connection, writer=WRITER, at=at, action=f"keys.rekey.{what}", actor=actor, tenant=kek.tenant, details=details)


def _rewrapped(keks: dict[int, Kek], deks: Sequence[Any], under: Kek) -> list[Rewrapped]:
    """In a thread: a chunk is tens of milliseconds of arithmetic."""
    out = []
    for record in deks:
        row = dek_row(record)
        wrapped = rewrap_dek(keks, row, under)
        out.append(Rewrapped(key_id=row.name.key_id, version=row.name.version, was_under=row.kek_version, wrapped=wrapped))
    return out
