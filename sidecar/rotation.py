"""Rotate, step by step: → marked → done. It writes a mark, no data: a key's next version is made at its scope's next write."""

from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected
from sidecar.postgres import commands, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import transaction
from sidecar.postgres.shreds import Keys
from sidecar.steps import FINISHED, Steps, failpoint


class Rotation:
    """The flow of `rotate`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"rotate:{job.step or 'accepted'}")
        return await (self._mark(job, command) if job.step is None else self._rotated(job, command))

    async def _mark(self, job: Job, command: Command) -> Job:
        """None of the marked keys seals anything after this commit: batches verify the tenant epoch under the guard."""
        scope = command.scope
        async with self._steps.under_guard(scope.tenant) as connection:
            tenant = await shreds.lock_tenant(connection, scope.tenant)
            if tenant.state != "active":
                raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}")
            names = await shreds.retire(connection, scope, command.older_than)
            await shreds.next_epoch(connection, scope.tenant, shredding=False)
            keys = Keys(names=names)
            facts = {"keys": {"count": len(names)}, **self._steps.terminated(scope.tenant)}
            facts |= await self._steps.audited(connection, command, "keys.rotate", keys)
            marked = await commands.advance(connection, job, "marked", facts)
        self._steps.settled(scope.tenant)
        return marked

    async def _rotated(self, job: Job, command: Command) -> Job:
        instances = await self._steps.release(job) if job.facts.get("terminated") else None
        failpoint("rotate:released")
        body = self._steps.receipt_of(job, command, "done", keys=job.facts["keys"], instances=instances, audit=job.facts["audit"])
        async with transaction(self._steps.pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
