"""Clean-up: retired key versions that no stored event or dead letter needs are destroyed. What they sealed is gone already, or was sealed anew.

An instance may still have such a version in hand, warm, about to seal with it. So the last look and the destruction happen under the
exclusive guard, which no batch under way survives unseen, and the tenant epoch moves, so that every batch sealed before is sealed again.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal
from uuid import UUID

from sidecar import telemetry
from sidecar.core.keys import Keys
from sidecar.ports import Clock
from sidecar.postgres import audit, guard, tenants, unused_keys
from sidecar.postgres.commands import TIMER_ISSUER
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.unused_keys import Version
from sidecar.steps import WRITER

CHUNK: Final = 2000
"""Versions looked at, or destroyed, at a time: the guard is held for no more than that."""

Outcome = Literal["destroyed", "unneeded", "in_use", "busy"]
"""unneeded: would be destroyed; in_use: kept, an event names it that the history does not know of; busy: kept, a batch did not let go in time."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of a retired key version."""

    tenant: str
    version: Version
    outcome: Outcome


class CleanUp:
    """Runs with the control plane's database role, as its timer or from the command line; any number side by side."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock

    async def run(self, *, tenant: str | None = None, older_than: timedelta, dry_run: bool = False, actor: str = TIMER_ISSUER) -> list[Cleaned]:
        """What was found of versions retired longer ago than `older_than`; those that events need are not listed. Raises StoreUnavailable."""
        before = self._clock.now() - older_than
        async with transaction(self._pool) as connection:
            waiting = await unused_keys.tenants(connection, before, tenant)
        found: list[Cleaned] = []
        for name in waiting:
            at: tuple[UUID, int] | None = (UUID(int=0), 0)
            while at is not None:
                async with transaction(self._pool) as connection:
                    versions, at = await unused_keys.candidates(connection, name, before, at, CHUNK)
                    used = await unused_keys.in_use(connection, name, versions) if versions else set()
                unneeded = [v for v in versions if v.in_envelopes not in used]
                found += [Cleaned(name, v, "in_use") for v in versions if v.in_envelopes in used]
                if unneeded:
                    outcome: Outcome = "unneeded" if dry_run else "destroyed"
                    destroyed = unneeded if dry_run else await self._destroy(name, before, unneeded, actor)
                    found += [Cleaned(name, v, outcome) for v in destroyed or ()]
                    found += [Cleaned(name, v, "busy") for v in unneeded if destroyed is None]
        self._report(found)
        return found

    async def _destroy(self, tenant: str, before: Any, versions: list[Version], actor: str) -> list[Version] | None:
        """None if a batch did not let go of the guard in time: the next run tries again, an instance is not ended for this."""
        async with transaction(self._pool) as connection:
            if not await self._take_guard(connection, tenant):
                return None
            await tenants.lock(connection, tenant)
            destroyed = await unused_keys.destroy(connection, tenant, before, versions)
            if destroyed:
                await self._next_epoch(connection, tenant)
                keys = Keys.of([f"{v.key_id}/{v.key_version}" for v in destroyed], [v.fingerprint for v in destroyed])
                await audit.append(
                    connection, writer=WRITER, at=self._clock.now(), action="keys.clean_up", actor=actor, tenant=tenant, details=keys.in_audit()
                )
        return destroyed

    async def _take_guard(self, connection: Connection, tenant: str) -> bool:
        return await guard.take(connection, tenant)

    async def _next_epoch(self, connection: Connection, tenant: str) -> None:
        await tenants.next_epoch(connection, tenant, shredding=False)

    def _report(self, found: list[Cleaned]) -> None:
        counts = {outcome: sum(c.outcome == outcome for c in found) for outcome in ("destroyed", "in_use", "busy")}
        if any(counts.values()):
            telemetry.log.info("keys cleaned up", extra={"action": "clean_up", **counts})
        if counts["in_use"]:
            telemetry.log.error(
                "events name keys that the key history does not say were used there: nothing is lost, but report it",
                extra={"action": "clean_up", "versions": counts["in_use"]},
            )
