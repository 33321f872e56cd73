"""Receipts go out: in the order of their steps, each once; after a crash it looks on the topic for what was published."""

import asyncio
from datetime import timedelta
from typing import Any

import orjson

from sidecar import telemetry
from sidecar.core.errors import Conflict, Unavailable
from sidecar.kafka.receipts import Outgoing, ReceiptPublisher
from sidecar.postgres import commands
from sidecar.postgres.commands import Unpublished
from sidecar.postgres.connection import Pool, transaction
from sidecar.steps import failpoint
from sidecar.waiting import Backoff, woken


class Outbox:
    """Publishes receipts in the order of their steps, each once."""

    def __init__(self, pool: Pool, publisher: ReceiptPublisher) -> None:
        self._pool, self._publisher = pool, publisher
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. Raises ProducerFenced when another process publishes: then this one is not the executor any more."""
        backoff = Backoff()
        try:
            while True:
                self.wake.clear()
                try:
                    if await self._publish():
                        continue
                    backoff = Backoff()
                except (Unavailable, Conflict) as error:
                    # The outcome may be unknown: the next attempt looks on the topic first.
                    self._publisher.close()
                    telemetry.retries.labels("outbox").inc()
                    telemetry.log.warning("outbox waits", extra={"action": "publish", "error": error})
                    await backoff.wait()
                    continue
                await woken(self.wake)
        finally:
            self._publisher.close()

    async def _publish(self) -> bool:
        """True if there may be more."""
        async with transaction(self._pool) as connection:
            waiting = await commands.unpublished(connection)
        if not waiting:
            return False
        there: set[Any] = set()
        if not self._publisher.is_open:
            await asyncio.to_thread(self._publisher.open)
            # A minute for clocks that differ between Postgres and the broker.
            there = await asyncio.to_thread(self._publisher.already_published, waiting[0].created_at - timedelta(minutes=1))
        missing = [row for row in waiting if row.outbox_id not in there]
        if missing:
            await asyncio.to_thread(self._publisher.publish, [_outgoing(row) for row in missing])
        failpoint(f"published:{waiting[-1].body['status']}")
        async with transaction(self._pool) as connection:
            await commands.mark_published(connection, [row.outbox_id for row in waiting])
        for row in missing:
            telemetry.receipts.labels(row.body["status"]).inc()
        return True


def _outgoing(row: Unpublished) -> Outgoing:
    key = str(row.command_id).encode() if row.command_id else None
    return Outgoing(outbox_id=row.outbox_id, key=key, value=orjson.dumps(row.body))
