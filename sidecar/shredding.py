"""Shred, step by step.

shred   [→ closed → emptied   a class of many keys: its fence; then, without the guard, its keys]
        → fenced        guard, source end offsets, keys gone (within a grace: in quarantine), fence, tenant epoch, audit: nobody gets a key
        → barred        instances that did not let go are fenced; then the views' log end offsets
        [→ noticed → cleared   with include_plain: notices first, then plain events deleted and their view records tombstoned]
        → inaccessible  the entry of the fence is on the ledger topic; then the receipt
        → done          an erased notice per view partition (a crash may repeat one, with the same ce_id)
What outlives the keys is residue.py's, from then on.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

from sidecar.core.command import Command, rfc3339
from sidecar.core.errors import BrokerUnavailable, CommandRejected, StoreUnavailable
from sidecar.core.keys import Keys
from sidecar.core.ledger import SourceEnd
from sidecar.core.model import Scope, ScopeKind
from sidecar.notices import Notices, plain_tombstones
from sidecar.postgres import commands, replays, residue, scopes, shreds, tenants
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.holds import refuse_held
from sidecar.postgres.tenants import Tenant
from sidecar.postgres.views import views_on_record
from sidecar.preview import preview
from sidecar.residue import Residue, on_receipt, reason
from sidecar.settings import Settings
from sidecar.steps import FINISHED, Steps, failpoint

T = TypeVar("T")

NOT_IN_LEDGER: Final = (None, "closed", "emptied")
"""Steps of a command before its entry is written: `None` of every other one."""
CHUNK: Final = 5000
MANY_KEYS: Final = 2000
"""Of a class: more are not destroyed under the guard, which stalls traffic (measured: 70 ms for each thousand, on a loaded machine)."""
COUNT_MS: Final = 400
OFFSETS_SECONDS: Final = 2.0
"""How long the broker may take for the source end offsets: the guard is held meanwhile."""


class Shredding:
    """The flow of `shred`."""

    def __init__(self, settings: Settings, steps: Steps, notices: Notices, residue: Residue) -> None:
        self._settings, self._steps, self._notices, self._residue = settings, steps, notices, residue

    async def step(self, job: Job, command: Command) -> Job:
        """Take the command's next step; -> where it then stands (`step` is FINISHED at the end)."""
        at = job.step
        failpoint(f"shred:{at or 'accepted'}")
        if at is None:
            if command.dry_run:
                return await preview(self._steps, self._notices, job, command, grace=bool(self._settings.control.grace_of(command)))
            return await self._close(job, command) or await self._fence(job, command)
        if at == "closed":
            return await self._empty(job, command)
        if at == "emptied":
            return await self._fence(job, command)
        if at == "fenced":
            return await self._bar(job, command)
        if at == "inaccessible" or (at == "barred" and command.include_plain):
            return await self._notice(job, command)
        if at == "noticed":
            return await self._clear_plain(job, command)
        return await self._inaccessible(job, command)

    # shred

    async def _close(self, job: Job, command: Command) -> Job | None:
        """A class of many keys, under the guard: only its fence, behind which no event, no key and no hold of it comes any more. None for others."""
        scope, kept_until = command.scope, self._kept_until(command)
        async with transaction(self._steps.pool) as connection:
            if scope.kind is not ScopeKind.CLASS or not await shreds.more_keys_than(connection, scope, MANY_KEYS):
                return None
        async with self._steps.under_guard(scope.tenant) as connection:
            await self._refuse(connection, scope, kept_until)
            await shreds.fence(connection, scope, command.command_id)
            await tenants.next_epoch(connection, scope.tenant, shredding=False)
            facts = {"kept_until": kept_until.isoformat()} if kept_until else {}
            facts |= await self._steps.audited(connection, command, f"{scope.kind}.close")
            return await commands.advance(connection, job, "closed", facts)

    async def _empty(self, job: Job, command: Command) -> Job:
        """The keys go while traffic runs. Those who have one in hand by then lose it with the tenant's epoch, which `_fence` moves once more."""
        scope, until = command.scope, job.facts.get("kept_until")
        async with transaction(self._steps.pool) as connection:
            await connection.execute("SET LOCAL synchronous_commit = on")
            keys = await shreds.take_keys(connection, scope, command.command_id, until and datetime.fromisoformat(until))
            await self._steps.audited(connection, command, f"{scope.kind}.destroy", keys)
            return await commands.advance(connection, job, "emptied", {"keys": keys.on_receipt()})

    def _kept_until(self, command: Command) -> datetime | None:
        grace = self._settings.control.grace_of(command)
        if grace and command.include_plain:
            raise CommandRejected("grace_with_plain", "plain events are deleted for good: shred without include_plain, or without a grace")
        return self._steps.clock.now() + timedelta(seconds=grace) if grace else None

    async def _refuse(self, connection: Connection, scope: Scope, kept_until: datetime | None) -> Tenant:
        """Raises CommandRejected; else the tenant's row is locked."""
        tenant = await tenants.lock(connection, scope.tenant)
        await replays.adopt(connection, scope)
        await refuse_held(connection, scope)
        if kept_until is not None:
            await shreds.refuse_second_grace(connection, scope)
        await shreds.refuse_shared(connection, scope)
        return tenant

    async def _fence(self, job: Job, command: Command) -> Job:
        scope, emptied = command.scope, job.facts.get("keys")
        until = job.facts.get("kept_until")
        kept_until = self._kept_until(command) if emptied is None else until and datetime.fromisoformat(until)
        async with self._steps.under_guard(scope.tenant) as connection:
            if emptied is None:
                tenant = await self._refuse(connection, scope, kept_until)
                ends = await self._source_ends(connection)
                keys = await shreds.take_keys(connection, scope, command.command_id, kept_until)
            else:
                tenant, ends, keys = await tenants.lock(connection, scope.tenant), await self._source_ends(connection), Keys.of()
            taken = emptied or keys.on_receipt()
            await shreds.record_barriers(connection, command.command_id, scope.tenant, ends)
            await tenants.next_epoch(connection, scope.tenant, shredding=scope.kind is ScopeKind.TENANT)
            facts: dict[str, Any] = {"keys": taken, **self._steps.terminated(scope.tenant), "xid": await residue.own_xid(connection)}
            if kept_until and taken["count"]:
                facts["kept_until"] = kept_until.isoformat()
            if not taken["count"] and not await self._known(connection, scope):
                facts["note"] = "nothing_found, fenced"
            facts |= await self._steps.audited(connection, command, f"{scope.kind}.shred", keys)
            await self._steps.ledger.enter(
                connection, command, "shred", at=self._steps.clock.now(), generation=tenant.generation,
                sources=ends, keys_sha256=facts["keys"]["fingerprints_sha256"], kept_until=kept_until,
            )  # fmt: skip
            fenced = await commands.advance(connection, job, "fenced", facts)
        self._steps.settled(scope.tenant)
        # Taken after the commit: a receipt never claims an earlier time than the true one. After a crash it is the time of the resumption.
        return replace(fenced, facts=fenced.facts | {"inaccessible_at": rfc3339(self._steps.clock.now())})

    async def _source_ends(self, connection: Connection) -> list[SourceEnd]:
        """Where the log of every source ends, on each of its partitions: of those that were ever read, and of those that are configured.

        Asked under the guard: what stands there was there before the shred, whether or not an instance has come to read it.
        """
        known = {topic for _, topic, _ in await shreds.source_topics(connection)}
        try:
            async with asyncio.timeout(OFFSETS_SECONDS):
                return await asyncio.to_thread(self._ask_for_ends, known)
        except TimeoutError:
            raise BrokerUnavailable("the source end offsets did not come in time") from None

    def _ask_for_ends(self, known: set[str]) -> list[SourceEnd]:
        admin, named = self._steps.admin, {source.topic for source in self._settings.sources}
        globs = {topic for topic in named if set(topic) & set("*?[")}
        matching = {topic for topic in admin.list_topics() if any(fnmatchcase(topic, glob) for glob in globs)} if globs else set()
        live = admin.describe(known | (named - globs) | matching)
        ends = admin.offsets({topic: found.partitions for topic, found in live.items()})
        return [
            SourceEnd(topic=topic, topic_id=live[topic].topic_id, partition=partition, end_offset=offset)
            for topic, offsets in ends.items()
            for partition, offset in offsets.items()
        ]

    async def _known(self, connection: Connection, scope: Scope) -> bool:
        if scope.kind is ScopeKind.STREAM:
            return await scopes.stream_class(connection, scope.tenant, scope.id) is not None
        return scope.kind is ScopeKind.TENANT

    async def _bar(self, job: Job, command: Command) -> Job:
        async with transaction(self._steps.pool) as connection:
            views = await views_on_record(connection)
        instances = await self._steps.release(job)
        failpoint("shred:released")
        # After all fences, and again whenever they are done again: what a late commit put there stands below the barrier.
        present = await asyncio.to_thread(self._steps.admin.describe, {view.topic for view in views})
        ends = await asyncio.to_thread(self._steps.admin.offsets, {name: info.partitions for name, info in present.items()})
        facts = {
            "inaccessible_at": job.facts.get("inaccessible_at") or rfc3339(self._steps.clock.now()),
            "instances": instances,
            "barrier": {topic: {str(p): offset for p, offset in sorted(of.items())} for topic, of in sorted(ends.items())},
        }
        async with transaction(self._steps.pool) as connection:
            return await commands.advance(connection, job, "barred", facts)

    async def _inaccessible(self, job: Job, command: Command) -> Job:
        scope = command.scope
        await self._steps.ledger.publish()
        failpoint("shred:in ledger")
        events, deks, planned = await asyncio.gather(
            self._bounded(lambda c: scopes.count_events(c, scope)),
            self._bounded(lambda c: scopes.count_deks(c, scope)) if scope.kind is ScopeKind.TENANT else _nothing(),
            self._residue.plan(job, command),
        )
        counted: dict[str, Any] = {"unreadable": None, "plain_remaining": None, "counting": True}
        if events is not None:
            counted = scopes.events_on_receipt(*events)
        facts = job.facts
        body = self._steps.receipt_of(
            job,
            command,
            "inaccessible",
            inaccessible_at=facts["inaccessible_at"],
            irrecoverable_reason=reason(planned) if planned else None,
            keys=facts["keys"] | ({"deks_below": deks} if scope.kind is ScopeKind.TENANT else {}),
            events=counted | {name: facts[name] for name in ("plain_deleted", "remainders_deleted") if name in facts},
            barrier=facts["barrier"],
            instances=facts["instances"],
            residue=on_receipt(planned),
            audit=facts["audit"],
        )
        async with transaction(self._steps.pool) as connection:
            if scope.kind is ScopeKind.TENANT:
                await tenants.mark_shredded(connection, scope.tenant)
            await residue.insert(connection, job.command_id, planned, self._steps.clock.now())
            return await commands.advance(connection, job, "inaccessible", receipt=body)

    async def _bounded(self, query: Callable[[Connection], Awaitable[T]]) -> T | None:
        """The answer of an exact count if it comes soon; None else. The receipt does not wait for it."""
        async with transaction(self._steps.pool) as connection:
            await connection.execute(f"SET LOCAL statement_timeout = {COUNT_MS}")
            try:
                return await query(connection)
            except StoreUnavailable:
                return None

    # views

    async def _notice(self, job: Job, command: Command) -> Job:
        if job.step == "barred" or not command.include_plain:
            views = await self._notices.affected(command.scope)
            await self._notices.give_notice(job.command_id, command.scope, job.facts["inaccessible_at"], views)
            failpoint("shred:noticed")
        async with transaction(self._steps.pool) as connection:
            if job.step == "barred":
                return await commands.advance(connection, job, "noticed")
            done = await commands.advance(connection, job, FINISHED, finished=True)
            await self._residue.complete(connection, command)
            return done

    async def _clear_plain(self, job: Job, command: Command) -> Job:
        """The next chunk. Tombstones first durable in Kafka, then the deletion commits: a crash repeats the chunk, never forgets it."""
        views = await self._notices.affected(command.scope)
        after, deleted = tuple(job.facts.get("plain_after", ("", 0))), int(job.facts.get("plain_deleted", 0))
        async with transaction(self._steps.pool) as connection:
            rows = await shreds.delete_plain(connection, command.scope, after, CHUNK)
            if rows:
                await self._notices.write([t for row in rows for t in plain_tombstones(command.scope.tenant, row, views)])
                after, deleted = (rows[-1]["stream_id"], rows[-1]["stream_position"]), deleted + len(rows)
            facts = {"plain_deleted": deleted, "plain_after": after}
            rest = await self._clear_remainders(connection, job, command.scope)
            failpoint("shred:clearing")
            step = "noticed" if len(rows) == CHUNK or rest.pop("more", False) else "cleared"
            return await commands.advance(connection, job, step, facts | rest)

    async def _clear_remainders(self, connection: Connection, job: Job, scope: Scope) -> dict[str, Any]:
        """The next chunk of what stands in clear beside encrypted fields; the events stay, unreadable. `more`: there is another chunk."""
        after = tuple(job.facts.get("remainders_after", ("", 0)))
        rows = await shreds.clear_remainders(connection, scope, after, CHUNK)
        if not rows:
            return {}
        deleted = int(job.facts.get("remainders_deleted", 0)) + len(rows)
        return {"remainders_deleted": deleted, "remainders_after": (rows[-1][0], rows[-1][1]), "more": len(rows) == CHUNK}


async def _nothing() -> None:
    return None
