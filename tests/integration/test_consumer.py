"""A subscription to the store: resumable, waits for what is away, sets aside what is poison, misses nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import pytest

from sidecar import Library
from sidecar.consumer import EventConsumer, Handler
from sidecar.core.errors import KeyShredded, StoreUnavailable, StreamErased, UnknownKey
from sidecar.core.model import Erased, Event, Scope, ScopeKind
from sidecar.core.store import NewEvent
from sidecar.postgres import checkpoints, migrations, shreds, tenants
from sidecar.postgres.connection import connect, open_pool
from sidecar.postgres.event_store import PostgresEventStore


@pytest.fixture
async def store(database: str) -> AsyncIterator[PostgresEventStore]:
    connection = await connect(database)
    await migrations.migrate(connection)
    await connection.close()
    pool = await open_pool(database, max_size=6)
    yield PostgresEventStore(pool)
    await pool.close()


@dataclass
class Seen:
    """A handler that remembers, and fails as it is told."""

    events: list[Event | Erased] = field(default_factory=list)
    fails: Callable[[Event | Erased], None] = lambda _: None

    async def __call__(self, event: Event | Erased) -> None:
        self.fails(event)
        self.events.append(event)

    @property
    def ids(self) -> list[str]:
        return [event.message_id for event in self.events]


@asynccontextmanager
async def running(consumer: EventConsumer, handler: Handler) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(consumer.run(handler, stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():  # noqa: ASYNC110 (several parties have a say in it)
            await asyncio.sleep(0.02)


async def append(store: PostgresEventStore, first: int, count: int, **options: Any) -> None:
    for n in range(first, first + count):
        await store.append_to_stream(f"s{n % 3}", [NewEvent(type="T", data=n, id=f"e{n}")], **options)


def names(*numbers: int) -> list[str]:
    return [f"e{n}" for n in numbers]


async def test_a_consumer_goes_on_where_it_stopped(store: PostgresEventStore) -> None:
    first, second = Seen(), Seen()
    await append(store, 0, 5)
    async with running(EventConsumer("c", store), first):
        await until(lambda: len(first.ids) == 5)
        await append(store, 5, 5)
        await until(lambda: len(first.ids) == 10)
    await append(store, 10, 3)
    async with running(EventConsumer("c", store), second):
        await until(lambda: len(second.ids) >= 3)
    assert first.ids == names(*range(10))
    assert second.ids == names(10, 11, 12)


async def test_a_consumer_of_a_tenant_and_a_class_sees_no_other(store: PostgresEventStore) -> None:
    seen = Seen()
    for n, (tenant, stream_class) in enumerate([("a", "C"), ("a", "D"), ("b", "C"), ("a", "C")]):
        await store.append_to_stream(f"{tenant}{stream_class}", [NewEvent(type="T", data=n, id=f"e{n}")], tenant=tenant, stream_class=stream_class)
    async with running(EventConsumer("c", store, tenant="a", classes=["C"]), seen):
        await until(lambda: len(seen.ids) >= 2)
    assert seen.ids == names(0, 3)


async def test_what_is_away_is_waited_for_and_the_checkpoint_stays(store: PostgresEventStore) -> None:
    away = [True]

    def fails(event: Event | Erased) -> None:
        if event.message_id == "e1" and away[0]:
            raise StoreUnavailable

    seen = Seen(fails=fails)
    await append(store, 0, 4)
    async with running(EventConsumer("c", store), seen):
        await until(lambda: seen.ids == ["e0"])
        await asyncio.sleep(0.5)
        assert seen.ids == ["e0"]
        away[0] = False
        await until(lambda: len(seen.ids) >= 4)
    assert seen.ids == names(0, 1, 2, 3)
    async with store.pool.acquire() as held:
        assert await checkpoints.set_asides(held, "c") == []  # type: ignore[arg-type]


async def test_a_key_that_is_not_known_is_waited_for_and_not_taken_for_poison(store: PostgresEventStore) -> None:
    known = [False]

    async def decrypt(events: Any) -> Any:
        if not known[0]:
            raise UnknownKey
        return events

    seen = Seen()
    await append(store, 0, 2)
    async with running(EventConsumer("c", store, decrypt=decrypt), seen):
        await asyncio.sleep(0.5)
        assert seen.ids == []
        known[0] = True
        await until(lambda: len(seen.ids) >= 2)
    assert seen.ids == names(0, 1)


async def test_an_event_whose_key_is_not_known_holds_up_none_that_stands_before_it(store: PostgresEventStore) -> None:
    known = [False]

    async def decrypt(events: Any) -> Any:
        if not known[0] and any(event.message_id == "e2" for event in events):
            raise UnknownKey
        return events

    seen = Seen()
    await append(store, 0, 4)
    async with running(EventConsumer("c", store, decrypt=decrypt), seen):
        await until(lambda: len(seen.ids) >= 2)
        await asyncio.sleep(0.5)
        assert seen.ids == names(0, 1)
        assert await behind(store, "c") == 2, "the checkpoint is where it waits"
        known[0] = True
        await until(lambda: len(seen.ids) >= 4)
    assert seen.ids == names(0, 1, 2, 3)


async def test_an_event_that_the_hook_cannot_digest_is_set_aside_and_the_others_of_its_page_are_read(store: PostgresEventStore) -> None:
    async def decrypt(events: Any) -> Any:
        if any(event.message_id == "e1" for event in events):
            raise ValueError("the secret is 42")
        return events

    seen = Seen()
    await append(store, 0, 4)
    async with running(EventConsumer("c", store, decrypt=decrypt), seen):
        await until(lambda: len(seen.ids) >= 3)
    assert seen.ids == names(0, 2, 3)
    async with store.pool.acquire() as held:
        [named] = await checkpoints.set_asides(held, "c")  # type: ignore[arg-type]
    assert (named["stream_id"], named["stream_position"], named["error"]) == ("s1", 1, "ValueError")


async def behind(store: PostgresEventStore, consumer: str) -> int:
    """How many rows stand behind the checkpoint: what the next look goes through."""
    return int(
        await store.pool.fetchval(
            """SELECT count(*) FROM messages m, consumer_checkpoints c
               WHERE c.consumer = $1 AND (m.transaction_id, m.global_position) > (c.transaction_id, c.global_position)""",
            consumer,
        )
    )


async def test_a_consumer_does_not_look_again_at_what_it_has_passed_without_a_match(store: PostgresEventStore) -> None:
    """Its last match may be its only one, with a year of others' events behind it."""
    seen = Seen()
    await store.append_to_stream("mine", [NewEvent(type="T", data=0, id="mine-1")], stream_class="Mine")
    await append(store, 0, 30)
    async with running(EventConsumer("c", store, classes=["Mine"]), seen):
        await until(lambda: len(seen.ids) == 1)
        async with asyncio.timeout(120):
            while await behind(store, "c"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await append(store, 30, 5)
        await store.append_to_stream("mine", [NewEvent(type="T", data=0, id="mine-2")], stream_class="Mine")
        await until(lambda: len(seen.ids) >= 2)
    assert seen.ids == ["mine-1", "mine-2"]


async def test_a_poison_event_is_set_aside_and_named_and_the_next_one_follows(store: PostgresEventStore) -> None:
    tried: list[str] = []

    def fails(event: Event | Erased) -> None:
        tried.append(event.message_id)
        if event.message_id == "e1":
            raise ValueError("the secret is 42")

    seen = Seen(fails=fails)
    await append(store, 0, 3)
    async with running(EventConsumer("c", store), seen):
        await until(lambda: len(seen.ids) >= 2)
    assert seen.ids == names(0, 2)
    assert tried.count("e1") == 3
    async with store.pool.acquire() as held:
        [named] = await checkpoints.set_asides(held, "c")  # type: ignore[arg-type]
    assert (named["stream_id"], named["stream_position"], named["error"]) == ("s1", 1, "ValueError")


async def test_planted_plaintext_is_set_aside_and_never_handed_over(store: PostgresEventStore) -> None:
    await append(store, 0, 3)
    await store.pool.execute("UPDATE streams SET is_encrypted = true, encrypted_from_position = 1 WHERE stream_id = 's1'")
    seen = Seen()
    async with running(EventConsumer("c", store), seen):
        await until(lambda: len(seen.ids) >= 2)
    assert seen.ids == names(0, 2)
    async with store.pool.acquire() as held:
        [named] = await checkpoints.set_asides(held, "c")  # type: ignore[arg-type]
    assert named["error"].startswith("AuthenticationFailed")


async def test_of_two_consumers_of_one_name_one_works_and_the_other_takes_over(store: PostgresEventStore) -> None:
    one, two = Seen(), Seen()
    await append(store, 0, 3)
    async with running(EventConsumer("c", store), one):
        await until(lambda: len(one.ids) == 3)
        async with running(EventConsumer("c", store), two):
            await append(store, 3, 3)
            await until(lambda: len(one.ids) == 6)
            assert two.ids == []
    async with running(EventConsumer("c", store), two):
        await append(store, 6, 2)
        await until(lambda: len(two.ids) == 2)
    assert (one.ids, two.ids) == (names(*range(6)), names(6, 7))


async def test_a_consumer_is_woken_by_an_append(store: PostgresEventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling alone would take longer than the test waits. A transaction of anybody's may hold an event back, so one wake-up may find nothing."""
    monkeypatch.setattr("sidecar.consumer.POLL_SECONDS", 1000.0)
    seen = Seen()
    async with running(EventConsumer("c", store), seen), asyncio.timeout(120):
        for number in count():
            await append(store, number, 1)
            await asyncio.sleep(0.5)
            if len(seen.ids) >= 2:
                break
    assert seen.ids == names(*range(len(seen.ids)))


async def test_writers_at_once_and_a_consumer_that_misses_none_and_keeps_each_streams_order(store: PostgresEventStore) -> None:
    seen = Seen()
    await append(store, 0, 1)

    async def write(writer: int) -> None:
        for n in range(30):
            await store.append_to_stream(f"w{writer}", [NewEvent(type="T", data=n, id=f"{writer}-{n}")])

    async with running(EventConsumer("c", store), seen):
        await asyncio.gather(*(write(writer) for writer in range(6)))
        await until(lambda: len(seen.ids) >= 181)
    assert len(set(seen.ids)) == len(seen.ids) == 181
    for writer in range(6):
        assert [i for i in seen.ids if i.startswith(f"{writer}-")] == [f"{writer}-{n}" for n in range(30)]


async def test_a_handler_that_needs_what_was_erased_does_not_wait_for_it(store: PostgresEventStore) -> None:
    """It comes back by no waiting."""

    def fails(event: Event | Erased) -> None:
        if event.message_id in ("e0", "e1"):
            raise KeyShredded if event.message_id == "e0" else StreamErased

    seen = Seen(fails=fails)
    await append(store, 0, 3)
    async with running(EventConsumer("c", store), seen):
        await until(lambda: seen.ids == ["e2"])
    async with store.pool.acquire() as held:
        named = await checkpoints.set_asides(held, "c")  # type: ignore[arg-type]
    assert [row["stream_id"] for row in named] == ["s0", "s1"]


async def test_what_was_opened_before_a_shred_is_not_handed_over_after_it(library: Library) -> None:
    """A page is opened at once, and the handler of its first event may take an hour."""
    stop, seen = asyncio.Event(), list[Event | Erased]()

    async def handle(event: Event | Erased) -> None:
        seen.append(event)
        if len(seen) == 1:
            async with library.plain.session() as session:
                scope = Scope(tenant="acme", kind=ScopeKind.STREAM, id="user-2")
                await shreds.take_keys(session.connection, scope, uuid4(), None)
                await tenants.next_epoch(session.connection, "acme", shredding=False)
        if len(seen) == 3:
            stop.set()

    for stream in ("user-1", "user-2", "user-3"):
        await library.store.append_to_stream(stream, [NewEvent(type="T", data="secret")], tenant="acme")
    async with asyncio.timeout(120):
        await library.consumer("c").run(handle, stop)
    assert [type(event) for event in seen] == [Event, Erased, Event]
