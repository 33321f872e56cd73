"""Promise: the library's hard cases end as the issue says, each on a real database, with the sidecar beside it where both write.

First append of a hundred, fifty at once, look-alike names and every kind of value: tests/contract/test_event_store.py.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest

from sidecar import Erased, Event, Library, NewEvent, PolicySpec, open_library
from sidecar.core.errors import (
    AuthenticationFailed,
    Conflict,
    KmsUnavailable,
    RecordRefused,
    SidecarError,
    StoreUnavailable,
    StreamErased,
    UnknownKey,
)
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.store import Expected
from sidecar.key_management import KeyManagementService
from sidecar.postgres import audit, rotations, tenants
from sidecar.postgres.event_store import PostgresEventStore
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.world import World

STREAM = Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1")


@pytest.fixture
async def library(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Library]:
    """Deaf to the news of changed tenants: nothing here may depend on them."""

    async def deaf(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("sidecar.library._forget_what_changed", deaf)
    await world.migrate()
    async with open_library(world.settings, max_connections=4, writer="library-test") as opened:
        yield opened


def event(data: Any = "x", **more: Any) -> NewEvent:
    return NewEvent(type="T", data=data, **more)


async def values(library: Library, stream: str = "aes-1") -> list[Any]:
    read = await library.store.read_stream(stream, tenant="acme")
    return [held.data if isinstance(held, Event) else type(held) for held in read.events]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(120):
        while not await holds():  # noqa: ASYNC110 (several parties have a say in it)
            await asyncio.sleep(0.05)


# 3


async def test_more_workers_than_connections_do_not_wait_for_each_other(library: Library) -> None:
    """Four connections, forty workers, each in a session of its own, to streams that have no key yet."""

    async def work(number: int) -> None:
        async with library.store.session() as session:
            for n in range(3):
                await library.store.append_to_stream(f"aes-{number}", [event(n)], tenant=f"tenant-{number % 5}", session=session)

    async with asyncio.timeout(120):
        await asyncio.gather(*(work(number) for number in range(40)))
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages WHERE data_encrypted IS NOT NULL") == 120


# 5


async def test_an_append_that_is_rolled_back_leaves_nothing_or_a_harmless_key(library: Library) -> None:
    with pytest.raises(RuntimeError, match="no"):
        async with library.store.session() as session:
            await library.store.append_to_stream("aes-1", [event("never")], tenant="acme", session=session)
            raise RuntimeError("no")
    assert await library.plain.pool.fetchval("SELECT count(*) FROM messages") == 0
    assert await library.plain.pool.fetchval("SELECT count(*) FROM streams") == 0
    assert await library.plain.pool.fetchval("SELECT count(*) FROM stream_key_history") == 0
    await library.store.append_to_stream("aes-1", [event("then")], tenant="acme")
    assert await values(library) == ["then"]
    assert await library.plain.pool.fetchval("SELECT count(*) FROM encryption_keys WHERE scope_kind = 'stream'") == 1


# 6


@pytest.mark.parametrize(("module", "behind"), [(tenants, "lock"), (rotations, "retire"), (tenants, "next_epoch"), (audit, "append")])
async def test_a_rotation_that_dies_between_two_statements_is_undone_and_the_next_one_works(
    library: Library, monkeypatch: pytest.MonkeyPatch, module: ModuleType, behind: str
) -> None:
    await library.store.append_to_stream("aes-1", [event(1)], tenant="acme")
    real = getattr(module, behind)

    async def dies(connection: Any, *arguments: Any, **named: Any) -> Any:
        done = await real(connection, *arguments, **named)
        await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return done

    monkeypatch.setattr(module, behind, dies)
    with pytest.raises(StoreUnavailable):
        await library.keys.rotate_key(STREAM)
    monkeypatch.undo()
    assert await library.plain.pool.fetchval("SELECT count(*) FROM encryption_keys WHERE is_active") == 1
    await library.store.append_to_stream("aes-1", [event(2)], tenant="acme")
    assert await library.keys.rotate_key(STREAM) == 1
    await library.store.append_to_stream("aes-1", [event(3)], tenant="acme")
    assert await values(library) == [1, 2, 3]
    assert await library.plain.pool.fetchval("SELECT count(*) FROM audit_log WHERE action = 'keys.rotate'") == 1


# 7


async def test_rotations_against_appends_all_succeed_and_all_open(library: Library) -> None:
    await library.store.append_to_stream("aes-1", [event(-1)], tenant="acme")

    async def rotate() -> None:
        for _ in range(60):
            await library.keys.rotate_key(STREAM)
            await asyncio.sleep(0.02)  # or all of them are done before the second append has a key

    async def append() -> None:
        for n in range(200):
            await library.store.append_to_stream("aes-1", [event(n)], tenant="acme")

    await asyncio.gather(rotate(), append())
    assert await values(library) == [-1, *range(200)]
    versions = await library.plain.pool.fetch("SELECT * FROM stream_key_history WHERE stream_id = 'aes-1' ORDER BY used_from_position")
    assert len(versions) > 2
    ends = [row["used_to_position"] for row in versions]
    assert ends[-1] is None
    assert [row["used_from_position"] for row in versions] == [1, *(end + 1 for end in ends[:-1])]


# 8


async def test_an_aggregate_of_a_half_shredded_stream_is_an_error_and_no_state(library: Library) -> None:
    await library.store.append_to_stream("aes-1", [event(1)], tenant="acme")
    await library.keys.rotate_key(STREAM)
    await library.store.append_to_stream("aes-1", [event(2)], tenant="acme")
    total = await library.store.aggregate_stream("aes-1", lambda n, held: n + held.data, 0, tenant="acme")
    assert (total.state, total.version) == (3, 2)
    await library.plain.pool.execute(
        "UPDATE encryption_keys SET key_material = NULL, is_destroyed = true WHERE key_version = 1 AND scope_kind = 'stream'"
    )
    await library.plain.pool.execute("UPDATE tenants SET epoch = epoch + 1")
    assert await values(library) == [Erased, 2]
    with pytest.raises(StreamErased):
        await library.store.aggregate_stream("aes-1", lambda n, held: n + held.data, 0, tenant="acme")


# 9


async def test_tampered_shredded_missing_and_unreachable_are_four_different_answers(library: Library, world: World) -> None:
    for stream in ("aes-tampered", "aes-shredded", "aes-missing", "aes-away"):
        await library.store.append_to_stream(stream, [event()], tenant=f"of-{stream}")
    pool = library.plain.pool
    await pool.execute("UPDATE messages SET message_type = 'Other' WHERE stream_id = 'aes-tampered'")
    await pool.execute("UPDATE encryption_keys SET key_material = NULL, is_destroyed = true WHERE scope_id = 'aes-shredded'")
    await pool.execute("DELETE FROM encryption_keys WHERE scope_id = 'aes-missing'")
    async with open_library(world.settings, writer="second") as cold:
        with pytest.raises(AuthenticationFailed):
            await cold.store.read_stream("aes-tampered", tenant="of-aes-tampered")
        [held] = (await cold.store.read_stream("aes-shredded", tenant="of-aes-shredded")).events
        assert isinstance(held, Erased)
        with pytest.raises(UnknownKey):
            await _raised(cold, "aes-missing")
        (world.folder / "kek").rename(world.folder / "kek.away")
        try:
            with pytest.raises(KmsUnavailable):
                await cold.store.read_stream("aes-away", tenant="of-aes-away")
        finally:
            (world.folder / "kek.away").rename(world.folder / "kek")
        [held] = (await cold.store.read_stream("aes-away", tenant="of-aes-away")).events
        assert isinstance(held, Event)


async def _raised(library: Library, stream: str) -> None:
    await library.store.read_stream(stream, tenant=f"of-{stream}")


# 10


async def test_another_tenant_sees_nothing_and_learns_nothing(library: Library) -> None:
    await library.store.append_to_stream("aes-1", [event("secret")], tenant="acme")
    there = await library.store.read_stream("aes-1", tenant="globex")
    nowhere = await library.store.read_stream("aes-none", tenant="globex")
    assert (list(there.events), there.version) == (list(nowhere.events), nowhere.version) == ([], 0)
    # a row that somebody moved to the other tenant does not open there
    await library.plain.pool.execute("UPDATE messages SET tenant_id = 'globex'")
    await library.store.append_to_stream("aes-2", [event("own")], tenant="globex")
    with pytest.raises((AuthenticationFailed, UnknownKey)):
        await library.store.read_stream("aes-1", tenant="globex")


# 12


async def test_an_append_goes_by_indexes_however_many_streams_a_tenant_has(library: Library) -> None:
    pool = library.plain.pool
    await library.store.append_to_stream("aes-1", [event()], tenant="acme")
    await pool.execute(
        """INSERT INTO streams (tenant_id, stream_id, position, stream_type_class, is_encrypted)
           SELECT 'acme', 's' || n, 1, 'C', true FROM generate_series(1, 100000) n"""
    )
    await pool.execute(
        """INSERT INTO messages (tenant_id, stream_id, stream_position, message_id, message_type, data_encrypted)
           SELECT 'acme', 's' || n, 1, 'm', 'T', '\\x00' FROM generate_series(1, 100000) n"""
    )
    await pool.execute(
        """INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position)
           SELECT 'acme', 's' || n, gen_random_uuid(), 1, 1 FROM generate_series(1, 100000) n"""
    )
    await pool.execute("ANALYZE streams; ANALYZE messages; ANALYZE stream_key_history; ANALYZE erased_scopes")
    source = await pool.fetchval("SELECT string_agg(prosrc, '') FROM pg_proc WHERE proname IN ('append_events', 'note_keys')")
    asked = [
        "SELECT x.position, x.stream_type_class, x.is_encrypted FROM streams x WHERE x.tenant_id = 'acme' AND x.stream_id = 's5' FOR UPDATE",
        """SELECT m.stream_position FROM messages m WHERE m.tenant_id = 'acme' AND m.stream_id = 's5'
           ORDER BY m.stream_position DESC LIMIT 1""",
        """SELECT FROM stream_key_history h WHERE h.tenant_id = 'acme' AND h.stream_id = 's5'
           AND h.key_id = gen_random_uuid() AND h.key_version = 1 AND h.used_to_position IS NULL""",
        "SELECT FROM erased_scopes e WHERE e.tenant_id = 'acme' AND e.readmitted_at IS NULL AND e.scope_kind = 'stream' AND e.scope_id = 's5'",
    ]
    for statement in asked:
        table = re.search(r"FROM (\w+)", statement)
        assert table and f"FROM {table[1]}" in source.replace("SELECT FROM", "FROM"), "the function asks something else now"
        plan = "\n".join(row[0] for row in await pool.fetch(f"EXPLAIN {statement}"))
        assert "Seq Scan" not in plan or "erased_scopes" in plan, plan  # an empty table is read whole
    await pool.execute("SET enable_seqscan = off")
    await library.store.append_to_stream("aes-1", [event()], tenant="acme")
    assert (await library.store.read_stream("aes-1", tenant="acme")).version == 2


# 13


async def test_library_and_sidecar_write_the_same_streams_at_once(library: Library, world: World) -> None:
    await asyncio.to_thread(world.run)

    def publish() -> None:
        for n in range(300):
            world.event(world.topic("in"), b'"kafka %d"' % n, stream=f"aes-{n % 3}")
            if n % 30 == 0:
                world.flush()
        world.flush()

    async def append(stream: int) -> None:
        for n in range(40):
            await library.store.append_to_stream(f"aes-{stream}", [event(f"library {n}")], tenant="acme")

    await asyncio.gather(asyncio.to_thread(publish), *(append(stream) for stream in range(3)))
    await asyncio.to_thread(world.settle)
    for stream in range(3):
        read = await library.store.read_stream(f"aes-{stream}", tenant="acme")
        assert [held.position for held in read.events] == list(range(1, 141))
        said = [held.data for held in read.events if isinstance(held, Event)]
        assert [text for text in said if text.startswith("library")] == [f"library {n}" for n in range(40)]
        assert [text for text in said if text.startswith("kafka")] == [f"kafka {n}" for n in range(stream, 300, 3)]
    seen = await asyncio.to_thread(world.events, "acme")
    assert {row["status"] for row in seen} == {"ok"}
    assert len(seen) == 420
    history = await library.plain.pool.fetch("SELECT count(*) AS n FROM stream_key_history GROUP BY stream_id")
    assert {row["n"] for row in history} == {1}


async def write_in_turns(library: Library, world: World) -> list[str]:
    """Another library rotates the stream's key by count, of which this one hears nothing. -> what is wrong with the record of its keys."""
    limits = world.settings.limits.model_copy(update={"soft_uses": 2, "hard_uses": 3})
    async with open_library(world.settings.model_copy(update={"limits": limits}), writer="other") as other:
        for _ in range(2):
            await library.store.append_to_stream("aes-1", [event()], tenant="acme")
            for _ in range(4):
                await other.store.append_to_stream("aes-1", [event()], tenant="acme")
            head = (await library.plain.read_stream("aes-1", tenant="acme")).version
            await library.store.append_to_stream("aes-1", [event()], tenant="acme", expected_version=head)
    assert await library.plain.pool.fetchval("SELECT max(key_version) FROM encryption_keys") > 2
    return await asyncio.to_thread(key_history_faults, world)


async def test_two_libraries_that_write_a_stream_in_turns_leave_its_keys_on_record(library: Library, world: World) -> None:
    assert await write_in_turns(library, world) == []


async def test_control_one_that_takes_its_own_last_word_for_the_records_leaves_them_wrong(
    library: Library, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PostgresEventStore.append_to_stream

    async def trusting(self: Any, *arguments: Any, noted: bool = False, **more: Any) -> Any:
        return await append(self, *arguments, noted=True, **more)

    monkeypatch.setattr(PostgresEventStore, "append_to_stream", trusting)
    assert await write_in_turns(library, world) != []


# 14


@asynccontextmanager
async def appending(library: Library, outcomes: list[str]) -> AsyncIterator[None]:
    stop = asyncio.Event()

    async def append() -> None:
        while not stop.is_set():
            try:
                await library.store.append_to_stream("aes-1", [event()], tenant="acme")
                outcomes.append("stored")
            except RecordRefused:
                outcomes.append("refused")
                await asyncio.sleep(0.005)

    tasks = [asyncio.create_task(append()) for _ in range(3)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def stored_after(library: Library, receipt: dict[str, Any]) -> int:
    return int(
        await library.plain.pool.fetchval(
            "SELECT count(*) FROM messages WHERE stream_id = 'aes-1' AND created_at > $1::text::timestamptz", receipt["inaccessible_at"]
        )
    )


async def shred_while_appending(library: Library, world: World) -> tuple[dict[str, Any], list[str], int]:
    outcomes: list[str] = []
    await asyncio.to_thread(world.control)
    async with appending(library, outcomes):
        await until(lambda: _has(outcomes, "stored", 20))
        receipt = await asyncio.to_thread(world.carry_out, "shred", STREAM)
        outcomes.clear()
        await until(lambda: _has(outcomes, "", 20))
    return receipt, outcomes, await stored_after(library, receipt)


async def _has(outcomes: list[str], which: str, count: int) -> bool:
    return sum(outcome.startswith(which) for outcome in outcomes) >= count


async def test_a_shred_during_appends_is_linearizable(library: Library, world: World) -> None:
    receipt, outcomes, later = await shred_while_appending(library, world)
    assert receipt["status"] == "inaccessible"
    assert set(outcomes) == {"refused"}
    assert later == 0
    assert set(await values(library)) == {Erased}
    assert receipt["events"]["unreadable"] == len(await values(library))


async def test_control_without_the_checks_of_the_append_events_are_stored_after_the_receipt(library: Library, world: World) -> None:
    """The warm key still seals, and the store takes it: the same checker sees it."""
    await library.store.append_to_stream("aes-1", [event()], tenant="acme")
    source = await library.plain.pool.fetchval("SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = 'append_events'")
    broken = source.replace("t.epoch <> epoch", "false").replace("e.readmitted_at IS NULL", "false")
    assert broken.count("false") >= source.count("false") + 2
    await library.plain.pool.execute(broken)
    _, outcomes, later = await shred_while_appending(library, world)
    assert later > 0
    assert "stored" in outcomes


class Unguarded(KeyManagementService):
    """Opens with what it has in hand, and asks nobody whether that still holds."""

    @asynccontextmanager
    async def guard(self, tenant: str) -> AsyncIterator[int | None]:
        yield self._opening[tenant][0]


async def read_after_a_shred(library: Library, world: World) -> list[Any]:
    await library.store.append_to_stream("aes-1", [event("secret")], tenant="acme")
    assert await values(library) == ["secret"]
    await asyncio.to_thread(world.control)
    receipt = await asyncio.to_thread(world.carry_out, "shred", STREAM)
    assert receipt["status"] == "inaccessible"
    return await values(library)


async def test_a_read_with_warm_keys_after_the_receipt_opens_nothing(library: Library, world: World) -> None:
    assert await read_after_a_shred(library, world) == [Erased]


async def test_control_without_the_guard_a_warm_read_opens_what_was_shredded(library: Library, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.keys, "guard", Unguarded.guard.__get__(library.keys))
    assert await read_after_a_shred(library, world) == ["secret"]


# 15


async def test_a_policy_that_turns_to_encryption_in_mid_stream(library: Library) -> None:
    await library.policies.create_policy(PolicySpec.model_validate({"class": "Turns", "encrypt": False}), actor="a", reason="r")
    for n in range(3):
        await library.store.append_to_stream("turns-1", [event(n)], tenant="acme", stream_class="Turns")
    [policy] = await library.policies.get_policies_for_stream_type("Turns")
    await library.policies.update_policy(policy.policy_id, {"encrypt": True}, actor="a", reason="it is personal after all")
    for n in range(3, 6):
        await library.store.append_to_stream("turns-1", [event(n)], tenant="acme")
    sealed = await library.plain.pool.fetch("SELECT data_encrypted IS NOT NULL AS sealed FROM messages ORDER BY stream_position")
    assert [row["sealed"] for row in sealed] == [False] * 3 + [True] * 3
    assert await values(library, "turns-1") == list(range(6))
    with pytest.raises(AuthenticationFailed):  # not even the undecorated store takes plaintext now
        await library.plain.append_to_stream("turns-1", [event("planted")], tenant="acme")
    await library.plain.pool.execute("UPDATE messages SET data = '\"planted\"', data_encrypted = NULL, metadata = '{}' WHERE stream_position = 5")
    with pytest.raises(AuthenticationFailed):
        await library.store.read_stream("turns-1", tenant="acme")


# 16


async def test_a_second_policy_for_one_tenant_and_class_is_refused(library: Library) -> None:
    spec = PolicySpec.model_validate({"class": "C", "tenant": "acme"})
    await library.policies.create_policy(spec, actor="a", reason="r")
    with pytest.raises(Conflict):
        await library.policies.create_policy(spec, actor="b", reason="r")
    assert len(await library.policies.get_policies_for_stream_type("C")) == 1


async def test_an_expected_version_decides_between_library_processes_too(library: Library, world: World) -> None:
    async with open_library(world.settings, writer="second") as other:
        await library.store.append_to_stream("aes-1", [event(0)], tenant="acme", expected_version=Expected.NO_STREAM)
        both = await asyncio.gather(
            *(each.store.append_to_stream("aes-1", [event(1)], tenant="acme", expected_version=1) for each in (library, other) * 5),
            return_exceptions=True,
        )
        assert sum(not isinstance(outcome, SidecarError) for outcome in both) == 1
        for n in range(5):
            await other.store.append_to_stream("aes-1", [event(n)], tenant="acme")
            await library.store.append_to_stream("aes-1", [event(n)], tenant="acme")
    assert (await library.store.read_stream("aes-1", tenant="acme")).version == 12
