"""`shred --dry-run`: what a shred of the scope would find. Reads only, and takes no lock that anybody waits for."""

from sidecar.core.command import Command
from sidecar.core.model import ScopeKind
from sidecar.postgres import commands, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import transaction
from sidecar.steps import FINISHED, Steps


async def preview(steps: Steps, job: Job, command: Command) -> Job:
    """The command's one step: its receipt is the answer."""
    scope = command.scope
    async with transaction(steps.pool) as connection:
        if scope.kind is not ScopeKind.TENANT:
            await shreds.refuse_shared(connection, scope)
        sealed, plain = await shreds.count_events(connection, scope)
        keys = {"count": await shreds.count_deks(connection, scope)}
        events = shreds.events_on_receipt(sealed, 0 if command.include_plain else plain)
        body = steps.receipt_of(job, command, "done", keys=keys, events=events, dry_run=True)
        return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)
