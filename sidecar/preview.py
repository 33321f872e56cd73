"""`shred --dry-run`: what a shred of the scope would find, and what would stand in its way.

Reads only, side by side, and takes no lock that anybody waits for. Nothing is fenced or audited but that the command came.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from sidecar.core.command import Command
from sidecar.core.errors import CommandRejected, StoreUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.notices import Notices
from sidecar.postgres import commands, holds, scopes, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.steps import FINISHED, Steps

T = TypeVar("T")

COUNT_MS: Final = 1200
"""So long an exact count of events may take; then it is estimated, and says so."""


async def preview(steps: Steps, notices: Notices, job: Job, command: Command, *, grace: bool) -> Job:
    """The command's one step: its receipt is the answer. `grace`: the shred would have one."""
    scope = command.scope

    async def ask(query: Callable[[Connection, Scope], Awaitable[T]]) -> T:
        async with transaction(steps.pool) as connection:
            return await query(connection, scope)

    counts = asyncio.gather(ask(scopes.count_deks), ask(_tenant_keys), ask(scopes.count_streams))
    found = asyncio.gather(ask(_events), ask(holds.overlapping), ask(_shared), ask(_in_grace), notices.affected(scope))
    (deks, keks, streams), (events, in_force, shared, in_grace, views) = await counts, await found
    if command.include_plain and events["plain_remaining"] is not None:
        events |= {"plain_remaining": 0, "plain_deleted": events["plain_remaining"]}
        events |= {"remainders_deleted": cleared} if (cleared := events.pop("clear_remainders", 0)) else {}
    refused_by = {
        "grace_with_plain": grace and command.include_plain,
        "legal_hold": bool(in_force),
        "in_grace": grace and in_grace,
        "shared_key": bool(shared),
    }
    body = steps.receipt_of(
        job,
        command,
        "done",
        dry_run=True,
        keys={"count": deks, **keks},
        streams=streams,
        events=events,
        views=[{"name": view.name, "topic": view.topic, "key": view.keys[0]} for view in views],
        holds=[{"hold_id": str(hold.hold_id), "reason": hold.reason} for hold in in_force],
        shared=shared,
        refused_by=[code for code, refuses in refused_by.items() if refuses],
    )
    async with transaction(steps.pool) as connection:
        return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)


async def _events(connection: Connection, scope: Scope) -> dict[str, Any]:
    """Counted; or, where that takes too long, from the positions that streams have on record, which lag a little."""
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL statement_timeout = {COUNT_MS}")
            return scopes.events_on_receipt(*await scopes.count_events(connection, scope)) | {"exact": True}
    except StoreUnavailable:
        await connection.execute("SET LOCAL statement_timeout = 0")
        sealed, plain = await scopes.estimate_events(connection, scope)
        return scopes.events_on_receipt(sealed, plain) | {"exact": False}


async def _tenant_keys(connection: Connection, scope: Scope) -> dict[str, int]:
    return {"tenant_keys": await scopes.count_keks(connection, scope.tenant)} if scope.kind is ScopeKind.TENANT else {}


async def _shared(connection: Connection, scope: Scope) -> str | None:
    """Who else needs one of the keys, in words."""
    if scope.kind is ScopeKind.TENANT:
        return None
    try:
        await shreds.refuse_shared(connection, scope)
    except CommandRejected as rejected:
        return str(rejected)
    return None


async def _in_grace(connection: Connection, scope: Scope) -> bool:
    """Whether an earlier shred's grace stands in the way of another one."""
    try:
        await shreds.refuse_second_grace(connection, scope)
    except CommandRejected:
        return True
    return False
