"""Readmit, step by step: → readmitted → done. A shredded scope takes events again, under new keys; nothing of before comes back.

The tenant's next generation, or the fence's end below tenant level; keys of older generations stay unusable, and records from before the
shred stay refused by its source end offsets.
"""

from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import commands, readmissions, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.shreds import Keys, Tenant
from sidecar.steps import FINISHED, Steps, failpoint


class Readmission:
    """The flow of `readmit`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"readmit:{job.step or 'accepted'}")
        return await (self._readmit(job, command) if job.step is None else self._readmitted(job, command))

    async def _readmit(self, job: Job, command: Command) -> Job:
        scope, steps = command.scope, self._steps
        async with steps.under_guard(scope.tenant) as connection:
            tenant = await shreds.lock_tenant(connection, scope.tenant)
            generation = await self._lift(connection, tenant, scope)
            facts = await steps.audited(connection, command, f"{scope.kind}.readmit", Keys())
            await steps.ledger.enter(connection, command, "readmit", at=steps.clock.now(), generation=generation)
            facts |= {"generation": generation, **steps.terminated(scope.tenant)}
            readmitted = await commands.advance(connection, job, "readmitted", facts)
        steps.settled(scope.tenant)
        return readmitted

    async def _lift(self, connection: Connection, tenant: Tenant, scope: Scope) -> int:
        """-> the generation that the tenant has now. Raises CommandRejected for what is not shredded."""
        if scope.kind is ScopeKind.TENANT:
            if tenant.state == "shredding":
                raise CommandRejected("shred_pending", "the tenant's shred is under way; readmit it after its receipt")
            if tenant.state != "shredded":
                raise CommandRejected("not_shredded", "the tenant is not shredded")
            return await readmissions.next_generation(connection, scope.tenant)
        if tenant.state != "active":
            raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}: it is what has to be readmitted")
        if not await readmissions.lift_fence(connection, scope):
            raise CommandRejected("not_shredded", f"the {scope.kind} is not shredded")
        if scope.kind is ScopeKind.STREAM and (erased := await readmissions.erased_class_of(connection, scope)) is not None:
            raise CommandRejected("class_shredded", f"the stream's class {erased} is shredded: it is what has to be readmitted")
        await shreds.next_epoch(connection, scope.tenant, shredding=False)
        return tenant.generation

    async def _readmitted(self, job: Job, command: Command) -> Job:
        instances = await self._steps.release(job) if job.facts.get("terminated") else None
        await self._steps.ledger.publish()
        failpoint("readmit:in ledger")
        body = self._steps.receipt_of(job, command, "done", instances=instances, audit=job.facts["audit"], generation=job.facts["generation"])
        async with transaction(self._steps.pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
