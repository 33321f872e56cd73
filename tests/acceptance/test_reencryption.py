"""Promise: stored events are sealed anew in place, by any number of workers, while others read and write; a kill loses nothing, a shred wins."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar import Library, NewEvent, PolicySpec, open_library, reencryption
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
    said = world.json("reencrypt", "--tenant", "acme", "--class", "Aes", "--reason", "a test", "--wait", "100")
    assert (said["status"], said["events"]["resealed"]) == ("done", 30)
    assert {use[2] for use in keys_in_use(world, "aes-1")} == {"ChaCha20-Poly1305"}
    assert world.events("acme") == opened
    assert key_history_faults(world) == []


def test_only_events_of_an_algorithm_or_of_a_key_version_are_sealed_anew_where_that_is_asked_for(world: World) -> None:
    world.control()
    worker(world)

    async def change() -> None:
        async with open_library(world.settings, writer="library-test") as library:
            await library.policies.create_policy(PolicySpec(stream_class="Aes", algorithm="ChaCha20-Poly1305"), actor="a test", reason="a test")

    for count in (10, 20):
        asyncio.run(fill(world, {"aes-1": count}))
        assert world.carry_out("rotate", ACME)["status"] == "done"
    asyncio.run(change())
    asyncio.run(fill(world, {"aes-1": 5}))
    assert world.carry_out("rotate", ACME)["status"] == "done"
    opened, asked = world.events("acme"), ("reencrypt", "--tenant", "acme", "--reason", "a test", "--wait", "100")
    assert world.json(*asked, "--key-version", "1")["events"]["resealed"] == 10
    assert {use[1:3] for use in keys_in_use(world, "aes-1")} == {(2, "AES-256-GCM"), (3, "ChaCha20-Poly1305"), (4, "ChaCha20-Poly1305")}
    assert world.json(*asked, "--algorithm", "AES-256-GCM")["events"]["resealed"] == 20
    assert {use[1:3] for use in keys_in_use(world, "aes-1")} == {(3, "ChaCha20-Poly1305"), (4, "ChaCha20-Poly1305")}
    assert world.events("acme") == opened
    assert key_history_faults(world) == []
    assert world.carry_out("reencrypt", ACME, options={"algorithm": "ROT13"})["error"]["code"] == "malformed"


def test_a_stream_that_is_split_off_a_shared_key_can_be_shredded_alone(world: World) -> None:
    world.run().stop()  # its policies are installed
    asyncio.run(fill(world, {"class-1": 20, "class-2": 20}))
    world.control()
    worker(world)
    assert world.carry_out("shred", of_stream("class-1"))["error"]["code"] == "shared_key"
    said = world.json("reencrypt", "--tenant", "acme", "--stream", "class-1", "--split", "--reason", "a test", "--wait", "100")
    assert (said["status"], said["events"]["resealed"]) == ("done", 20)
    asyncio.run(fill(world, {"class-1": 5}))
    assert {use[3] for use in keys_in_use(world, "class-1")} == {"stream"}, "what came later is under the stream's own key too"
    assert key_history_faults(world) == []
    assert world.carry_out("shred", of_stream("class-1"))["status"] == "inaccessible"
    assert {event["status"] for event in world.events("acme", stream="class-1")} == {"erased"}
    assert {event["status"] for event in world.events("acme", stream="class-2")} == {"ok"}


async def fill_persons(world: World, by: dict[str, list[str | None]]) -> None:
    """An event in each stream for each person in the list, who is named in it."""
    async with open_library(world.settings, writer="library-test") as library:
        for stream, persons in by.items():
            events = [NewEvent(type="T", data={"n": n} | ({"by": person} if person else {})) for n, person in enumerate(persons)]
            await library.store.append_to_stream(stream, events, tenant="acme")


async def set_policy(world: World, **policy: Any) -> None:
    async with open_library(world.settings, writer="library-test") as library:
        await library.policies.update_policy("*/Aes", policy, actor="a test", reason="a test")


def of_persons(world: World, stream: str) -> dict[str, str]:
    """Position and person → the kind and version of the key."""
    rows = world.sql("SELECT stream_position, data_encrypted FROM messages WHERE stream_id = $1", stream)
    names = {r["key_id"]: r["scope_id"] for r in world.sql("SELECT key_id, scope_id FROM encryption_keys")}
    headers = {row["stream_position"]: parse_header(bytes(row["data_encrypted"])) for row in rows}
    return {at: f"{names[h.key_id]} {h.key_version} {h.suite.label}" for at, h in sorted(headers.items())}  # type: ignore[misc]


PER_PERSON = {"key_scope": "subject", "subject": "json:/by"}


def test_events_of_persons_go_under_the_newest_versions_of_their_own_keys(make_world: Callable[..., World]) -> None:
    world = make_world(policies={"install": [{"class": "Aes", **PER_PERSON}]})
    world.run().stop()
    asyncio.run(fill_persons(world, {"aes-1": ["ann", "bob", "ann", "cid", "bob"], "aes-2": ["bob"] * 600}))
    world.control()
    worker(world)
    opened = world.events("acme")
    assert world.carry_out("rotate", ACME)["status"] == "done"
    asyncio.run(fill_persons(world, {"aes-1": ["ann"]}))  # the writer begins with the new version
    receipt = world.carry_out("reencrypt", ACME, final=("done", "rejected", "failed"))
    assert (receipt["status"], receipt["events"]) == ("done", {"resealed": 605, "left": 0, "chunks": 1})
    suite = "AES-256-GCM"
    assert list(of_persons(world, "aes-1").values()) == [f"{name} 2 {suite}" for name in ("ann", "bob", "ann", "cid", "bob", "ann")]
    assert set(of_persons(world, "aes-2").values()) == {f"bob 2 {suite}"}
    assert [event for event in world.events("acme") if event["position"] <= 5 or event["stream_id"] == "aes-2"] == opened
    assert key_history_faults(world) == []
    assert world.carry_out("reencrypt", ACME, final=("done",))["events"]["resealed"] == 0, "there is nothing left to do"
    asyncio.run(set_policy(world, algorithm="ChaCha20-Poly1305"))
    assert world.carry_out("reencrypt", of_stream("aes-1"), final=("done",))["events"]["resealed"] == 6
    assert {use.split()[2] for use in of_persons(world, "aes-1").values()} == {"ChaCha20-Poly1305"}
    assert key_history_faults(world) == []
    shred = Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="bob")
    assert world.carry_out("shred", shred)["events"]["unreadable"] == 602
    assert [event["status"] for event in world.events("acme", stream="aes-1")] == ["ok", "erased", "ok", "ok", "erased", "ok"]


def test_events_from_before_a_policy_by_person_come_under_the_persons_keys_and_what_names_nobody_is_left(make_world: Callable[..., World]) -> None:
    world = make_world(policies={"install": [{"class": "Aes"}]})
    world.run().stop()
    asyncio.run(fill_persons(world, {"aes-1": ["ann", None, "bob", "eve", "ann"]}))
    world.control()
    worker(world)
    assert world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="eve"))["status"] == "inaccessible"
    opened = world.events("acme")
    asyncio.run(set_policy(world, **PER_PERSON))
    receipt = world.carry_out("reencrypt", ACME, final=("done", "rejected", "failed"))
    assert (receipt["status"], receipt["events"]) == ("done", {"resealed": 3, "left": 2, "chunks": 1})
    used = [use.split()[0] for use in of_persons(world, "aes-1").values()]
    assert used == ["ann", "aes-1", "bob", "aes-1", "ann"]
    assert world.events("acme") == opened
    assert key_history_faults(world) == []
    assert world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="ann"))["events"]["unreadable"] == 2
    assert [event["status"] for event in world.events("acme")] == ["erased", "ok", "ok", "ok", "erased"]
    asyncio.run(set_policy(world, key_scope="stream", subject=None))
    receipt = world.carry_out("reencrypt", ACME, final=("done",))
    assert receipt["events"] == {"resealed": 1, "left": 2, "chunks": 1}, "and back; what is shredded stays as it is"
    assert [use.split()[0] for use in of_persons(world, "aes-1").values()] == ["ann", "aes-1", "aes-1", "aes-1", "ann"]
    assert key_history_faults(world) == []


@pytest.mark.parametrize("dies_at", ["worker:opened", "worker:rows", "worker:stream"])
def test_a_chunk_of_a_killed_worker_is_done_by_another(world: World, dies_at: str) -> None:
    asyncio.run(fill(world, {"aes-1": 1100, "aes-2": 600}))
    control = world.control()
    before, opened = stored(world), world.events("acme")
    assert world.carry_out("rotate", ACME)["status"] == "done"
    first = worker(world, "first", dies_at=dies_at)
    command_id = world.json("reencrypt", "--tenant", "acme", "--reason", "a test")["command_id"]
    assert first.process.wait(120) == -9, first.text()[-2000:]
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
    assert dying.process.wait(120) == -9, dying.text()[-2000:]
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


# ── into a new stream ───────────────────────────────────────────────────────────────────────────────────────────────────


def told(world: World, stream: str) -> list[Any]:
    """What readers see of a stream, but for its name."""
    return [{name: value for name, value in event.items() if name != "stream_id"} for event in world.events("acme", stream=stream)]


def test_a_stream_is_copied_into_a_new_one_which_outlives_it(world: World) -> None:
    asyncio.run(fill(world, {"aes-1": 600, "aes-9": 1}))
    world.control()
    worker(world)
    before = bytes_of(world)
    into = ("reencrypt", "--tenant", "acme", "--stream", "aes-1", "--into", "aes-2", "--reason", "a test", "--wait", "100")
    assert world.json(*into)["events"] == {"resealed": 600, "left": 0, "chunks": 1}
    assert told(world, "aes-2") == told(world, "aes-1")
    assert sorted(before) == sorted(bytes(r[0]) for r in world.sql("SELECT data_encrypted FROM messages WHERE stream_id <> 'aes-2'")), "as it was"
    asyncio.run(fill(world, {"aes-1": 5}))
    more = world.carry_out("reencrypt", of_stream("aes-1"), options={"into": "aes-2"}, final=("done",))
    assert more["events"] == {"resealed": 5, "left": 0, "chunks": 1}, "and what came since"
    assert told(world, "aes-2") == told(world, "aes-1")
    assert keys_in_use(world, "aes-1").isdisjoint(keys_in_use(world, "aes-2"))
    assert key_history_faults(world) == []
    assert world.carry_out("reencrypt", of_stream("aes-1"), options={"into": "aes-9"})["error"]["code"] == "stream_exists"
    assert world.carry_out("shred", of_stream("aes-1"))["status"] == "inaccessible"
    assert {event["status"] for event in told(world, "aes-1")} == {"erased"}
    assert {event["status"] for event in told(world, "aes-2")} == {"ok"}
    asyncio.run(fill(world, {"aes-2": 1}))
    assert [event["position"] for event in told(world, "aes-2")] == list(range(1, 607))


class Killed(BaseException):
    """As SIGKILL: nothing after it runs, and Postgres undoes what was not committed."""


def test_a_copy_that_is_killed_goes_on_and_ends_before_what_does_not_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(fill(world, {"aes-1": 1300}))
    world.sql("UPDATE messages SET data_encrypted = set_byte(data_encrypted, 60, get_byte(data_encrypted, 60) # 1) WHERE stream_position = 1201")

    def dies(name: str) -> None:
        if name == "worker:rows":
            monkeypatch.undo()
            raise Killed

    monkeypatch.setattr(reencryption, "failpoint", dies)

    async def main() -> None:
        async with paused(world, Reencryption, lambda: None, into="aes-2") as (work, command_id):
            with pytest.raises(Killed):
                await work.work(command_id, 0)
            assert len(told(world, "aes-2")) == 500
            await work.work(command_id, 0)

    asyncio.run(main())
    assert told(world, "aes-2") == told(world, "aes-1")[:1200]
    assert [tuple(row) for row in world.sql("SELECT resealed, left_alone, state FROM jobs")] == [(1200, 100, "done")]
    assert key_history_faults(world) == []


def test_a_copy_of_plain_events_is_sealed_by_person_where_policy_says_so_by_now(make_world: Callable[..., World]) -> None:
    world = make_world(policies={"install": [{"class": "Aes", "encrypt": False}]})
    world.run().stop()
    asyncio.run(fill_persons(world, {"aes-1": ["ann", "bob", "ann"]}))
    opened = told(world, "aes-1")

    async def main() -> None:
        async with paused(world, Reencryption, lambda: None, into="aes-2") as (work, command_id):
            await work.work(command_id, 0)

    asyncio.run(main())
    assert told(world, "aes-2") == [], "policy leaves them plain: there is nothing to seal"
    world.sql("DELETE FROM jobs")
    asyncio.run(set_policy(world, encrypt=True, **PER_PERSON))
    asyncio.run(main())
    assert told(world, "aes-2") == opened
    assert [use.split()[0] for use in of_persons(world, "aes-2").values()] == ["ann", "bob", "ann"]
    assert key_history_faults(world) == []


# ── a shred in the middle of it ─────────────────────────────────────────────────────────────────────────────────────────


class Trusting(Reencryption):
    """Broken: it believes that the keys in hand are those of now."""

    @staticmethod
    def _is_now(held: Any, now: Any) -> bool:
        return True


@asynccontextmanager
async def paused(
    world: World, kind: type[Reencryption], meanwhile: Callable[[], Any], *, stream: str = "aes-1", plain: bool = False, into: str | None = None
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
            assert await jobs.plan(connection, command_id, of_stream(stream), plain=plain, into=into) == 1
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


def replacing_anything(connection: Any, tenant: str, stream: str, new: Any) -> Any:
    """Broken: it writes whatever the row is by now."""
    return connection.fetch(
        """UPDATE messages m SET data_encrypted = x.envelope, data = x.document, metadata = NULL
           FROM unnest($3::bigint[], $4::bytea[], $5::bytea[], $6::bytea[]) x(position, old, envelope, document)
           WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position = x.position
           RETURNING m.stream_position, m.data_encrypted, m.data""",
        tenant, stream, *([n[column] for n in new] for column in range(4)),
    )  # fmt: skip


def rows_that_the_later_worker_writes(world: World, monkeypatch: pytest.MonkeyPatch, replace: Callable[..., Any]) -> list[int]:
    """Two workers have read the same rows; -> how many each of them then writes, in order."""
    asyncio.run(fill(world, {"aes-1": 20}))
    world.control()
    assert world.carry_out("rotate", ACME)["status"] == "done"
    seen: list[int] = []

    async def noted(*arguments: Any) -> Any:
        written = await replace(*arguments)
        seen.append(len(written))
        return written

    monkeypatch.setattr(jobs, "replace", noted)

    async def both() -> None:
        async def other() -> None:
            async with paused(world, Reencryption, lambda: None) as (work, command_id):
                await work.work(command_id, 0)

        async with paused(world, Reencryption, lambda: asyncio.run(other())) as (work, command_id):
            await work.work(command_id, 0)

    asyncio.run(both())
    return seen


def test_a_row_that_is_not_as_it_was_read_is_left_to_whoever_changed_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_that_the_later_worker_writes(world, monkeypatch, jobs.replace) == [20, 0]
    assert {event["status"] for event in world.events("acme")} == {"ok"}
    assert key_history_faults(world) == []


def test_control_without_the_25_bytes_a_row_is_written_over_that_somebody_else_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_that_the_later_worker_writes(world, monkeypatch, replacing_anything) == [20, 20]
