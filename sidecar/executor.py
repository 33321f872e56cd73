"""Carries out: the one process that holds the deployment's lock works off the inbox, per tenant one command after another, tenants side by side.

What cannot be reached is waited for, with growing pauses and for ever: nothing is lost, and no tenant waits for another's trouble.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from sidecar import telemetry
from sidecar.core.command import Command, receipt, receipt_id, stored
from sidecar.core.errors import CommandRejected, Conflict, Unavailable
from sidecar.inbox import log_status
from sidecar.postgres import audit, commands, ledger, readmissions
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Pool, transaction
from sidecar.shredding import NOT_IN_LEDGER
from sidecar.steps import FINISHED, WRITER, Flow, Foreground
from sidecar.waiting import Backoff, woken

AT_ONCE: Final = 4
"""Commands carried out side by side, of different tenants."""


class Executor:
    """Works off the inbox. One task per tenant that has something to do; at most AT_ONCE of them take a step at a time."""

    def __init__(self, pool: Pool, flows: Mapping[str, Flow], wake_outbox: Callable[[], None], foreground: Foreground) -> None:
        self._pool, self._flows, self._wake_outbox, self._foreground = pool, flows, wake_outbox, foreground
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tenants: dict[str, asyncio.Task[None]] = {}
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; then no step is under way any more."""
        try:
            while True:
                self.wake.clear()
                try:
                    async with transaction(self._pool) as connection:
                        waiting = await commands.tenants_waiting(connection)
                    for tenant in waiting:
                        if tenant not in self._tenants:
                            task = asyncio.create_task(self._work_off(tenant))
                            self._tenants[tenant] = task
                            task.add_done_callback(lambda _, name=tenant: self._finished(name))  # type: ignore[misc]
                except Unavailable as error:
                    telemetry.log.warning("executor waits", extra={"action": "execute", "error": error})
                await woken(self.wake)
        finally:
            tasks = list(self._tenants.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, tenant: str) -> None:
        del self._tenants[tenant]
        self.wake.set()  # a command may have come after the last look

    async def _work_off(self, tenant: str) -> None:
        """All of a tenant's commands. After each step the choice is made anew, so that a shred need not wait for a rotation's retries."""
        backoff = Backoff()
        while True:
            try:
                async with self._slots:
                    async with transaction(self._pool) as connection:
                        job = await commands.next_job(connection, tenant)
                    if job is None:
                        return
                    with self._foreground.command():
                        await self._carry_out(job)
                backoff = Backoff()
                continue
            except (Unavailable, Conflict) as error:
                telemetry.retries.labels("command").inc()
                telemetry.log.warning("command waits", extra={"action": "execute", "tenant": tenant, "error": error})
            except Exception as error:
                # Nothing says that it can never be done, so it is never given up; the log says what stands in the way.
                telemetry.retries.labels("command").inc()
                telemetry.log.error("command fails", extra={"action": "execute", "tenant": tenant}, exc_info=error)
            await backoff.wait()

    async def _carry_out(self, job: Job) -> None:
        try:
            command = stored(job.payload)
        except CommandRejected as error:
            return await self._give_up(job, error, "failed", None)
        if await self._carried_out_before(job, command):
            known = CommandRejected("carried_out_before", "the ledger has this command: it was carried out before the database was restored")
            return await self._give_up(job, known, "rejected", command)
        while job.step != FINISHED:
            before = job
            try:
                job = await self._flow(job).step(job, command)
            except CommandRejected as error:
                return await self._give_up(before, error, "rejected", command)
            if job.step in ("inaccessible", FINISHED):
                self._wake_outbox()
            if job.step == before.step:
                return  # one of many chunks: other tenants want the slot too
        status = {"shred": "done" if command.dry_run else "inaccessible", "reencrypt": "accepted"}.get(job.op, "done")
        self._settled(job, status)

    async def _carried_out_before(self, job: Job, command: Command) -> bool:
        """A restored database knows nothing of it, or has it still to do: again, it would undo what came since, say a readmission."""
        async with transaction(self._pool) as connection:
            if job.step in NOT_IN_LEDGER:
                return await ledger.knows(connection, job.command_id)
            return job.op == "shred" and not await readmissions.stays_shredded(connection, command.scope, job.command_id)

    def _flow(self, job: Job) -> Flow:
        if job.op not in self._flows:
            raise CommandRejected("unsupported_op", f"this release does not carry out {job.op}")
        return self._flows[job.op]

    async def _give_up(self, job: Job, error: CommandRejected, status: Any, command: Command | None) -> None:
        """The command is refused by what it found (or can no longer be read): a receipt says so, nothing was changed."""
        scope = command.scope.to_json() if command else None
        identity = receipt_id(job.command_id, status)
        body = receipt(
            identity, command_id=job.command_id, op=job.op, scope=scope, status=status, error=error,
            accepted_at=job.facts.get("accepted_at"), **error.facts,
        )  # fmt: skip
        async with transaction(self._pool) as connection:
            await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
            details = {"command_id": str(job.command_id), "op": job.op, "error": error.code} | error.facts
            now = datetime.now(job.received_at.tzinfo)
            await audit.append(connection, writer=WRITER, at=now, action=f"command.{status}", actor=WRITER, tenant=job.tenant, details=details)
        self._wake_outbox()
        self._settled(job, status, error)

    def _settled(self, job: Job, status: str, error: CommandRejected | None = None) -> None:
        seconds = (datetime.now(job.received_at.tzinfo) - job.received_at).total_seconds()
        telemetry.command_seconds.labels(job.op).observe(max(0.0, seconds))
        log_status(job.op, status, job.command_id, error)
