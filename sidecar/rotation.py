"""Rotate, step by step: [→ marking …] → marked → done. It writes a mark, no data: a key's next version is made at its scope's next write.

Of many keys all but the last few are marked in chunks, while traffic runs: the guard stalls it, and a mark of 200,000 keys takes seconds. Who has a
marked key in hand may seal with it until the tenant's epoch moves, which is before the receipt.
"""

from datetime import datetime
from typing import Any, Final

from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected
from sidecar.core.keys import Keys
from sidecar.core.model import ScopeKind
from sidecar.postgres import commands, rotations, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import transaction
from sidecar.steps import FINISHED, Steps, failpoint

CHUNK: Final = 2000
"""Keys that are marked at once, and under the guard at most (measured: 50 to 100 ms for each thousand on a loaded machine)."""


class Rotation:
    """The flow of `rotate`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def step(self, job: Job, command: Command) -> Job:
        failpoint(f"rotate:{job.step or 'accepted'}")
        if job.step in (None, "marking"):
            return await self._mark_some(job, command) or await self._mark(job, command)
        return await self._rotated(job, command)

    async def _mark_some(self, job: Job, command: Command) -> Job | None:
        """The next chunk of keys from before the rotation; None: few are left. What a chunk costs does not depend on how many there are."""
        scope, after = command.scope, job.facts.get("marked_to", ["", ""])
        if after is None or scope.kind in (ScopeKind.STREAM, ScopeKind.SUBJECT):
            return None
        async with transaction(self._steps.pool) as connection:
            since = job.facts.get("since") or (await commands.database_time(connection)).isoformat()
            bound = command.older_than or datetime.fromisoformat(since)
            if job.step is None and not await rotations.more_live_than(connection, scope, bound, CHUNK):
                return None
            names, last = await rotations.retire_some(connection, scope, bound, after, CHUNK)
            so_far = _so_far(job) + len(names)
            if names:
                await self._steps.audited(connection, command, "keys.rotate", Keys.of(names), so_far=so_far)
            return await commands.advance(connection, job, "marking", {"since": since, "keys": {"count": so_far}, "marked_to": last})

    async def _mark(self, job: Job, command: Command) -> Job:
        """None of the marked keys seals anything after this commit: batches verify the tenant epoch under the guard."""
        scope, since = command.scope, job.facts.get("since")
        async with self._steps.under_guard(scope.tenant) as connection:
            tenant = await tenants.lock(connection, scope.tenant)
            if tenant.state != "active":
                raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}")
            names = await rotations.retire(connection, scope, command.older_than or (since and datetime.fromisoformat(since)))
            await tenants.next_epoch(connection, scope.tenant, shredding=False)
            facts: dict[str, Any] = {"keys": {"count": _so_far(job) + len(names)}, **self._steps.terminated(scope.tenant)}
            facts |= await self._steps.audited(connection, command, "keys.rotate", Keys.of(names))
            marked = await commands.advance(connection, job, "marked", facts)
        self._steps.settled(scope.tenant)
        return marked

    async def _rotated(self, job: Job, command: Command) -> Job:
        instances = await self._steps.release(job) if job.facts.get("terminated") else None
        failpoint("rotate:released")
        body = self._steps.receipt_of(job, command, "done", keys=job.facts["keys"], instances=instances, audit=job.facts["audit"])
        async with transaction(self._steps.pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)


def _so_far(job: Job) -> int:
    return int(job.facts.get("keys", {"count": 0})["count"])
