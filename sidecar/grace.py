"""Grace: a shred's keys are out of everybody's reach at once, and destroyed only when its grace ends.

In between their wrapped bytes lie in `quarantined_keys`, which nothing but this module reads: the data plane's and the readers' roles
need no right to it. A restore (readmit with `restore`) brings them back; a legal hold that was placed meanwhile keeps them there.
"""

from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope
from sidecar.postgres import quarantine, shreds
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.holds import refuse_held
from sidecar.postgres.residue import Entry, Look
from sidecar.postgres.shreds import Keys
from sidecar.steps import Steps, failpoint

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
        command, scope = entry.command, entry.command.scope
        async with transaction(self._steps.pool) as connection:
            await shreds.lock_tenant(connection, scope.tenant)
            await refuse_held(connection, scope)
            keys = await quarantine.destroy(connection, entry.command_id)
            if keys.names:  # else a kill came between this and the record of it, or a later shred went first
                await self._steps.audited(connection, command, f"{scope.kind}.destroy", keys)
        failpoint("grace:destroyed")
        return Look(again=None, until=until, details=entry.details)


async def restore(connection: Connection, scope: Scope) -> Keys:
    """Give a scope within its grace its old keys back; -> which. The caller holds the guard, lifts the fence, audits, and keeps the generation.

    Raises CommandRejected (`grace_over`) when nothing of exactly this scope is in quarantine, Conflict while the KMS key that wraps it is
    being replaced. Its view records are gone all the same: the tombstones did not wait.
    """
    keys = await quarantine.restore(connection, scope)
    if not keys.names:
        raise CommandRejected("grace_over", "nothing can be brought back: the grace has ended, or there was none")
    return keys
