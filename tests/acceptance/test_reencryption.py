"""Promise: stored events are sealed anew in place, by any number of workers, while others read and write; a kill loses nothing, a shred wins."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar import Library, NewEvent, PolicySpec, open_library
from sidecar.core.envelope import parse_header
from sidecar.core.model import Scope, ScopeKind
from sidecar.key_management import KeyManagementService
from sidecar.keys import KeyManagement
from sidecar.kms import open_for
from sidecar.postgres import jobs
from sidecar.postgres.connection import open_pool, transaction
from sidecar.reencryption import Reencryption
from sidecar.steps import SystemClock
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.world import Plane, World

ACME = Scope.of_tenant("acme")
DIES = "import os; os.environ['SIDECAR_TEST_FAILPOINT'] = {!r}; from sidecar.cli import main; main()"


def of_stream(name: str) -> Scope:
    return Scope(tenant="acme", kind=ScopeKind.STREAM, id=name)


async def fill(world: World, streams: dict[str, int]) -> None:
    """So many events in each stream, through the library."""
    async with open_library(world.settings, writer="library-test") as library:
        for stream, count in streams.items():
            for at in range(0, count, 500):
                events = [NewEvent(type="T", data={"of": stream, "n": n}, metadata={"by": "jane"}) for n in range(at, min(at + 500, count))]
                await library.store.append_to_stream(stream, events, tenant="acme")


def stored(world: World) -> list[dict[str, Any]]:
    """What re-encryption must not touch."""
    rows = world.sql("SELECT * FROM messages ORDER BY tenant_id, stream_id, stream_position")
    return [{name: value for name, value in row.items() if name not in ("data", "data_encrypted", "metadata")} for row in rows]


def keys_in_use(world: World, stream: str) -> set[tuple[UUID, int, str, str]]:
    headers = [parse_header(bytes(r[0])) for r in world.sql("SELECT data_encrypted FROM messages WHERE stream_id = $1", stream)]
    return {(h.key_id, h.key_version, h.suite.label, h.scope_kind.value) for h in headers}


def worker(world: World, name: str = "one", *, dies_at: str = "") -> Plane:
    started = world.start("worker", "--instance-id", name, code=DIES.format(dies_at) if dies_at else "")
    return started if dies_at else started.wait_ready()


def test_events_of_rotated_keys_are_sealed_under_the_newest_version_and_nothing_else_changes(world: World) -> None:
    asyncio.run(fill(world, {"aes-1": 1200, "aes-2": 3, "tenant-1": 10, "cart-1": 2}))
    world.control()
    worker(world)
    before, opened = stored(world), world.events("acme")
    [(key_id, _, suite, kind)] = keys_in_use(world, "aes-1")
    assert world.carry_out("rotate", ACME)["status"] == "done"
    receipt = world.carry_out("reencrypt", ACME, final=("done", "rejected", "failed"))
    assert (receipt["status"], receipt["events"]) == ("done", {"resealed": 1213, "left": 0, "chunks": 1})
    assert keys_in_use(world, "aes-1") == {(key_id, 2, suite, kind)}
    assert (stored(world), world.events("acme")) == (before, opened)
    assert key_history_faults(world) == []
    assert world.sql("SELECT encrypted_from_position FROM streams WHERE stream_id = 'aes-1'")[0][0] == 1
    [row] = world.json("jobs", "list")
    assert (row["state"], row["resealed"], row["workers"]) == ("done", 1213, 1)
    assert world.json("jobs", "watch", row["command_id"])["state"] == "done"
    again = world.carry_out("reencrypt", ACME, final=("done", "rejected", "failed"))
    assert again["events"]["resealed"] == 0, "there is nothing left to do"


def test_an_algorithm_that_policy_changes_reaches_the_old_events_too(world: World) -> None:
    asyncio.run(fill(world, {"aes-1": 30}))
    world.control()
    worker(world)

    async def change() -> None:
        async with open_library(world.settings, writer="library-test") as library:
            await library.policies.create_policy(PolicySpec(stream_class="Aes", algorithm="ChaCha20-Poly1305"), actor="a test", reason="a test")

    asyncio.run(change())
    opened = world.events("acme")
    said = world.json("reencrypt", "--tenant", "acme", "--class", "Aes", "--reason", "a test", "--wait", "60")
    assert (said["status"], said["events"]["resealed"]) == ("done", 30)
    assert {use[2] for use in keys_in_use(world, "aes-1")} == {"ChaCha20-Poly1305"}
    assert world.events("acme") == opened
    assert key_history_faults(world) == []


def test_a_stream_that_is_split_off_a_shared_key_can_be_shredded_alone(world: World) -> None:
    world.run().stop()  # its policies are installed
    asyncio.run(fill(world, {"class-1": 20, "class-2": 20}))
    world.control()
    worker(world)
    assert world.carry_out("shred", of_stream("class-1"))["error"]["code"] == "shared_key"
    said = world.json("reencrypt", "--tenant", "acme", "--stream", "class-1", "--split", "--reason", "a test", "--wait", "60")
    assert (said["status"], said["events"]["resealed"]) == ("done", 20)
    asyncio.run(fill(world, {"class-1": 5}))
    assert {use[3] for use in keys_in_use(world, "class-1")} == {"stream"}, "what came later is under the stream's own key too"
    assert key_history_faults(world) == []
    assert world.carry_out("shred", of_stream("class-1"))["status"] == "inaccessible"
    assert {event["status"] for event in world.events("acme", stream="class-1")} == {"erased"}
    assert {event["status"] for event in world.events("acme", stream="class-2")} == {"ok"}


@pytest.mark.parametrize("dies_at", ["worker:opened", "worker:rows", "worker:stream"])
def test_a_chunk_of_a_killed_worker_is_done_by_another(world: World, dies_at: str) -> None:
    asyncio.run(fill(world, {"aes-1": 1100, "aes-2": 600}))
    control = world.control()
    before, opened = stored(world), world.events("acme")
    assert world.carry_out("rotate", ACME)["status"] == "done"
    first = worker(world, "first", dies_at=dies_at)
    command_id = world.json("reencrypt", "--tenant", "acme", "--reason", "a test")["command_id"]
    assert first.process.wait(60) == -9, first.text()[-2000:]
    control.kill()
    world.control()
    worker(world, "second")
    receipt = world.receipt(command_id, ("done",))
    assert receipt["events"]["resealed"] == 1700
    assert (stored(world), world.events("acme")) == (before, opened)
    assert {use[1] for name in ("aes-1", "aes-2") for use in keys_in_use(world, name)} == {2}
    assert key_history_faults(world) == []


@pytest.mark.parametrize("dies_at", ["reencrypt:accepted", "reencrypt:published"])
def test_a_control_plane_that_is_killed_leaves_a_re_encryption_that_the_next_one_ends(world: World, dies_at: str) -> None:
    asyncio.run(fill(world, {"aes-1": 10}))
    first = world.control()
    assert world.carry_out("rotate", ACME)["status"] == "done"
    first.stop()
    dying = world.start("control", code=DIES.format(dies_at)).wait_ready()
    command_id = world.json("reencrypt", "--tenant", "acme", "--reason", "a test")["command_id"]
    assert dying.process.wait(60) == -9, dying.text()[-2000:]
    world.control()
    worker(world)
    assert world.receipt(command_id, ("done",))["events"]["resealed"] == 10
    assert {use[1] for use in keys_in_use(world, "aes-1")} == {2}


def test_two_workers_share_the_chunks(make_world: Callable[..., World]) -> None:
    world = make_world(jobs={"topic": "jobs-of-two", "partitions": 8, "max_rows_per_second": 20})
    asyncio.run(fill(world, {f"aes-{n}": 2 for n in range(160)}))
    world.control()
    worker(world, "one")
    worker(world, "two")
    assert world.carry_out("rotate", ACME)["status"] == "done"
    command_id = world.json("reencrypt", "--tenant", "acme", "--reason", "a test")["command_id"]
    assert world.receipt(command_id, ("done",))["events"]["resealed"] == 320
    assert {row["worker"] for row in world.sql("SELECT worker FROM jobs WHERE command_id = $1::text::uuid", command_id)} == {"one", "two"}
    assert key_history_faults(world) == []


def test_library_and_data_plane_write_while_events_are_sealed_anew(world: World) -> None:
    asyncio.run(fill(world, {"aes-1": 2000}))
    world.control()
    world.run()
    worker(world)
    assert world.carry_out("rotate", ACME)["status"] == "done"
    command_id = world.json("reencrypt", "--tenant", "acme", "--reason", "a test")["command_id"]

    async def write(library: Library) -> None:
        for n in range(40):
            await library.store.append_to_stream("aes-1", [NewEvent(type="T", data=n)], tenant="acme")
            world.event(world.settings.sources[0].topic, b"%d" % n, stream="aes-1")
            world.flush()
            read = await library.store.read_stream("aes-1", tenant="acme", from_position=1900)
            assert len(read.events) > n

    async def main() -> None:
        async with open_library(world.settings, writer="library-test") as library:
            await write(library)

    asyncio.run(main())
    world.settle()
    assert world.receipt(command_id, ("done",))["events"]["resealed"] >= 2000
    events = world.events("acme", stream="aes-1")
    assert [event["position"] for event in events] == list(range(1, 2081))
    assert {event["status"] for event in events} == {"ok"}
    assert key_history_faults(world) == []


# ── a shred in the middle of it ─────────────────────────────────────────────────────────────────────────────────────────


class Trusting(Reencryption):
    """Broken: it believes that the keys in hand are those of now."""

    @staticmethod
    def _is_now(held: Any, now: Any) -> bool:
        return True


@asynccontextmanager
async def paused(
    world: World, kind: type[Reencryption], meanwhile: Callable[[], Any], *, stream: str = "aes-1", plain: bool = False
) -> AsyncIterator[tuple[Reencryption, UUID]]:
    """A re-encryption of a stream that has opened keys in hand when `meanwhile` happens."""
    pool = await open_pool(world.settings.postgres.for_role("control"), application_name="a test")
    try:
        keys = KeyManagementService(pool, KeyManagement(open_for(world.settings.kms, "data")), clock=SystemClock(), writer="worker-test")
        work = kind(pool, keys, worker="test")
        as_of = work._as_of
        done: list[Any] = []

        @asynccontextmanager
        async def late(held: Any, *, alone: bool) -> AsyncIterator[Any]:
            if not done:
                done.append(await asyncio.to_thread(meanwhile))
            async with as_of(held, alone=alone) as connection:
                yield connection

        work._as_of = late  # type: ignore[method-assign]
        command_id = uuid4()
        async with transaction(pool) as connection:
            assert await jobs.plan(connection, command_id, of_stream(stream), plain=plain) == 1
        yield work, command_id
    finally:
        await pool.close()


def bytes_of(world: World) -> list[Any]:
    return [bytes(row[0]) for row in world.sql("SELECT data_encrypted FROM messages ORDER BY stream_position")]


def resealed_after_a_shred(world: World, kind: type[Reencryption]) -> bool:
    asyncio.run(fill(world, {"aes-1": 20}))
    world.control()
    assert world.carry_out("rotate", ACME)["status"] == "done"
    before = bytes_of(world)

    async def main() -> None:
        async with paused(world, kind, lambda: world.carry_out("shred", of_stream("aes-1"))) as (work, command_id):
            await work.work(command_id, 0)

    asyncio.run(main())
    assert world.value("SELECT state FROM jobs") == "done"
    return bytes_of(world) != before


def test_nothing_is_sealed_anew_after_a_shred(world: World) -> None:
    assert not resealed_after_a_shred(world, Reencryption)
    assert {event["status"] for event in world.events("acme")} == {"erased"}
    assert world.value("SELECT left_alone FROM jobs") == 20


def test_without_the_epoch_a_worker_seals_anew_what_was_shredded(world: World) -> None:
    """The control: the same look at the same bytes, and it is red."""
    assert resealed_after_a_shred(world, Trusting)


def test_a_row_that_is_not_as_it_was_read_is_left_to_whoever_changed_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with the same chunk: the second one's writes find nothing. And the control: without the 25 bytes, they would."""
    asyncio.run(fill(world, {"aes-1": 20}))
    world.control()
    assert world.carry_out("rotate", ACME)["status"] == "done"
    seen: list[int] = []
    replace = jobs.replace

    async def noted(*arguments: Any) -> Any:
        written = await replace(*arguments)
        seen.append(len(written))
        return written

    monkeypatch.setattr(jobs, "replace", noted)

    async def both(first: type[Reencryption]) -> None:
        async def other() -> None:
            async with paused(world, Reencryption, lambda: None) as (work, command_id):
                await work.work(command_id, 0)

        async with paused(world, first, lambda: asyncio.run(other())) as (work, command_id):
            await work.work(command_id, 0)

    asyncio.run(both(Reencryption))
    assert seen == [20, 0]
    assert {event["status"] for event in world.events("acme")} == {"ok"}
    assert key_history_faults(world) == []
