"""Legal holds: `hold` → placed → done, `release` → released → done; the act is on the ledger topic before its receipt.

Both lock the tenant's row, as a shred does before it fences: of a hold and a shred at the same moment one comes first, and the other is
refused. A hold that has its receipt is never overrun. It keeps keys from being destroyed, so what they protect stays readable;
rotation and clean-up go on under it, since they destroy no key that a stored event needs.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope
from sidecar.postgres import commands, holds, replays, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.tenants import Tenant
from sidecar.steps import FINISHED, Steps, failpoint


class Holding:
    """The flow of `hold`, whose command's id is the hold's, and of `release`: of the hold that is named, or else of all holds on just this scope."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"{job.op}:{job.step or 'accepted'}")
        if job.step is None:
            return await (self._place(job, command) if job.op == "hold" else self._release(job, command))
        return await self._done(job, command)

    async def _place(self, job: Job, command: Command) -> Job:
        steps, scope, now = self._steps, command.scope, self._steps.clock.now()
        async with _locked(steps, scope) as (connection, tenant):
            await holds.refuse_gone(connection, scope, now)
            await holds.place(connection, scope, hold_id=command.command_id, reason=command.reason, by=command.requested_by, at=now)
            facts = await steps.audited(connection, command, "hold.place") | {"holds": [str(command.command_id)]}
            await steps.ledger.enter(connection, command, "hold", at=now, generation=tenant.generation)
            return await commands.advance(connection, job, "placed", facts)

    async def _release(self, job: Job, command: Command) -> Job:
        steps, scope, now = self._steps, command.scope, self._steps.clock.now()
        async with _locked(steps, scope) as (connection, tenant):
            found = await holds.release(connection, scope, command.hold_id, by=command.requested_by, at=now)
            if not found:
                raise CommandRejected("unknown_hold", "there is no such hold in force")
            ids = sorted(map(str, found))
            facts = await steps.audited(connection, command, "hold.release", holds=ids) | {"holds": ids}
            await steps.ledger.enter(connection, command, "release", at=now, generation=tenant.generation, undoes=command.hold_id)
            return await commands.advance(connection, job, "released", facts)

    async def _done(self, job: Job, command: Command) -> Job:
        steps = self._steps
        await steps.ledger.publish()
        body = steps.receipt_of(job, command, "done", holds=job.facts["holds"], audit=job.facts["audit"])
        async with transaction(steps.pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)


@asynccontextmanager
async def _locked(steps: Steps, scope: Scope) -> AsyncIterator[tuple[Connection, Tenant]]:
    async with transaction(steps.pool) as connection:
        await connection.execute("SET LOCAL synchronous_commit = on")
        locked = await tenants.lock(connection, scope.tenant)
        await replays.adopt(connection, scope)  # a name that came up for the first time since a restore
        yield connection, locked
