"""A subscription to the store: events in global order, one by one, to a handler, from a checkpoint on.

    consumer = EventConsumer("read-model", PostgresEventStore(pool), decrypt=crypto.decrypt, tenant="acme", classes=["UserPersonalData"])
    await consumer.run(handler, stop)

At least once: the checkpoint moves behind what the handler has taken, so after a crash it may see its last events again. What cannot be
reached is waited for, for ever, and the checkpoint stays. An event that cannot be read, or that the handler refuses again and again, is
set aside and named (`set_asides`), and the next one follows. Of consumers of one name one works and the others stand by.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Final

from sidecar import telemetry
from sidecar.core.errors import KeyShredded, KeyUnavailable, RecordError, SidecarError, StreamErased, Unavailable
from sidecar.core.model import Erased, Event
from sidecar.core.store import Cursor, Unreadable
from sidecar.postgres import checkpoints
from sidecar.postgres.connection import Connection, Pool
from sidecar.postgres.errors import mapped
from sidecar.postgres.event_store import PostgresEventStore

Handler = Callable[[Event | Erased], Awaitable[None]]
DecryptHook = Callable[[Sequence[Event]], Awaitable[Sequence[Event | Erased | RecordError]]]
"""Opens what a store gave unopened: an answer per event, in order. Raises Unavailable or KeyUnavailable, which are waited for; what else
it raises of an event alone sets that one aside."""

POLL_SECONDS: Final = 1.0
"""How late a wake-up that got lost is made good."""
PAGE: Final = 500
PATIENCE: Final = 3
"""How often a handler may refuse an event before it is set aside."""
_TRANSIENT = (Unavailable, KeyUnavailable, ConnectionError, TimeoutError)


class EventConsumer:
    """One subscription: events in global order, at least once, from the checkpoint of that name on. Of several of a name one works at a time.

    `decrypt` opens them (`CryptoEventStore.decrypt`); without it envelopes are handed over. `tenant` and `classes`: only those.
    """

    def __init__(
        self,
        name: str,
        store: PostgresEventStore,
        *,
        decrypt: DecryptHook | None = None,
        tenant: str | None = None,
        classes: Sequence[str] | None = None,
        sessions: Pool | None = None,
    ) -> None:
        """`sessions`: where the connection comes from that it keeps while it runs; without it, one of the store's must be to spare for each."""
        self._sessions = sessions or store.pool
        self.name, self._store, self._decrypt = name, store, decrypt
        self._tenant, self._classes = tenant, classes
        self._wake = asyncio.Event()

    async def run(self, handler: Handler, stop: asyncio.Event) -> None:
        """Until `stop`; the event in hand is finished. May be called again after it has returned.

        What is away is waited for (up to 5 s between tries), and the checkpoint stays. What was shredded before the handler is called with it comes
        as `Erased`. An event that cannot be read, or that the handler refuses three times, is set aside by place (table `consumer_set_aside`), and
        the next one follows.
        """
        pause = 0.1
        while not stop.is_set():
            try:
                with mapped():
                    async with self._sessions.acquire() as held:
                        await self._work(held, handler, stop)  # type: ignore[arg-type]
                pause = 0.1
            except _TRANSIENT as error:
                telemetry.retries.labels("consumer").inc()
                telemetry.log.warning("a consumer waits", extra={"action": "consume", "consumer": self.name, "error": error})
                await self._sleep(stop, pause)
                pause = min(5.0, pause * 2)

    async def _work(self, connection: Connection, handler: Handler, stop: asyncio.Event) -> None:
        """On one session: it holds the consumer's name, and hears of new events."""
        if not await checkpoints.take(connection, self.name):
            return await self._sleep(stop, POLL_SECONDS)
        with mapped():
            await connection.add_listener(checkpoints.CHANNEL, self._heard)
        try:
            while not stop.is_set():
                self._wake.clear()
                cursor, horizon = await checkpoints.listen(connection, self.name)
                if not await self._page(connection, cursor, horizon, handler, stop):
                    await self._sleep(stop, POLL_SECONDS)
        finally:
            with suppress(Exception):
                await connection.remove_listener(checkpoints.CHANNEL, self._heard)
                await connection.execute("SELECT pg_advisory_unlock_all()")

    def _heard(self, *_: object) -> None:
        self._wake.set()

    async def _sleep(self, stop: asyncio.Event, seconds: float) -> None:
        """Until something new is stored, `stop`, or the time is up."""
        waiting = [asyncio.create_task(event.wait()) for event in (self._wake, stop)]
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    async def _page(self, connection: Connection, cursor: Cursor, horizon: Cursor, handler: Handler, stop: asyncio.Event) -> bool:
        """The next events; -> whether there were any. The checkpoint follows also when one of them must wait.

        Nothing that is below `horizon` is still to come: behind a page that is not full, all up to there was looked through, whoever's it is.
        """
        found = await self._store.read_all(after=cursor, tenant=self._tenant, classes=self._classes, limit=PAGE)
        answers: Iterable[Event | Erased | Unreadable | None] = repeat(None)
        as_of = await checkpoints.epochs(connection, {held.tenant for _, held in found if _is_sealed(held)}) if self._decrypt else {}
        with suppress(Exception):  # one that cannot be opened (now) is not to hold up those before it: they are opened one by one then
            answers = await self._opened([held for _, held in found])
        reached = cursor
        try:
            for (place, held), answer in zip(found, answers, strict=False):
                if stop.is_set():
                    break
                if answer is not None and held.tenant in as_of and _is_sealed(held):
                    now = await checkpoints.epochs(connection, [held.tenant])
                    answer = answer if now == {held.tenant: as_of[held.tenant]} else None  # a shred may have come since: it is opened again
                await self._hand_over(connection, held, answer, handler)
                reached = place
            else:
                reached = max(reached, horizon) if len(found) < PAGE else reached
        finally:
            if reached != cursor:
                await checkpoints.advance(connection, self.name, reached)
        return bool(found)

    async def _opened(self, found: Sequence[Event | Erased | Unreadable]) -> Sequence[Event | Erased | Unreadable]:
        if self._decrypt is None:
            return found
        events = [held for held in found if isinstance(held, Event)]
        answers = iter(await self._decrypt(events))
        return [_answer(held, next(answers)) if isinstance(held, Event) else held for held in found]

    async def _hand_over(
        self, connection: Connection, held: Event | Erased | Unreadable, answer: Event | Erased | Unreadable | None, handler: Handler
    ) -> None:
        """`answer`: `held` as it was opened with its page; None: it is opened here."""
        try:
            [opened] = await self._opened([held]) if answer is None else [answer]
        except Exception as error:
            if isinstance(error, SidecarError | OSError) and not isinstance(error, RecordError):
                raise  # a key, a right or a connection is missing: no fault of the event's
            return await self._set_aside(connection, held, error)
        if isinstance(opened, Unreadable):
            return await self._set_aside(connection, held, opened.error)
        for attempt in range(1, PATIENCE + 1):
            try:
                return await handler(opened)
            except Exception as error:
                if isinstance(error, _TRANSIENT) and not isinstance(error, KeyShredded | StreamErased):
                    raise
                if attempt == PATIENCE:
                    await self._set_aside(connection, held, error)

    async def _set_aside(self, connection: Connection, held: Event | Erased | Unreadable, error: Exception) -> None:
        """By name and place: what the error says may quote the event."""
        said = telemetry.describe(error)
        await checkpoints.set_aside(connection, self.name, held.tenant, held.stream, held.position, said)
        telemetry.log.error("an event is set aside", extra={"action": "consume", "consumer": self.name, "position": held.position, "error": said})


def _is_sealed(held: Event | Erased | Unreadable) -> bool:
    return isinstance(held, Event) and held.sealed is not None


def _answer(event: Event, answer: Event | Erased | RecordError) -> Event | Erased | Unreadable:
    if isinstance(answer, RecordError):
        return Unreadable(tenant=event.tenant, stream=event.stream, position=event.position, error=answer)
    return answer
