"""Shred and rotate, step by step. Each step is one Postgres transaction that also moves `commands.step`, so it can be repeated.

    shred   → fenced        guard, source end offsets, keys gone, fence, tenant epoch, audit: from here on nobody gets a key
            → barred        instances that did not let go are fenced; then the views' log end offsets
            [→ noticed → cleared   with include_plain: notices first, then plain events deleted and their view records tombstoned]
            → inaccessible  the receipt
            → done          an erased notice per view partition (a crash may repeat one, with the same ce_id)
    rotate  → marked → done

Any error leaves the command where it was. Unavailable is worth another try, CommandRejected is final, the rest is the executor's to judge.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any, Final, TypeVar

from sidecar import telemetry
from sidecar.core.aead import lp
from sidecar.core.command import Command, receipt, receipt_id, rfc3339
from sidecar.core.errors import BrokerUnavailable, CommandRejected, StoreUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import ERASED_TYPE, parse_attributes, view_key, view_partition
from sidecar.kafka.admin import Admin, TopicInfo
from sidecar.kafka.receipts import ViewRecord, ViewWriter
from sidecar.ports import Clock
from sidecar.postgres import audit, commands, guard, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.guard import Backend
from sidecar.postgres.shreds import Keys, View

T = TypeVar("T")

WRITER: Final = "control-0"
FINISHED: Final = "done"
CHUNK: Final = 5000
COUNT_MS: Final = 400
OFFSETS_SECONDS: Final = 1.0
"""How long the broker may take for the source end offsets: the guard is held meanwhile."""


def failpoint(name: str) -> None:
    """Die here, as by SIGKILL, when a test asks for it."""
    if os.environ.get("SIDECAR_TEST_FAILPOINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


class Shredding:
    """Carries commands out. One object per control process; it keeps nothing that a restart would miss."""

    def __init__(self, pool: Pool, admin: Admin, views: ViewWriter, clock: Clock) -> None:
        self._pool, self._admin, self._views, self._clock = pool, admin, views, clock
        self._evicted: dict[str, set[Backend]] = {}

    async def step(self, job: Job, command: Command) -> Job:
        """Take the command's next step; -> where it then stands (`step` is FINISHED at the end)."""
        at = job.step
        failpoint(f"{job.op}:{at or 'accepted'}")
        if job.op == "rotate":
            return await (self._mark(job, command) if at is None else self._rotated(job, command))
        if at is None:
            return await (self._preview(job, command) if command.dry_run else self._fence(job, command))
        if at == "fenced":
            return await self._bar(job, command)
        if at == "inaccessible" or (at == "barred" and command.include_plain):
            return await self._notice(job, command)
        if at == "noticed":
            return await self._clear_plain(job, command)
        return await self._inaccessible(job, command)

    # rotate

    async def _mark(self, job: Job, command: Command) -> Job:
        """None of the marked keys seals anything after this commit: batches verify the tenant epoch under the guard."""
        scope = command.scope
        async with self._under_guard(scope.tenant) as connection:
            tenant = await shreds.lock_tenant(connection, scope.tenant)
            if tenant.state != "active":
                raise CommandRejected("tenant_shredded", f"the tenant is {tenant.state}")
            names = await shreds.retire(connection, scope, command.older_than)
            await shreds.next_epoch(connection, scope.tenant, shredding=False)
            keys = Keys(names=names)
            facts = {"keys": {"count": len(names)}, **self._terminated(scope.tenant)}
            facts |= await self._audit(connection, command, "keys.rotate", keys)
            marked = await commands.advance(connection, job, "marked", facts)
        self._evicted.pop(scope.tenant, None)
        return marked

    async def _rotated(self, job: Job, command: Command) -> Job:
        instances = await self._release(job) if job.facts.get("terminated") else None
        failpoint("rotate:released")
        body = self._receipt(job, command, "done", keys=job.facts["keys"], instances=instances, audit=job.facts["audit"])
        async with transaction(self._pool) as connection:
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)

    # shred

    async def _fence(self, job: Job, command: Command) -> Job:
        scope = command.scope
        async with transaction(self._pool) as connection:
            sources = await shreds.source_topics(connection)
        described = await asyncio.to_thread(self._admin.describe, {topic for _, topic, _ in sources})
        async with self._under_guard(scope.tenant) as connection:
            await shreds.lock_tenant(connection, scope.tenant)
            ends = await self._source_ends(sources, described)
            keys = await shreds.destroy(connection, scope, command.command_id)
            await shreds.record_barriers(connection, command.command_id, scope.tenant, ends)
            await shreds.next_epoch(connection, scope.tenant, shredding=scope.kind is ScopeKind.TENANT)
            facts: dict[str, Any] = {"keys": keys.on_receipt(), **self._terminated(scope.tenant)}
            if not keys.fingerprints and not await self._known(connection, scope):
                facts["note"] = "nothing_found, fenced"
            facts |= await self._audit(connection, command, f"{scope.kind}.shred", keys)
            fenced = await commands.advance(connection, job, "fenced", facts)
        self._evicted.pop(scope.tenant, None)
        # Taken after the commit: a receipt never claims an earlier time than the true one. After a crash it is the time of the resumption.
        return replace(fenced, facts=fenced.facts | {"inaccessible_at": rfc3339(self._clock.now())})

    async def _source_ends(self, sources: list[tuple[int, str, str]], described: dict[str, TopicInfo]) -> dict[int, dict[int, int]]:
        """{source_id: {partition: end offset}} of those sources that are still the topic they were."""
        live = {topic: source for source, topic, topic_id in sources if topic in described and described[topic].topic_id == topic_id}
        try:
            call = asyncio.to_thread(self._admin.offsets, {topic: described[topic].partitions for topic in live})
            ends = await asyncio.wait_for(call, OFFSETS_SECONDS)
        except TimeoutError:
            raise BrokerUnavailable("the source end offsets did not come in time") from None
        return {live[topic]: offsets for topic, offsets in ends.items()}

    async def _known(self, connection: Connection, scope: Scope) -> bool:
        if scope.kind is ScopeKind.STREAM:
            return await shreds.stream_class(connection, scope.tenant, scope.id) is not None
        return scope.kind is ScopeKind.TENANT

    async def _bar(self, job: Job, command: Command) -> Job:
        async with transaction(self._pool) as connection:
            await shreds.sweep(connection, command.scope)
            views = await shreds.views(connection)
        instances = await self._release(job)
        failpoint("shred:released")
        # After all fences, and again whenever they are done again: what a late commit put there stands below the barrier.
        present = await asyncio.to_thread(self._admin.describe, {view.topic for view in views})
        ends = await asyncio.to_thread(self._admin.offsets, {name: info.partitions for name, info in present.items()})
        facts = {
            "inaccessible_at": job.facts.get("inaccessible_at") or rfc3339(self._clock.now()),
            "instances": instances,
            "barrier": {topic: {str(p): offset for p, offset in sorted(of.items())} for topic, of in sorted(ends.items())},
        }
        async with transaction(self._pool) as connection:
            return await commands.advance(connection, job, "barred", facts)

    async def _release(self, job: Job) -> list[dict[str, str]]:
        """What became of each instance: released (it let go, or holds nothing of ours), stopped, or fenced, here and now or before."""
        terminated = {Backend(pid, datetime.fromisoformat(started)) for pid, started in job.facts.get("terminated", ())}
        async with transaction(self._pool) as connection:
            found = await guard.instances(connection)
        lost = [i for i in found if i.state == "running" and (not i.alive or i.backend in terminated)]
        if lost:
            await asyncio.gather(*(asyncio.to_thread(self._admin.fence, i.transactional_id) for i in lost))
            async with transaction(self._pool) as connection:
                await guard.mark_fenced(connection, lost)
            telemetry.fenced.labels("instance").inc(len(lost))
            telemetry.log.warning(
                "instances fenced", extra={"action": "fence", "command_id": job.command_id, "instances": [i.instance_id for i in lost]}
            )
        gone = {i.instance_id for i in lost}
        outcome = {"running": "released", "stopped": "stopped", "fenced": "fenced"}
        return [{"instance_id": i.instance_id, "outcome": "fenced" if i.instance_id in gone else outcome[i.state]} for i in found]

    async def _inaccessible(self, job: Job, command: Command) -> Job:
        scope = command.scope
        events, deks, residue = await asyncio.gather(
            self._bounded(lambda c: shreds.count_events(c, scope)),
            self._bounded(lambda c: shreds.count_deks(c, scope)) if scope.kind is ScopeKind.TENANT else _nothing(),
            self._residue(),
        )
        counted: dict[str, Any] = {"unreadable": None, "plain_remaining": None, "counting": True}
        if events is not None:
            counted = {"unreadable": events[0], "plain_remaining": events[1]}
        facts = job.facts
        body = self._receipt(
            job,
            command,
            "inaccessible",
            inaccessible_at=facts["inaccessible_at"],
            irrecoverable_reason="next seal epoch",
            keys=facts["keys"] | ({"deks_below": deks} if scope.kind is ScopeKind.TENANT else {}),
            events=counted | ({"plain_deleted": facts["plain_deleted"]} if "plain_deleted" in facts else {}),
            barrier=facts["barrier"],
            instances=facts["instances"],
            residue=residue,
            audit=facts["audit"],
        )
        already_noticed = command.include_plain
        async with transaction(self._pool) as connection:
            if scope.kind is ScopeKind.TENANT:
                await shreds.mark_shredded(connection, scope.tenant)
            step = FINISHED if already_noticed else "inaccessible"
            return await commands.advance(connection, job, step, receipt=body, finished=already_noticed)

    async def _residue(self) -> list[dict[str, Any]]:
        """Where copies outlive the keys, and until when by the topics' own retention; null: no end is configured."""
        async with transaction(self._pool) as connection:
            topics = {topic for _, topic, _ in await shreds.source_topics(connection)} | {view.topic for view in await shreds.views(connection)}
        present = sorted(await asyncio.to_thread(self._admin.describe, topics))
        configs = await asyncio.gather(*(asyncio.to_thread(self._admin.topic_config, topic) for topic in present))
        now = self._clock.now()
        return [{"where": f"topic {topic}", "until": _retained_until(config, now)} for topic, config in zip(present, configs, strict=True)]

    async def _bounded(self, query: Callable[[Connection], Awaitable[T]]) -> T | None:
        """The answer of an exact count if it comes soon; None else. The receipt does not wait for it."""
        async with transaction(self._pool) as connection:
            await connection.execute(f"SET LOCAL statement_timeout = {COUNT_MS}")
            try:
                return await query(connection)
            except StoreUnavailable:
                return None

    # views

    async def _notice(self, job: Job, command: Command) -> Job:
        views = await self._affected(command.scope)
        records = [self._notice_record(job, command.scope, view, partition) for view in views for partition in range(view.partitions)]
        await asyncio.to_thread(self._views.write, records)
        failpoint("shred:noticed")
        async with transaction(self._pool) as connection:
            if job.step == "barred":
                return await commands.advance(connection, job, "noticed")
            return await commands.advance(connection, job, FINISHED, finished=True)

    def _notice_record(self, job: Job, scope: Scope, view: View, partition: int) -> ViewRecord:
        erased_at = job.facts["inaccessible_at"]
        said = scope.to_json()
        value = {"tenant": said.pop("tenant"), "scope": said, "command_id": str(job.command_id), "erased_at": erased_at}
        headers: list[tuple[str, str | bytes | None]] = [
            ("ce_specversion", b"1.0"),
            ("ce_id", f"{job.command_id}.{partition}".encode()),
            ("ce_type", ERASED_TYPE.encode()),
            ("ce_source", b"/sidecar"),
            ("ce_time", erased_at.encode()),
            ("ce_tenantid", scope.tenant.encode()),
        ]
        key = f"{scope.tenant}/erased/{job.command_id}".encode()
        return ViewRecord(topic=view.topic, partition=partition, key=key, value=json.dumps(value, ensure_ascii=False).encode(), headers=headers)

    async def _affected(self, scope: Scope) -> list[View]:
        """The views that may hold records of the scope, where the topic exists."""
        async with transaction(self._pool) as connection:
            views = await shreds.views(connection)
            of_class = scope.id if scope.kind is ScopeKind.CLASS else None
            if scope.kind is ScopeKind.STREAM:
                of_class = await shreds.stream_class(connection, scope.tenant, scope.id)
        present = await asyncio.to_thread(self._admin.describe, {view.topic for view in views})
        wanted = [v for v in views if v.topic in present and _any(v.tenants, scope.tenant) and (of_class is None or _any(v.classes, of_class))]
        return wanted

    async def _clear_plain(self, job: Job, command: Command) -> Job:
        """Tombstones first durable in Kafka, then the deletion commits: a crash repeats the chunk, never forgets it."""
        views = await self._affected(command.scope)
        after, deleted = ("", 0), int(job.facts.get("plain_deleted", 0))
        while True:
            async with transaction(self._pool) as connection:
                rows = await shreds.delete_plain(connection, command.scope, after, CHUNK)
                if rows:
                    tombstones = [t for row in rows for t in _tombstones(command.scope.tenant, row, views)]
                    await asyncio.to_thread(self._views.write, tombstones)
                    after, deleted = (rows[-1]["stream_id"], rows[-1]["stream_position"]), deleted + len(rows)
                failpoint("shred:clearing")
                step = "noticed" if len(rows) == CHUNK else "cleared"
                job = await commands.advance(connection, job, step, {"plain_deleted": deleted})
            if step == "cleared":
                return job

    # common

    @asynccontextmanager
    async def _under_guard(self, tenant: str) -> AsyncIterator[Connection]:
        """A transaction that holds the tenant's guard exclusively. Holders that do not let go in time lose their session."""
        evicted = self._evicted.setdefault(tenant, set())
        while True:
            async with transaction(self._pool) as connection:
                if await guard.take(connection, tenant):
                    started = time.perf_counter()
                    yield connection
                    break
            async with transaction(self._pool) as connection:
                evicted.update(await guard.evict(connection, tenant))
        telemetry.guard_seconds.observe(time.perf_counter() - started)

    def _terminated(self, tenant: str) -> dict[str, Any]:
        """As a fact of the step: their instances are fenced even while Postgres still lists the dead session."""
        return {"terminated": [[b.pid, b.started.isoformat()] for b in self._evicted.get(tenant, ())]}

    async def _preview(self, job: Job, command: Command) -> Job:
        """What a shred would do; changes nothing."""
        scope = command.scope
        async with transaction(self._pool) as connection:
            if scope.kind is not ScopeKind.TENANT:
                await shreds.refuse_shared(connection, scope)
            sealed, plain = await shreds.count_events(connection, scope)
            keys = {"count": await shreds.count_deks(connection, scope)}
            events = {"unreadable": sealed, "plain_remaining": 0 if command.include_plain else plain}
            body = self._receipt(job, command, "done", keys=keys, events=events, dry_run=True)
            return await commands.advance(connection, job, FINISHED, receipt=body, finished=True)

    async def _audit(self, connection: Connection, command: Command, action: str, keys: Keys) -> dict[str, Any]:
        """The row of the act. A scope's id may be a person's name, so the trail holds its pseudonym; `command_id` leads to the rest."""
        scope = command.scope
        reference = sha256(lp(b"ks/scope-ref/v1", scope.tenant.encode(), scope.kind.encode(), scope.id.encode())).hexdigest()[:32]
        details = {"command_id": str(command.command_id), "scope": {"kind": scope.kind.value, "ref": reference}} | keys.in_audit()
        row = await audit.append(
            connection, writer=WRITER, at=self._clock.now(), action=action, actor=command.requested_by, tenant=scope.tenant, details=details
        )
        return {"audit": {"writer": row.writer, "seq": row.seq}}

    def _receipt(self, job: Job, command: Command, status: Any, **facts: Any) -> dict[str, Any]:
        """The id comes from command and status: a step that is repeated repeats its receipt."""
        known = {"accepted_at": job.facts.get("accepted_at")} | {name: job.facts[name] for name in ("note",) if name in job.facts}
        identity = receipt_id(job.command_id, status)
        return receipt(identity, command_id=job.command_id, op=job.op, scope=command.scope.to_json(), status=status, **known, **facts)


async def _nothing() -> None:
    return None


def _any(globs: list[str], value: str) -> bool:
    return any(fnmatchcase(value, glob) for glob in globs)


def _retained_until(config: dict[str, str], now: datetime) -> str | None:
    limit = int(config.get("retention.ms", "-1"))
    if limit < 0 or "delete" not in config.get("cleanup.policy", "delete"):
        return None
    try:
        return rfc3339(now + timedelta(milliseconds=limit))
    except OverflowError:
        return None


def _tombstones(tenant: str, row: Any, views: list[View]) -> list[ViewRecord]:
    """The tombstones of one deleted plain event, one per view that can hold it."""
    out = []
    for view in views:
        matched = (row["class"] is None or _any(view.classes, row["class"])) and (row["topic"] is None or _any(view.topics, row["topic"]))
        source_key = parse_attributes(row["metadata"])[0] if view.key_mode == "source" and row["metadata"] else None
        path = f"{tenant}/{row['stream_id']}"
        key = view_key(view.key_mode, path, row["stream_position"], source_key)
        if matched and key is not None:  # a record without a key cannot be tombstoned; retention is its end
            out.append(ViewRecord(topic=view.topic, partition=view_partition(path, view.partitions), key=key, value=None))
    return out


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)
