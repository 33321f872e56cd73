"""Re-encryption, the control plane's part: cut into chunks, put on the jobs topic, and answered when the last of them is done.

The command's step ends when the chunks are on record, so a shred of the tenant waits for no worker. `Jobs.follow_up`, a timer, does the rest.
"""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Final

import orjson

from sidecar.core.audit import scope_ref
from sidecar.core.command import Command, stored
from sidecar.core.errors import CommandRejected
from sidecar.core.model import ScopeKind
from sidecar.kafka.jobs import publish
from sidecar.postgres import commands, jobs, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import transaction
from sidecar.settings import Settings
from sidecar.steps import FINISHED, Steps, failpoint

AGAIN_AFTER: Final = timedelta(minutes=5)
"""A pending chunk goes onto the topic again: the topic may have been emptied or made anew."""


class Jobs:
    """The flow of `reencrypt`."""

    def __init__(self, settings: Settings, steps: Steps) -> None:
        self._settings, self._steps = settings, steps

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"reencrypt:{job.step or 'accepted'}")
        scope = command.scope
        if scope.kind is ScopeKind.SUBJECT:
            raise CommandRejected("unsupported_scope", "events are sealed anew by tenant, class or stream")
        async with self._steps.under_guard(scope.tenant) as connection:
            tenant = await tenants.lock(connection, scope.tenant)
            if tenant.state != "active":
                raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}")
            if command.into and not await jobs.is_copy(connection, scope.tenant, scope.id, command.into):
                raise CommandRejected("stream_exists", "the stream to copy into has events that are not the other one's")
            split = 0
            if command.split:
                split = await jobs.split_off(connection, scope)
                await tenants.next_epoch(connection, scope.tenant, shredding=False)
            chunks = await jobs.plan(
                connection, job.command_id, scope, plain=command.plain, into=command.into, suite=command.suite, key_version=command.key_version
            )
            into = scope_ref(replace(scope, id=command.into)).hex() if command.into else None
            facts = await self._steps.audited(connection, command, "events.reencrypt", chunks=chunks, split=split, plain=command.plain, into=into)
            planned = await commands.advance(connection, job, FINISHED, facts | {"chunks": chunks, "split": split}, finished=True)
        self._steps.settled(scope.tenant)
        return planned

    async def follow_up(self) -> None:
        """Chunks onto the topic, and the receipts of what is done."""
        now = self._steps.clock.now()
        async with transaction(self._steps.pool) as connection:
            waiting = await jobs.unpublished(connection, now - AGAIN_AFTER)
        if waiting:
            values = [orjson.dumps({"command_id": str(command_id), "chunk": chunk}) for command_id, chunk in waiting]
            await asyncio.to_thread(publish, self._settings, values)
            failpoint("reencrypt:published")
            async with transaction(self._steps.pool) as connection:
                await jobs.published(connection, waiting, now)
        async with transaction(self._steps.pool) as connection:
            for row in await jobs.all_done(connection):
                command = stored(row["payload"])
                job = Job(
                    command_id=row["command_id"], op=row["op"], tenant=row["tenant_id"], payload=row["payload"], step=FINISHED,
                    facts=row["result"] or {}, received_at=row["received_at"],
                )  # fmt: skip
                totals = next(iter(await jobs.progress(connection, job.command_id)), {})
                events = {"resealed": totals.get("resealed", 0), "left": totals.get("left_alone", 0), "chunks": totals.get("chunks", 0)}
                body = self._steps.receipt_of(job, command, "done", events=events, audit=job.facts["audit"])
                await commands.complete(connection, job.command_id, body)
