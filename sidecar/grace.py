"""Grace: a shred's keys are out of everybody's reach at once, and destroyed only when its grace ends.

In between their wrapped bytes lie in `quarantined_keys`, which nothing but this module reads: the data plane's and the readers' roles
need no right to it. A restore (readmit with `restore`) brings them back; a legal hold that was placed meanwhile keeps them there.
"""

from datetime import datetime
from uuid import UUID

from sidecar import telemetry
from sidecar.core.errors import CommandRejected
from sidecar.core.keys import Keys
from sidecar.core.model import Scope
from sidecar.postgres import quarantine, tenants
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.holds import overlapping, refuse_held
from sidecar.postgres.residue import Entry, Look
from sidecar.steps import WRITER, Steps, failpoint

LONGEST_SECONDS = 300.0


class Grace:
    """Kind `grace` of residue: the keys of one command in quarantine."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def act(self, entry: Entry) -> Look:
        """Raises CommandRejected while a hold is in force: what was set aside stays where it is."""
        until = entry.until
        left = 0.0 if until is None else (until - self._steps.clock.now()).total_seconds()
        if left > 0:
            return Look(again=min(left, LONGEST_SECONDS), until=until, details=entry.details)
        await _destroy(self._steps, entry.command_id, entry.command.scope, entry.command.requested_by)
        failpoint("grace:destroyed")
        return Look(again=None, until=until, details=entry.details)


async def destroy_unwatched(steps: Steps) -> None:
    """What a replay of the ledger set aside and whose grace is over: there is no command here whose residue it would be."""
    async with transaction(steps.pool) as connection:
        due = await quarantine.unwatched(connection, steps.clock.now())
    for command_id, scope in due:
        try:
            await _destroy(steps, command_id, scope, WRITER)
        except CommandRejected as held:
            telemetry.log.info("a grace waits", extra={"action": "destroy", "command_id": command_id, "error": held})


async def _destroy(steps: Steps, command_id: UUID, scope: Scope, actor: str) -> None:
    """Raises CommandRejected while a hold is in force."""
    async with transaction(steps.pool) as connection:
        await tenants.lock(connection, scope.tenant)
        await refuse_held(connection, scope)
        keys = await quarantine.destroy(connection, command_id)
        if keys.count:  # else a kill came between this and the record of it, or a later shred went first
            await steps.note(connection, command_id, scope, f"{scope.kind}.destroy", actor, keys.in_audit())


async def restore(connection: Connection, scope: Scope, now: datetime) -> Keys:
    """Give a scope within its grace its old keys back; -> which. The caller holds the guard, lifts the fence, audits, and keeps the generation.

    Raises CommandRejected (`grace_over`) when nothing of exactly this scope is in quarantine, or its time there is over and no hold made it
    longer: this may be an older database, and the keys destroyed, with a receipt. Conflict while the KMS key that wraps it is being replaced.
    Its view records are gone all the same: the tombstones did not wait.
    """
    until = await quarantine.ends(connection, scope)
    if until is not None and (until > now or await overlapping(connection, scope)):
        keys = await quarantine.restore(connection, scope)
        if keys.count:
            return keys
    raise CommandRejected("grace_over", "nothing can be brought back: the grace has ended, or there was none")
