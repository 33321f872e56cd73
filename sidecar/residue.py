"""Residue: where copies outlive a shred's keys. One job each, planned with the receipt `inaccessible` and watched to its end.

    grace         the keys that are set aside until the grace ends               grace.py
    view          decrypted records in view topics                               residue_topics.py
    source        plaintext in source topics
    consumers     who has read a view, and must be told
    database      rows of the blind index                                        blind_index.py
                  dead rows of the key tables                                    residue_store.py
    wal, backup   the log, and backups, by what is declared of them
    seal_epoch    what in the KMS could open any such copy

A job looks, does what it can, and says when to look again; it may be killed anywhere and look twice. When none is pending, the receipt
`complete` is written in the transaction of the last one's end: never in part, never before.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

from sidecar import telemetry
from sidecar.blind_index import PLACE, IndexRows, plan_index
from sidecar.core.command import Command, receipt_id, rfc3339
from sidecar.core.errors import SidecarError
from sidecar.grace import Grace
from sidecar.notices import Notices
from sidecar.postgres import blind_index, commands, jobs, residue, scopes, shreds
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, transaction
from sidecar.postgres.residue import Entry, Look, Planned, Shown
from sidecar.residue_store import Backups, DeadRows, SealEpoch, Wal, plan_store
from sidecar.residue_topics import Readers, SourceRecords, ViewRecords, plan_readers, plan_source, plan_view
from sidecar.sealing import Sealing
from sidecar.settings import Settings
from sidecar.steps import Steps, failpoint

LONGEST_SECONDS = 300.0


class Watch(Protocol):
    """One kind of residue. May raise: then the job stays as it is, and is looked at again."""

    async def act(self, entry: Entry) -> Look: ...


class Residue:
    """Plans the jobs of a shred and works those that are due. One control process at a time."""

    def __init__(self, settings: Settings, steps: Steps, notices: Notices, sealing: Callable[[], Sealing]) -> None:
        self._settings, self._steps, self._notices = settings, steps, notices
        pool, admin, clock = steps.pool, steps.admin, steps.clock
        self._watches: Mapping[str, Watch] = {
            "grace": Grace(steps),
            "view": ViewRecords(settings, steps, notices),
            "source": SourceRecords(admin),
            "consumers": Readers(settings, admin),
            "database": DeadRows(pool),
            f"database/{PLACE}": IndexRows(pool),
            "wal": Wal(pool),
            "backup": Backups(settings, pool, clock),
            "seal_epoch": SealEpoch(pool, clock, sealing),
        }

    # ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def plan(self, job: Job, command: Command) -> list[Planned]:
        """What the shred leaves, as it is known behind its barrier."""
        now = self._steps.clock.now()
        async with transaction(self._steps.pool) as connection:
            sources = await shreds.source_topics(connection)
            ends = await shreds.source_ends(connection, job.command_id)
            of_index = plan_index(await blind_index.any_gone(connection, command.scope))
            resealed = await jobs.any_resealed(connection, command.scope.tenant)
        stored = plan_store(self._settings, job.facts, now, resealed=resealed)
        views = await self._notices.affected(command.scope)
        described = await asyncio.to_thread(self._steps.admin.describe, {view.topic for view in views} | {topic for _, topic, _ in sources})
        configs = {topic: await asyncio.to_thread(self._steps.admin.topic_config, topic) for topic in described}
        of_views = [
            plan_view(view, described[view.topic], configs[view.topic], job.facts["barrier"][view.topic], command.scope, now)
            for view in views
            if view.topic in described and view.topic in job.facts["barrier"]
        ]
        of_sources = [
            plan_source(self._settings, topic, described[topic], configs[topic], ends[source], now)
            for source, topic, topic_id in sources
            if source in ends and topic in described and described[topic].topic_id == topic_id
        ]
        return of_views + of_sources + plan_readers(views) + of_index + stored

    # ── working ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def work(self) -> None:
        """One look at everything that is due."""
        async with transaction(self._steps.pool) as connection:
            entries = await residue.due(connection, self._steps.clock.now())
        for entry in entries:
            await self._steps.foreground.let_pass()
            await self._record(entry, await self._look(entry))

    async def _look(self, entry: Entry) -> Look:
        """Whatever goes wrong is this job's own trouble: it stays, and says why."""
        failpoint(f"residue:{entry.kind}")
        try:
            look = await (self._watches.get(f"{entry.kind}/{entry.place}") or self._watches[entry.kind]).act(entry)
            return replace(look, details={name: value for name, value in look.details.items() if name != "waits_for"})
        except SidecarError as error:
            said = str(error)
            telemetry.log.warning("residue waits", extra={"action": "residue", "kind": entry.kind, "command_id": entry.command_id, "error": error})
        except Exception as error:
            said = "a defect of ours; the log of the control plane has it"
            telemetry.log.error("residue fails", extra={"action": "residue", "kind": entry.kind, "command_id": entry.command_id}, exc_info=error)
        again = min(1.5 ** min(entry.attempts, 20), LONGEST_SECONDS)
        return Look(again=again, until=entry.until, details=entry.details | {"waits_for": said})

    async def _record(self, entry: Entry, look: Look) -> None:
        now = self._steps.clock.now()
        async with transaction(self._steps.pool) as connection:
            next_at = None if look.again is None else now + timedelta(seconds=look.again)
            if await residue.record(connection, entry, look, now, next_at) and look.again is None:
                failpoint("residue:complete")
                await self.complete(connection, entry.command)
        if look.again is None:
            telemetry.log.info("residue gone", extra={"action": "residue", "kind": entry.kind, "command_id": entry.command_id})

    async def complete(self, connection: Connection, command: Command) -> None:
        """The receipt `complete`, if nothing is outstanding; in the transaction of what was the last."""
        rows = await residue.of_command(connection, command.command_id)
        stands = await commands.receipt_with(connection, command.command_id, "inaccessible")
        if stands is None or any(row.state != "done" for row in rows):
            return
        if stands["residue"] and not rows:
            return  # it was restored within its grace
        body = live(stands, rows)
        if not rows:  # nothing was found, anywhere
            body = body | {"irrecoverable_at": body["inaccessible_at"], "irrecoverable_reason": None}
        if body["events"].get("counting"):
            stood_at = await commands.written_at(connection, UUID(stands["receipt_id"]))
            body["events"] = body["events"] | scopes.events_on_receipt(*await scopes.count_events(connection, command.scope, stood_at))
            body["events"] |= {"counting": False}
        body |= await self._steps.audited(connection, command, "shred.complete", residue=len(rows))
        body |= {"receipt_id": str(receipt_id(command.command_id, "complete")), "status": "complete"}
        await commands.complete(connection, command.command_id, body)


def live(receipt: dict[str, Any], rows: list[Shown]) -> dict[str, Any]:
    """A shred's receipt with its residue as it stands now. `irrecoverable_at` is the end of the last of it, and null until then."""
    if not rows:
        return receipt
    body = receipt | {"residue": [row.on_receipt() for row in rows]}
    pending = [row for row in rows if row.state != "done"]
    ends = [row.done_at for row in rows if row.done_at is not None]
    if pending:
        return body | {"irrecoverable_at": None, "irrecoverable_reason": reason(pending)}
    return body | {"irrecoverable_at": rfc3339(max(ends)), "irrecoverable_reason": None}


def reason(pending: list[Shown] | list[Planned]) -> str:
    """Why it is not irrecoverable yet, in a few words; the residue has the rest."""
    for row in pending:
        if row.kind == "grace" and row.until is not None:
            return f"grace until {rfc3339(row.until)}"
    for row in pending:
        if row.kind == "seal_epoch":
            return str(row.details.get("reason", "next seal epoch"))
    return "copies remain: " + ", ".join(sorted({row.place for row in pending}))


def on_receipt(planned: list[Planned]) -> list[dict[str, Any]]:
    """As planned, none of it done."""
    shown = [Shown(kind=p.kind, place=p.place, state="pending", until=p.until, details=p.details, done_at=None) for p in planned]
    return [row.on_receipt() for row in sorted(shown, key=lambda row: (row.kind, row.place))]
