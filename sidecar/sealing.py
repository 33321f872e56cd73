"""Seal epochs: a new version of the KMS key takes over, what lives moves to it, the old version is destroyed, and backups from before open nothing.

    active → retiring       a roll: the next version wraps. No KEK is stored under this one any more (the trigger on tenant_keys)
    retiring → retired      every surviving KEK is under the next version; a tenant of which something was shredded got a new KEK
    retired → destroying    a keystore backup from after that is confirmed (or `kms.backup: none`): the KMS is asked
    destroying → destroyed  the KMS says destroyed. Disabled, soft-deleted, scheduled or away is not destroyed

Each step can be repeated after a crash, and by another process. One roller works at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final

from sidecar import telemetry
from sidecar.core.audit import tenant_ref
from sidecar.core.errors import AuthenticationFailed, Conflict, KmsUnavailable, SidecarError, Unavailable
from sidecar.core.kms import KmsVersion, VersionState
from sidecar.core.model import duration_ms
from sidecar.keys import KeyManagement, kek_row
from sidecar.ports import Clock, Kms
from sidecar.postgres import audit, seal_epochs
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import mapped
from sidecar.postgres.seal_epochs import SealEpoch
from sidecar.rekeying import Rekeying
from sidecar.servers import KmsSettings
from sidecar.steps import WRITER, failpoint

CHUNK: Final = 500
AT_ONCE: Final = 16
"""KMS calls side by side."""
_FIRST: Final = ("", 0, 0)


class Sealing:
    """The roller. Its KMS identity may add and destroy versions: the control plane's."""

    def __init__(self, pool: Pool, clock: Clock, kms: Kms, settings: KmsSettings) -> None:
        self._pool, self._clock, self._kms, self._settings = pool, clock, kms, settings
        self._keys = KeyManagement(kms, dedicated=settings.dedicated)

    async def roll(self, actor: str) -> bool:
        """A new seal epoch, or the one that was begun goes on, up to where a backup must be confirmed; False if another process is at it."""
        async with self._alone() as alone:
            if alone:
                for kms, tenant in await self._to_roll():
                    await self._begin(kms, tenant, actor)
                await self._advance(actor)
        return alone

    async def follow_up(self) -> None:
        """The timer: begin what is due, go on with what was begun, ask the KMS again."""
        async with self._alone() as alone:
            if alone:
                if self._settings.roll_every is not None:
                    age = timedelta(milliseconds=duration_ms(self._settings.roll_every))
                    for kms, tenant in await self._to_roll():
                        if await self._oldest(kms.uri) <= self._clock.now() - age:
                            await self._begin(kms, tenant, "timer")
                await self._advance("timer")

    async def confirm_backup(self, version: str | None, actor: str) -> list[str]:
        """For the epochs that are retired now, or one of them: a keystore backup from after them exists."""
        async with transaction(self._pool) as connection:
            confirmed = await seal_epochs.confirm_backup(connection, version, actor)
            if confirmed:
                await self._audited(connection, "backup_confirmed", actor, None, kms_key_versions=confirmed)
        return confirmed

    async def destroy_dedicated(self, epochs: Sequence[SealEpoch], actor: str) -> None:
        """Of a shredded tenant: destroy the KMS key that was its alone. Repeatable; what came of it is on the epochs' rows."""
        for epoch in epochs:
            if epoch.state in ("active", "retiring"):
                async with transaction(self._pool) as connection:
                    await seal_epochs.end(connection, epoch)
            await self._destroy(epoch, actor)

    async def renew_dedicated(self, tenant: str) -> None:
        """Before a tenant is readmitted: what was its own KMS key is on its way to destruction, so its next KEK gets a new version."""
        async with transaction(self._pool) as connection:
            epochs, lives = await seal_epochs.of_tenant(connection, tenant), await seal_epochs.has_keks(connection, tenant)
        if epochs and not lives:
            await self._succeed(await self._kms.dedicated(tenant), epochs, tenant, WRITER)

    # steps

    async def _begin(self, kms: Kms, tenant: str | None, actor: str) -> None:
        async with transaction(self._pool) as connection:
            epochs = await seal_epochs.of_key(connection, kms.uri)
        if not epochs or any(epoch.state == "retiring" for epoch in epochs):
            return  # it never wrapped anything; or a roll is under way
        await self._succeed(kms, epochs, tenant, actor)

    async def _succeed(self, kms: Kms, epochs: list[SealEpoch], tenant: str | None, actor: str) -> None:
        """The next version wraps; all before are retiring."""
        try:
            version = await kms.current()
            new = all(epoch.key_version != version for epoch in epochs)  # a roll ended right behind this: it is there, and nothing uses it
        except KmsUnavailable:
            new = False  # also when the newest is destroyed; if the KMS is away, it says so again
        if not new:
            version = await kms.add_version()
        failpoint("roll:added")
        async with transaction(self._pool) as connection:
            retiring = await seal_epochs.begin(connection, kms.uri, version, tenant)
            await self._audited(connection, "begin", actor, tenant, kms_uri=kms.uri, kms_key_version=version, retiring=retiring)
        failpoint("roll:begun")

    async def _advance(self, actor: str) -> None:
        """Every epoch as far as it can go now; what one waits for keeps no other from going on."""
        async with transaction(self._pool) as connection:
            epochs = await seal_epochs.under_way(connection)
        trouble: SidecarError | None = None
        for epoch in epochs:
            try:
                if epoch.state == "retiring":
                    await self._empty(epoch, actor)
                elif epoch.state == "destroying" or (epoch.state == "retired" and (epoch.backup_confirmed or self._settings.backup == "none")):
                    await self._destroy(epoch, actor)
            except SidecarError as error:
                telemetry.log.warning("a seal epoch waits", extra={"action": "roll_epoch", "kms_key_version": epoch.key_version, "error": error})
                trouble = error
        if trouble is not None:
            raise trouble

    async def _empty(self, epoch: SealEpoch, actor: str) -> None:
        """retiring → retired. Raises Unavailable if a KEK is left that cannot be moved."""
        async with transaction(self._pool) as connection:
            to_rekey = await seal_epochs.tenants_to_rekey(connection, epoch)
        rekeying = Rekeying(self._pool, self._clock, self._keys)
        for tenant in to_rekey:
            try:
                await rekeying.rekey(tenant, epoch, actor)
            except (AuthenticationFailed, Conflict) as error:
                telemetry.log.error("a tenant keeps its old key", extra={"action": "rekey", "tenant_ref": tenant_ref(tenant).hex(), "error": error})
        await self._rewrap_all(epoch, actor)
        failpoint("roll:rewrapped")
        async with transaction(self._pool) as connection:
            if await seal_epochs.retire(connection, epoch):
                await self._audited(connection, "retired", actor, epoch.tenant, kms_uri=epoch.kms_uri, kms_key_version=epoch.key_version)
                return
        raise Unavailable(f"seal epoch {epoch.key_version} is not empty yet: keys are in quarantine, or a tenant changed or could not be moved")

    async def _rewrap_all(self, epoch: SealEpoch, actor: str) -> None:
        after = _FIRST
        while True:
            async with transaction(self._pool) as connection:
                rows = await seal_epochs.keks_to_rewrap(connection, epoch, after, CHUNK)
            if not rows:
                return
            again = await self._rewrapped(rows)
            failpoint("roll:rewrapping")
            async with transaction(self._pool) as connection:
                moved = await seal_epochs.rewrap(connection, epoch, again)
                names = [[tenant_ref(tenant).hex(), generation, version] for tenant, generation, version in moved]
                await self._audited(connection, "rewrap", actor, None, kms_uri=epoch.kms_uri, kms_key_version=epoch.key_version, tenant_keys=names)
            after = (rows[-1]["tenant_id"], rows[-1]["generation"], rows[-1]["kek_version"])

    async def _rewrapped(self, rows: Sequence[Any]) -> list[Any]:
        """A key row that was altered is left where it is, and keeps its epoch from being retired."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(record: Any) -> Any:
            async with slots:
                try:
                    return await self._keys.rewrap_kek(kek_row(record))
                except AuthenticationFailed as error:
                    where = {"action": "rewrap", "tenant_ref": tenant_ref(record["tenant_id"]).hex(), "error": error}
                    telemetry.log.error("a tenant key cannot be opened", extra=where)
                    return None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(record)) for record in rows]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [row for task in tasks if (row := task.result()) is not None]

    async def _destroy(self, epoch: SealEpoch, actor: str) -> None:
        """→ destroying → destroyed, if the KMS says so. Raises Unavailable where something still lives under it."""
        if epoch.state == "destroyed":
            return
        if epoch.state != "destroying":
            async with transaction(self._pool) as connection:
                if not await seal_epochs.mark_destroying(connection, epoch):
                    raise Unavailable(f"seal epoch {epoch.key_version} is not empty: it stays")
                await self._audited(connection, "destroying", actor, epoch.tenant, kms_uri=epoch.kms_uri, kms_key_version=epoch.key_version)
        failpoint("roll:destroying")
        kms = self._kms if epoch.tenant is None else await self._kms.dedicated(epoch.tenant)
        found = await _ask(kms, epoch)
        failpoint("roll:destroyed")
        async with transaction(self._pool) as connection:
            if await seal_epochs.record(connection, epoch, found, self._clock.now()):
                await self._audited(connection, "destroyed", actor, epoch.tenant, kms_uri=epoch.kms_uri, kms_key_version=epoch.key_version)
            else:
                where = {"action": "roll_epoch", "kms_key_version": epoch.key_version, "state": found.state.value}
                telemetry.log.info("the KMS has not destroyed the version yet", extra=where)

    # what there is to do

    async def _to_roll(self) -> list[tuple[Kms, str | None]]:
        """The common key, and those of tenants that have one of their own and of which something was shredded."""
        async with transaction(self._pool) as connection:
            tenants = await seal_epochs.dedicated_to_roll(connection)
        return [(self._kms, None), *[(await self._kms.dedicated(tenant), tenant) for tenant in tenants]]

    async def _oldest(self, uri: str) -> datetime:
        """Since when the key's active epoch lasts; now, if it never wrapped anything."""
        async with transaction(self._pool) as connection:
            epochs = await seal_epochs.of_key(connection, uri)
        return min((epoch.created_at for epoch in epochs if epoch.state == "active"), default=self._clock.now())

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[bool]:
        """One roller at a time; only work is saved by that, every step stands another beside it."""
        async with transaction(self._pool) as connection:
            with mapped():
                alone = bool(await connection.fetchval("SELECT pg_try_advisory_xact_lock(7, 0)"))
            yield alone

    async def _audited(self, connection: Connection, what: str, actor: str, tenant: str | None, **details: Any) -> None:
        at = self._clock.now()
        await audit.append(connection, writer=WRITER, at=at, action=f"keys.roll_epoch.{what}", actor=actor, tenant=tenant, details=details)


async def _ask(kms: Kms, epoch: SealEpoch) -> KmsVersion:
    """For its destruction; where that is scheduled already, how it stands. One that was cancelled is asked for again."""
    if epoch.destroy_expected_at is not None:
        found = await kms.version(epoch.key_version, scheduled=epoch.destroy_expected_at)
        if found.state in (VersionState.PENDING, VersionState.DESTROYED):
            return found
    return await kms.destroy(epoch.key_version)
