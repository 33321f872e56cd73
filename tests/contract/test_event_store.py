"""What every event store promises, in memory and in Postgres alike."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.errors import MalformedRecord, WrongVersion
from sidecar.core.store import Cursor, Expected, NewEvent
from sidecar.crypto_store import create_crypto_event_store
from sidecar.key_management import KeyManagementService
from sidecar.keys import KeyManagement
from sidecar.kms import open_kms
from sidecar.kms.file import create_key_file
from sidecar.postgres import migrations
from sidecar.postgres.connection import connect, open_pool
from sidecar.postgres.event_store import PostgresEventStore
from sidecar.steps import SystemClock
from sidecar.testing.memory import MemoryEventStore

Store = Any


@pytest.fixture(params=["memory", "postgres", "encrypted memory", "encrypted postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Every store, and each of them decorated; in the latter every class but CartData is encrypted."""
    decorated, _, kind = request.param.rpartition(" ")
    if request.param == "memory":
        yield MemoryEventStore()
        return
    dsn = request.getfixturevalue("database")
    connection = await connect(dsn)
    await migrations.migrate(connection)
    await connection.close()
    create_key_file(tmp_path / "kek")
    pool, keys_pool = await open_pool(dsn, max_size=4), await open_pool(dsn, max_size=2)
    base: Store = PostgresEventStore(pool) if kind == "postgres" else MemoryEventStore()
    keys = KeyManagementService(keys_pool, KeyManagement(open_kms(f"file:{tmp_path / 'kek'}")), clock=SystemClock())
    yield create_crypto_event_store(base, keys=keys) if decorated else base
    await pool.close()
    await keys_pool.close()


def events(count: int, first: int = 1) -> list[NewEvent]:
    return [NewEvent(type="Counted", data={"n": n}, id=f"e{n}") for n in range(first, first + count)]


async def all_of(store: Store, count: int, **wanted: Any) -> list[tuple[Cursor, Any]]:
    """The global order once it has so many events: they come into it when every transaction that began before them has ended."""
    async with asyncio.timeout(60):
        while len(found := list(await store.read_all(**wanted))) < count:  # noqa: ASYNC110 (other databases' transactions count too)
            await asyncio.sleep(0.02)
    return found


async def test_first_append_of_a_hundred_events_is_stored(store: Store) -> None:
    done = await store.append_to_stream("cart-1", events(100), stream_class="CartData")
    assert (done.first, done.last, done.created) == (1, 100, True)
    read = await store.read_stream("cart-1")
    assert read.version == 100
    assert [(e.position, e.data, e.message_id) for e in read.events] == [(n, {"n": n}, f"e{n}") for n in range(1, 101)]
    assert {e.stream_class for e in read.events} == {"CartData"}


async def test_a_stream_that_is_not_there_reads_as_version_0(store: Store) -> None:
    read = await store.read_stream("nothing")
    assert (list(read.events), read.version) == ([], 0)


@pytest.mark.parametrize(
    ("window", "positions"),
    [
        ({"from_position": 3}, [3, 4, 5]),
        ({"to_position": 2}, [1, 2]),
        ({"from_position": 2, "to_position": 4}, [2, 3, 4]),
        ({"from_position": 2, "max_count": 2}, [2, 3]),
        ({"max_count": 0}, []),
        ({"from_position": 6}, []),
    ],
)
async def test_a_read_is_of_a_window_and_says_the_version_of_the_whole(store: Store, window: dict[str, int], positions: list[int]) -> None:
    await store.append_to_stream("s", events(5))
    read = await store.read_stream("s", **window)
    assert ([e.position for e in read.events], read.version) == (positions, 5)


@pytest.mark.parametrize(("expected", "before", "fits"), [
    (Expected.ANY, 0, True), (Expected.ANY, 2, True),
    (Expected.NO_STREAM, 0, True), (Expected.NO_STREAM, 2, False),
    (Expected.STREAM_EXISTS, 0, False), (Expected.STREAM_EXISTS, 2, True),
    (0, 0, True), (0, 2, False), (2, 2, True), (1, 2, False), (3, 2, False), (1, 0, False),
])  # fmt: skip
async def test_an_expected_version_is_met_or_nothing_is_appended(store: Store, expected: Any, before: int, fits: bool) -> None:
    if before:
        await store.append_to_stream("s", events(before))
    if fits:
        assert (await store.append_to_stream("s", events(1, 50), expected_version=expected)).first == before + 1
    else:
        with pytest.raises(WrongVersion):
            await store.append_to_stream("s", events(1, 50), expected_version=expected)
        assert (await store.read_stream("s")).version == before


async def test_fifty_appends_at_once_all_succeed_and_leave_no_gap(store: Store) -> None:
    await asyncio.gather(*(store.append_to_stream("s", events(2, n * 10)) for n in range(50)))
    read = await store.read_stream("s")
    assert [e.position for e in read.events] == list(range(1, 101))
    assert len({e.message_id for e in read.events}) == 100


async def test_of_fifty_appends_with_the_same_expected_version_exactly_one_succeeds(store: Store) -> None:
    await store.append_to_stream("s", events(3))
    done = await asyncio.gather(*(store.append_to_stream("s", events(1, 100 + n), expected_version=3) for n in range(50)), return_exceptions=True)
    assert sum(not isinstance(outcome, BaseException) for outcome in done) == 1
    assert {type(outcome) for outcome in done if isinstance(outcome, BaseException)} == {WrongVersion}
    assert (await store.read_stream("s")).version == 4


async def test_a_session_is_there_as_a_whole_or_not_at_all(store: Store) -> None:
    async with store.session() as session:
        await store.append_to_stream("a", events(2), session=session)
        await store.append_to_stream("a", events(1, 9), session=session)
        await store.append_to_stream("b", events(1), session=session)
        assert (await store.read_stream("a", session=session)).version == 3
        if not isinstance(store, MemoryEventStore):
            assert (await store.read_stream("a")).version == 0
    assert [(await store.read_stream(name)).version for name in ("a", "b")] == [3, 1]
    with pytest.raises(RuntimeError, match="no"):
        async with store.session() as session:
            await store.append_to_stream("a", events(1, 20), session=session)
            raise RuntimeError("no")
    assert [(await store.read_stream(name)).version for name in ("a", "b")] == [3, 1]


async def test_a_session_in_memory_that_another_was_faster_than_leaves_nothing() -> None:
    """Over Postgres the other one waits for it."""
    store = MemoryEventStore()
    with pytest.raises(WrongVersion):
        async with store.session() as session:
            await store.append_to_stream("a", events(1), session=session)
            await store.append_to_stream("b", events(1), session=session)
            await store.append_to_stream("b", events(1))
    assert ((await store.read_stream("a")).version, (await store.read_stream("b")).version, len(await store.read_all())) == (0, 1, 1)


async def test_a_refused_append_leaves_its_session_usable(store: Store) -> None:
    async with store.session() as session:
        with pytest.raises(WrongVersion):
            await store.append_to_stream("a", events(1), expected_version=7, session=session)
        await store.append_to_stream("a", events(1), session=session)
    assert (await store.read_stream("a")).version == 1


@pytest.mark.parametrize(
    "data", [None, b"", b"\x00\xff\xfe no JSON", b'{"a": 1}', "", "text", 0, 1.5, [], {}, {"n": [1, {"x": None}]}, "ks1.not-an-envelope", os.urandom(10 * 2**20)],
    ids=lambda value: f"{type(value).__name__}-{len(value) if isinstance(value, bytes | str | list | dict) else value}",
)  # fmt: skip
async def test_whatever_was_appended_comes_back_the_same(store: Store, data: Any) -> None:
    await store.append_to_stream("s", [NewEvent(type="T", data=data, metadata={"who": "me", "n": 1}, schema_version=3)])
    [event] = (await store.read_stream("s")).events
    assert event.data == data
    assert type(event.data) is type(data)
    assert ({name: value for name, value in event.metadata.items() if name != "enc"}, event.schema_version) == ({"who": "me", "n": 1}, 3)
    assert (event.value is None) == (data is None)


@pytest.mark.parametrize("bad", [{"tenant": "no slash/"}, {"tenant": ""}, {"stream": ""}, {"stream": "x" * 256}, {"stream": "nul\0"}, {"type": ""}])
async def test_ids_that_are_none_are_refused(store: Store, bad: dict[str, str]) -> None:
    stream, kind = bad.get("stream", "s"), bad.get("type", "T")
    with pytest.raises(MalformedRecord):
        await store.append_to_stream(stream, [NewEvent(type=kind, data=1)], tenant=bad.get("tenant", "acme"))


async def test_what_stands_beside_the_data_comes_back_the_same_or_is_refused(store: Store) -> None:
    at, metadata = datetime(2024, 2, 29, 12, tzinfo=UTC), {"by": "jane", "n": [1, None]}
    await store.append_to_stream("s", [NewEvent(type="T", data=1, id="e1", metadata=metadata, occurred_at=at, schema_version=7, subject="c-17")])
    [event] = (await store.read_stream("s")).events
    assert (event.message_id, event.occurred_at, event.schema_version, event.subject) == ("e1", at, 7, "c-17")
    assert {name: value for name, value in event.metadata.items() if name != "enc"} == metadata
    for bad in ({"id": "nul\0"}, {"metadata": {"a": object()}}):
        with pytest.raises(MalformedRecord):
            await store.append_to_stream("s", [NewEvent(type="T", data=1, **bad)])


async def test_data_that_is_neither_bytes_nor_json_is_refused(store: Store) -> None:
    """NaN would come back as null."""
    for bad in (object(), float("nan"), {"a": [None, {"b": float("inf")}]}):
        with pytest.raises(MalformedRecord):
            await store.append_to_stream("s", [NewEvent(type="T", data=bad)])
    with pytest.raises(MalformedRecord):
        await store.append_to_stream("s", [])
    assert (await store.read_stream("s")).version == 0


async def test_tenants_do_not_see_each_other(store: Store) -> None:
    for tenant in ("acme", "globex"):
        await store.append_to_stream("same", [NewEvent(type="T", data=tenant)], tenant=tenant)
    assert [e.data for e in (await store.read_stream("same", tenant="acme")).events] == ["acme"]
    assert [e.data for _, e in await all_of(store, 1, tenant="globex")] == ["globex"]


async def test_streams_whose_names_look_alike_are_different(store: Store) -> None:
    names = ["user_1", "user-1", "user%1", "user 1", "User_1", "üser_1"]
    for name in names:
        await store.append_to_stream(name, [NewEvent(type="T", data=name)])
    assert [[e.data for e in (await store.read_stream(name)).events] for name in names] == [[name] for name in names]


async def test_an_aggregate_is_of_all_events_and_says_their_version(store: Store) -> None:
    await store.append_to_stream("s", events(4))
    found = await store.aggregate_stream("s", lambda total, event: total + event.data["n"], 0)
    assert (found.state, found.version) == (10, 4)
    empty = await store.aggregate_stream("none", lambda total, event: total, 0)
    assert (empty.state, empty.version) == (0, 0)


async def test_global_order_is_read_in_pages_by_tenant_and_class(store: Store) -> None:
    for n in range(6):
        await store.append_to_stream(f"s{n % 2}", events(1, n), tenant=("a", "b")[n % 2], stream_class=("C", "D")[n % 2])
    seen: list[int] = []
    cursor = Cursor()
    await all_of(store, 6)
    while page := await store.read_all(after=cursor, limit=4):
        seen += [event.data["n"] for _, event in page]
        cursor = page[-1][0]
    assert seen == list(range(6))
    assert [e.data["n"] for _, e in await store.read_all(classes=["D"])] == [1, 3, 5]
    assert [e.data["n"] for _, e in await store.read_all(tenant="a", after=cursor)] == []


async def test_a_reader_of_the_global_order_misses_nothing_while_writers_are_slow(store: Store) -> None:
    """A transaction that began first and commits last: its event must not appear behind a place that a reader has passed."""
    await store.append_to_stream("other", events(1, 0))  # a tenant's first append is waited for by its second
    start = (await all_of(store, 1))[-1][0]
    async with store.session() as slow:
        await store.append_to_stream("slow", events(1), session=slow)
        await store.append_to_stream("fast", events(1, 2))
        early = [e.message_id for _, e in await store.read_all(after=start)]
    found = await all_of(store, 2, after=start)
    cursor, late = found[-1][0], [e.message_id for _, e in found]
    assert early in ([], ["e2"])
    assert sorted(late) == ["e1", "e2"]
    assert late[: len(early)] == early
    assert list(await store.read_all(after=cursor)) == []
