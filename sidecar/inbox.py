"""Commands come in: from the control topic, and from the rotation timer. One transaction: command, receipt, audit row.

After `Inbox.receive` came back the record may be acked. It waits for what cannot be reached, for ever; a record that nobody understands
becomes a negative receipt, never a record that holds up the topic.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from sidecar import telemetry
from sidecar.core.command import OPS, Command, Incoming, compose, parse, receipt, receipt_id, rfc3339
from sidecar.core.errors import CommandRejected, Conflict, SidecarError, Unavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.ports import Clock
from sidecar.postgres import audit, commands, rotations
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.settings import Settings
from sidecar.signing import authority
from sidecar.steps import WRITER, failpoint
from sidecar.waiting import Backoff

CLOCK_SKEW: Final = timedelta(minutes=5)
"""How much earlier than the sender's clock ours may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRecord:
    """A record of the control topic. `source` is topic/partition/offset: the same one twice is Kafka's redelivery, not the sender's."""

    value: bytes | None
    source: str


Received = tuple[ControlRecord, Incoming]


class Inbox:
    """Takes control records in. Safe to run in several processes at once."""

    def __init__(self, settings: Settings, pool: Pool, clock: Clock, wake: Callable[[], None]) -> None:
        self._pool, self._clock, self._wake = pool, clock, wake
        self._authority = authority(settings)

    async def receive(self, *records: ControlRecord) -> None:
        """Returns when all are durably accepted or rejected, however long that takes. Never raises, but when cancelled."""
        backoff = Backoff()
        while True:
            try:
                failpoint("receive")
                await self._take([(record, parse(record.value, self._authority, now=self._clock.now())) for record in records])
                failpoint("received")
                self._wake()
                return
            except (Unavailable, Conflict) as error:
                telemetry.retries.labels("inbox").inc()
                telemetry.log.warning("inbox waits", extra={"action": "receive", "source": records[0].source, "error": error})
            except Exception as error:
                # Nothing that a sender can write should come here; if it does, one record must not hold up the topic.
                telemetry.log.error("control records cannot be taken in", extra={"action": "receive", "source": records[0].source}, exc_info=error)
                if len(records) > 1:
                    for record in records:
                        await self.receive(record)
                    return
                with suppress(SidecarError):
                    unknown = Incoming(command_id=None, op=None, scope=None, digest=b"", outcome=_NOT_TAKEN)
                    return await self._answer([(records[0], unknown)])
            await backoff.wait()

    async def _take(self, batch: list[Received]) -> None:
        """New commands one by one; all the rest in one transaction: who floods the topic must not hold up the others.

        A rejected record takes no command id: else whoever may write to the topic could use up the ids of others. Only what somebody
        vouches for may be a command that came before.
        """
        async with transaction(self._pool) as connection:
            known = await commands.find(connection, {i.command_id for _, i in batch if i.vouched and i.command_id})
        refused: list[Received] = []
        again: list[tuple[ControlRecord, commands.Entry]] = []
        for record, incoming in batch:
            entry = known.get(incoming.command_id) if incoming.vouched and incoming.command_id else None
            if entry is None and isinstance(incoming.outcome, Command):
                entry = await self._accept(record, incoming, incoming.outcome)
                if entry is None:
                    continue
            if entry is None:
                refused.append((record, incoming))
            elif entry.payload_sha256 == incoming.digest:
                again.append((record, entry))
            else:
                refused.append((record, replace(incoming, outcome=_ID_REUSED)))
        await self._answer(refused, again)

    async def _accept(self, record: ControlRecord, incoming: Incoming, command: Command) -> commands.Entry | None:
        """Into the inbox; -> the command that has the id, if there is one already."""
        now = self._clock.now()
        async with transaction(self._pool) as connection:
            if known := await commands.find(connection, [command.command_id]):
                return known[command.command_id]
            outcome = await self._judge(connection, command, now)
            await self._store(connection, command.command_id, replace(incoming, outcome=outcome), record, now)
        return None

    async def _judge(self, connection: Connection, outcome: Command, now: datetime) -> Command | CommandRejected:
        """What could be judged otherwise another time: a command that is refused here stays refused, its id is taken."""
        if outcome.issued_at is not None and outcome.issued_at > now + CLOCK_SKEW:
            return CommandRejected("not_yet_valid", "issued_at lies in the future; compare the clocks")
        if not await commands.tenant_exists(connection, outcome.scope.tenant):
            return CommandRejected("unknown_tenant", "there is no such tenant")
        if outcome.dry_run and outcome.op != "shred":
            return CommandRejected("dry_run_unsupported", "only a shred can be tried out")
        return outcome

    async def _store(self, connection: Connection, command_id: UUID, incoming: Incoming, record: ControlRecord, now: datetime) -> None:
        outcome = incoming.outcome
        accepted = isinstance(outcome, Command)
        error = None if isinstance(outcome, Command) else outcome
        status: Any = "accepted" if accepted else "rejected"
        tenant = (incoming.scope or {}).get("tenant")
        actor = outcome.requested_by if isinstance(outcome, Command) else "unknown"
        details = _details(record, incoming) | {"issuers": list(incoming.issuers)}
        row = await audit.append(
            connection, writer=WRITER, at=now, action=f"command.{status}", actor=actor, tenant=tenant if accepted else None, details=details
        )
        body = receipt(
            receipt_id(command_id, status), command_id=command_id, op=incoming.op, scope=incoming.scope, status=status, error=error,
            accepted_at=rfc3339(now) if accepted else None, audit={"writer": row.writer, "seq": row.seq},
        )  # fmt: skip
        await commands.insert(
            connection, command_id=command_id, op=incoming.op or "unknown", tenant=tenant, payload=record.value or b"", digest=incoming.digest,
            issuer=", ".join(incoming.issuers) or actor, status=status, facts={"source": record.source, "accepted_at": body["accepted_at"]},
            receipt=body, at=now,
        )  # fmt: skip
        log_status(incoming.op, status, command_id, error)

    async def _answer(self, refused: list[Received], again: Sequence[tuple[ControlRecord, commands.Entry]] = ()) -> None:
        """Negative receipts, and stored ones once more where a command came again and Kafka did not merely deliver the same record twice."""
        repeats = [
            (receipt_id(entry.receipt["receipt_id"], "again", record.source), entry.receipt)
            for record, entry in again
            if entry.receipt is not None and entry.facts.get("source") != record.source
        ]
        if refused or repeats:
            async with transaction(self._pool) as connection:
                await self._reject(connection, refused)
                await commands.add_receipts(connection, repeats)

    async def _reject(self, connection: Connection, refused: list[Received]) -> None:
        """A negative receipt for each, once per record, however often Kafka delivers it."""
        ids = {record.source: receipt_id("record", record.source) for record, _ in refused}
        there = await commands.in_outbox(connection, ids.values())
        new = [(record, incoming) for record, incoming in refused if ids[record.source] not in there]
        rows = await audit.append_all(
            connection, writer=WRITER, at=self._clock.now(), action="command.rejected", actor="unknown", tenant=None,
            details=[_details(record, incoming) for record, incoming in new],
        )  # fmt: skip
        bodies = []
        for (record, incoming), row in zip(new, rows, strict=True):
            error = incoming.outcome if isinstance(incoming.outcome, CommandRejected) else _NOT_TAKEN
            said: dict[str, Any] = {"command_id": incoming.command_id, "op": incoming.op, "scope": incoming.scope, "status": "rejected"}
            bodies.append((ids[record.source], receipt(ids[record.source], **said, error=error, audit={"writer": row.writer, "seq": row.seq})))
            log_status(incoming.op, "rejected", incoming.command_id, error)
        if await commands.add_receipts(connection, bodies) < len(bodies):
            raise Conflict("another process takes the same records in")


_ID_REUSED = CommandRejected("id_reused", "a command with this id and other content came before; it stands as it was")
_NOT_TAKEN = CommandRejected("malformed", "the record could not be taken in")


def _details(record: ControlRecord, incoming: Incoming) -> dict[str, Any]:
    code = incoming.outcome.code if isinstance(incoming.outcome, CommandRejected) else None
    return {"command_id": incoming.command_id and str(incoming.command_id), "op": incoming.op, "source": record.source, "error": code}


def log_status(op: str | None, status: str, command_id: Any, error: CommandRejected | None = None) -> None:
    """And count it; an op that we do not know is `unknown`, so that senders make no labels."""
    known = op if op in OPS else "unknown"
    telemetry.commands.labels(known, status).inc()
    telemetry.log.info("command", extra={"action": known, "status": status, "command_id": command_id, "code": error.code if error else None})


async def schedule_rotations(settings: Settings, pool: Pool, clock: Clock) -> int:
    """Put what is due by age into the inbox; -> how many. A class of a tenant that is already on its way is left alone."""
    now = clock.now()
    async with transaction(pool) as connection:
        due = await rotations.due(connection, now)
    for tenant, stream_class, older_than in due:
        scope = Scope(tenant=tenant, kind=ScopeKind.CLASS, id=stream_class)
        identity = receipt_id("timer", tenant, stream_class, now.isoformat())
        payload = compose(
            command_id=identity, audience=settings.deployment, op="rotate", scope=scope, reason="older than the policy's rotation interval",
            requested_by=commands.TIMER_ISSUER, ticket=None, issued_at=now, not_after=now + timedelta(days=365),
            options={"older_than": older_than.isoformat()},
        )  # fmt: skip
        async with transaction(pool) as connection:
            details = {"command_id": str(identity), "op": "rotate", "source": commands.TIMER_ISSUER, "error": None}
            row = await audit.append(
                connection, writer=WRITER, at=now, action="command.accepted", actor=commands.TIMER_ISSUER, tenant=tenant, details=details
            )
            body = receipt(
                receipt_id(identity, "accepted"), command_id=identity, op="rotate", scope=scope.to_json(), status="accepted",
                accepted_at=rfc3339(now), audit={"writer": row.writer, "seq": row.seq},
            )  # fmt: skip
            facts = {"source": commands.TIMER_ISSUER, "class": stream_class, "accepted_at": body["accepted_at"]}
            await commands.insert(
                connection, command_id=identity, op="rotate", tenant=tenant, payload=payload, digest=sha256(payload).digest(),
                issuer=commands.TIMER_ISSUER, status="accepted", facts=facts, receipt=body, at=now,
            )  # fmt: skip
    return len(due)
