"""Commands that were acked on the control topic and that this database does not have: it was restored to before them. They are read again.

The database remembers up to where it has the topic's records, the consumer group up to where they were acked. What lies between is taken in
again before anything new: a command is known by its id and bytes, so nothing is carried out twice. One that has its final receipt is left alone:
it was refused, say, for a hold that is gone by now, and must not come alive behind its issuer's back.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from uuid import UUID

import orjson
from confluent_kafka import Message

from sidecar import telemetry
from sidecar.core.command import final_statuses, parse, receipt_id
from sidecar.core.errors import SidecarError
from sidecar.inbox import ControlRecord, Inbox
from sidecar.kafka.admin import Admin
from sidecar.kafka.reading import read
from sidecar.ports import Clock
from sidecar.postgres import commands
from sidecar.postgres.connection import Pool, transaction
from sidecar.settings import Settings
from sidecar.signing import authority

AT_ONCE: Final = 100


def group_of(settings: Settings) -> str:
    """The consumer group that receives commands."""
    return f"{settings.deployment}.control"


class Rereading:
    """One per control process."""

    def __init__(self, settings: Settings, pool: Pool, admin: Admin, inbox: Inbox, clock: Clock) -> None:
        self._settings, self._pool, self._admin, self._inbox, self._clock = settings, pool, admin, inbox, clock
        self._topic, self._topic_id = settings.control.topic, ""

    async def remember(self, records: Sequence[ControlRecord]) -> None:
        """They are in this database. Forgotten where that cannot be written down: then they are read again one day, to no effect."""
        ends: dict[int, int] = {}
        for record in records:
            _, partition, offset = record.source.rsplit("/", 2)
            ends[int(partition)] = max(ends.get(int(partition), 0), int(offset) + 1)
        with suppress(SidecarError):
            await self._remember(ends)

    async def _remember(self, ends: dict[int, int]) -> None:
        async with transaction(self._pool) as connection:
            await commands.remember_read(connection, self._topic_id, ends)

    async def take_again(self) -> int:
        """Returns when nothing lies between; -> how many records were taken in. Raises StoreUnavailable, BrokerUnavailable."""
        found = (await asyncio.to_thread(self._admin.describe, [self._topic])).get(self._topic)
        if found is None:
            return 0
        self._topic_id = found.topic_id
        acked = await asyncio.to_thread(self._admin.committed, group_of(self._settings), self._topic)
        async with transaction(self._pool) as connection:
            have = await commands.read_up_to(connection, self._topic_id)
        span: dict[int, tuple[int, int | None]] = {p: (have.get(p, 0), end) for p, end in acked.items() if have.get(p, 0) < end}
        if not span:
            return 0
        lost = await asyncio.to_thread(self._unanswered, span)
        for start in range(0, len(lost), AT_ONCE):
            await self._inbox.receive(*lost[start : start + AT_ONCE])
        await self._remember({partition: acked[partition] for partition in span})
        telemetry.log.warning("commands from before a restore were read again", extra={"action": "reread", "records": len(lost)})
        return len(lost)

    def _unanswered(self, span: dict[int, tuple[int, int | None]]) -> list[ControlRecord]:
        """Blocks. Who may command what is looked at again when they are taken in."""
        who, now = authority(self._settings), self._clock.now()
        records = [
            ControlRecord(value=m.value(), source=f"{self._topic}/{m.partition()}/{m.offset()}") for m in read(self._settings, self._topic, span)
        ]
        answered = self._answered() if records else set()
        return [record for record in records if parse(record.value, who, now=now).command_id not in answered]

    def _answered(self) -> set[UUID | None]:
        """Commands whose final receipt stands on the topic; not those that were only named by a record that was refused."""
        receipts = self._settings.control.receipts
        found = self._admin.describe([receipts]).get(receipts)
        span = {partition: (0, None) for partition in range(found.partitions if found else 0)}
        return {command for message in read(self._settings, receipts, span) if (command := _answered_by(message)) is not None}


def _answered_by(message: Message) -> UUID | None:
    body = orjson.loads(message.value() or b"{}")
    command, status = body.get("command_id"), body.get("status")
    final = command and status in final_statuses(body.get("op")) and body["receipt_id"] == str(receipt_id(command, status))
    return UUID(command) if final else None
