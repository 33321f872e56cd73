"""Readmit, step by step: → readmitted → done. A shredded scope takes events again, under new keys; nothing of before comes back.

The tenant's next generation, or the fence's end below tenant level; keys of older generations stay unusable, and records from before the
shred stay refused by its source end offsets. Only `restore`, within the shred's grace, takes the shred itself back.
"""

from collections.abc import Awaitable, Callable
from uuid import UUID

from sidecar import grace
from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected
from sidecar.core.keys import Keys
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import commands, quarantine, readmissions, replays, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.tenants import Tenant
from sidecar.steps import FINISHED, Steps, failpoint


class Readmission:
    """The flow of `readmit`."""

    def __init__(self, steps: Steps, renew: Callable[[str], Awaitable[None]]) -> None:
        """`renew`: makes a KMS key that was the tenant's alone fit to wrap again."""
        self._steps, self._renew = steps, renew

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"readmit:{job.step or 'accepted'}")
        return await (self._readmit(job, command) if job.step is None else self._readmitted(job, command))

    async def _readmit(self, job: Job, command: Command) -> Job:
        scope, steps = command.scope, self._steps
        if scope.kind is ScopeKind.TENANT and not command.restore:
            await self._renew(scope.tenant)
        async with steps.under_guard(scope.tenant) as connection:
            tenant = await tenants.lock(connection, scope.tenant)
            await replays.adopt(connection, scope)
            await self._refuse(connection, tenant, scope)
            undone: list[UUID | None] = [None]
            generation, keys, act = tenant.generation, Keys.of(), "readmit"
            if command.restore:
                found = await quarantine.commands_of(connection, scope)
                keys, act = await grace.restore(connection, scope, steps.clock.now()), "restore"
                await readmissions.take_back(connection, scope, found)
                undone = [*found]
            elif scope.kind is ScopeKind.TENANT:
                generation = await readmissions.next_generation(connection, scope.tenant)
            else:
                await readmissions.lift_fence(connection, scope)
            await tenants.next_epoch(connection, scope.tenant, shredding=False)
            facts = await steps.audited(connection, command, f"{scope.kind}.{act}", keys)
            for shred in undone:
                await steps.ledger.enter(connection, command, "readmit", at=steps.clock.now(), generation=generation, undoes=shred)
            facts |= {"generation": generation, "old_data": "restored" if command.restore else "unreadable", **steps.terminated(scope.tenant)}
            readmitted = await commands.advance(connection, job, "readmitted", facts)
        steps.settled(scope.tenant)
        return readmitted

    async def _refuse(self, connection: Connection, tenant: Tenant, scope: Scope) -> None:
        """Raises CommandRejected for what is not shredded, or lies in what is."""
        if scope.kind is ScopeKind.TENANT:
            if tenant.state == "shredding":
                raise CommandRejected("shred_pending", "the tenant's shred is under way; readmit it after its receipt")
            if tenant.state != "shredded":
                raise CommandRejected("not_shredded", "the tenant is not shredded")
            return
        if tenant.state != "active":
            raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}: it is what has to be readmitted")
        if not await readmissions.is_fenced(connection, scope):
            raise CommandRejected("not_shredded", f"the {scope.kind} is not shredded")
        if scope.kind is ScopeKind.STREAM and (erased := await readmissions.erased_class_of(connection, scope)) is not None:
            raise CommandRejected("class_shredded", f"the stream's class {erased} is shredded: it is what has to be readmitted")

    async def _readmitted(self, job: Job, command: Command) -> Job:
        instances = await self._steps.release(job) if job.facts.get("terminated") else None
        await self._steps.ledger.publish()
        failpoint("readmit:in ledger")
        body = self._steps.receipt_of(job, command, "done", instances=instances, audit=job.facts["audit"], generation=job.facts["generation"])
        async with transaction(self._steps.pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
