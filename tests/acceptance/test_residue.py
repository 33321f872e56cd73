"""Promise: what a shred leaves elsewhere is named on its receipt, watched to its end, and the receipt `complete` comes only then."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from confluent_kafka import Consumer, TopicPartition

from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.receipts import ViewWriter
from sidecar.ledger import Ledger
from sidecar.notices import Notices
from sidecar.postgres import residue
from sidecar.postgres.connection import open_pool, transaction
from sidecar.residue import Residue
from sidecar.settings import load
from sidecar.signing import control_signer
from sidecar.steps import Steps, SystemClock
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.rolls import confirm_and_destroy, roll
from tests.acceptance.test_e09_a_hold_is_never_overrun import control_plane
from tests.acceptance.world import World, until

ACME = Scope.of_tenant("acme")
NO_BACKUPS = {"database_days": 0, "keystore_days": 0, "wal_days": 0}


def view_of(name: str, **changes: Any) -> dict[str, Any]:
    """A view that is compacted as soon as the broker may."""
    return {"name": "all", "topic": f"{name}.view", "partitions": 3, "erase_within": "1s"} | changes


def residue_of(world: World, command_id: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, place) → the row."""
    rows = world.sql("SELECT kind, place, state, until, details FROM residue WHERE command_id = $1::text::uuid", command_id)
    return {(r["kind"], r["place"]): dict(r) | {"details": r["details"]} for r in rows}


def done(world: World, receipt: dict[str, Any], kind: str) -> dict[str, Any]:
    """The details of the command's rows of that kind, once all are done: the newest."""

    def looked() -> list[dict[str, Any]] | None:
        rows = [row for (of, _), row in residue_of(world, receipt["command_id"]).items() if of == kind]
        return rows if rows and all(row["state"] == "done" for row in rows) else None

    try:
        return until(looked, f"residue {kind} to end")[-1]["details"]  # type: ignore[index]
    except AssertionError as error:
        logs = "\n".join(plane.text()[-1500:] for plane in world.planes)
        raise AssertionError(f"{error}; it stands at {residue_of(world, receipt['command_id'])}\n{logs}") from None


def payloads(world: World, topic: str, tenant: str) -> int:
    return sum(
        1 for m in world.records(topic) if m.value() and dict(m.headers()).get("ce_streamid") and dict(m.headers())["ce_tenantid"] == tenant.encode()
    )


def fill(world: World, streams: tuple[str, ...] = ("aes-1", "aes-2", "class-1", "cart-1")) -> None:
    for n in range(20):
        for tenant in ("acme", "globex"):
            for stream in streams:
                world.event(world.topic("in"), b"v%d" % n, tenant=tenant, stream=stream)
    world.settle()


def recycle_wal(world: World) -> None:
    for _ in range(2):
        world.sql("SELECT pg_switch_wal()")
        world.sql("CREATE TABLE IF NOT EXISTS noise (n int)")
        world.sql("INSERT INTO noise VALUES (1)")
    world.sql("CHECKPOINT")


def test_every_kind_of_residue_is_watched_to_its_end_and_complete_comes_after_the_last(make_world: Callable[..., World]) -> None:
    world = make_world(backups=NO_BACKUPS)
    world = reconfigured(world, views=[view_of(world.name)], sources=[{"topic": f"{world.name}.in", "purge": "after_projection"}])
    world.both()
    fill(world)
    read_with_group(world, f"{world.name}.reporting")
    assert payloads(world, world.topic("view"), "acme") == 80
    receipt = world.carry_out("shred", ACME)
    assert receipt["status"] == "inaccessible"
    assert (receipt["irrecoverable_at"], receipt["irrecoverable_reason"]) == (None, "next seal epoch")
    assert {row["kind"] for row in receipt["residue"]} == {"view", "source", "consumers", "database", "wal", "backup", "seal_epoch"}

    assert done(world, receipt, "view")["remaining"] == 0
    assert payloads(world, world.topic("view"), "acme") == 20  # the plain class is not erased by keys; the receipt counts it
    assert payloads(world, world.topic("view"), "globex") == 80
    assert done(world, receipt, "source")["offsets_left"] == 0
    readers = done(world, receipt, "consumers")
    assert [group["group"] for group in readers["groups"]] == [f"{world.name}.reporting"]
    assert readers["told"] is False
    assert set(done(world, receipt, "database")["tables"].values()) == {"rewritten"}
    recycle_wal(world)
    assert done(world, receipt, "wal")["files"] == 0
    done(world, receipt, "backup")

    shown = world.json("receipts", "get", receipt["command_id"])
    assert (shown["status"], shown["irrecoverable_at"], shown["irrecoverable_reason"]) == ("inaccessible", None, "next seal epoch")
    assert {row["kind"]: row["state"] for row in shown["residue"]}["view"] == "done"
    assert {row["kind"] for row in shown["residue"] if row["state"] == "pending"} == {"seal_epoch"}

    destroy_seal_epoch(world)
    complete = world.receipt(receipt["command_id"], ("complete",))
    ends = [row["done_at"] for row in complete["residue"]]
    assert complete["irrecoverable_at"] == max(ends) > receipt["inaccessible_at"] == complete["inaccessible_at"]
    assert complete["irrecoverable_reason"] is None
    assert {row["state"] for row in complete["residue"]} == {"done"}
    assert world.json("receipts", "get", receipt["command_id"]) == complete
    assert world.value("SELECT count(*) FROM audit_log WHERE action = 'shred.complete'") == 1
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


def reconfigured(world: World, **changes: Any) -> World:
    """The same world with other sections of its configuration, before anything runs."""
    document = json.loads(world.config.read_text())
    world.config.write_text(json.dumps(document | changes))
    world.settings = load(world.config)
    return world


def read_with_group(world: World, group: str) -> None:
    consumer = Consumer(client_config(world.settings, **{"group.id": group, "enable.auto.commit": False}))
    consumer.commit(offsets=[TopicPartition(world.topic("view"), 0, 1)], asynchronous=False)
    consumer.close()


def destroy_seal_epoch(world: World) -> None:
    roll(world)
    confirm_and_destroy(world)


@pytest.mark.parametrize(
    "scope", [Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"), Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes")], ids=str
)
@pytest.mark.parametrize("key", ["event", "stream"])
def test_tombstones_and_compaction_take_the_shredded_records_and_no_others(make_world: Callable[..., World], scope: Scope, key: str) -> None:
    world = make_world()
    world = reconfigured(world, views=[view_of(world.name, key=key)])
    world.both()
    fill(world)
    before = {(m.partition(), m.offset()) for m in world.records(world.topic("view")) if not shredded(m, scope)}
    receipt = world.carry_out("shred", scope)
    details = done(world, receipt, "view")
    after = world.records(world.topic("view"))
    assert not [m for m in after if m.value() and shredded(m, scope)]
    if key == "event":
        assert before <= {(m.partition(), m.offset()) for m in after}
        assert details["tombstones"] == (20 if scope.kind is ScopeKind.STREAM else 40)
    assert {(row["stream_id"], row["status"]) for row in world.events("globex")} == {(s, "ok") for s in ("aes-1", "aes-2", "class-1", "cart-1")}


def shredded(message: Any, scope: Scope) -> bool:
    headers = dict(message.headers() or ())
    stream = headers.get("ce_streamid", b"").decode()
    mine = stream == scope.id if scope.kind is ScopeKind.STREAM else stream.startswith("aes-")
    return headers.get("ce_tenantid") == scope.tenant.encode() and mine


def test_the_records_of_a_view_of_this_tenant_alone_are_deleted(make_world: Callable[..., World]) -> None:
    world = make_world()
    world = reconfigured(world, views=[view_of(world.name, match={"tenants": ["acme"]}, erase_within="1h")])
    world.both()
    fill(world)
    receipt = world.carry_out("shred", ACME)
    done(world, receipt, "view")
    left = world.records(world.topic("view"))
    assert [m for m in left if m.offset() < receipt["barrier"][world.topic("view")][str(m.partition())]] == []
    assert {m.partition() for m in left if m.value()} == {0, 1, 2}  # the notice stands behind the barrier


def test_a_view_is_rid_of_what_an_earlier_wider_match_and_another_key_put_there(make_world: Callable[..., World]) -> None:
    """And the records of others that it put there stay, although the view is one tenant's alone by now."""
    world = make_world()
    world = reconfigured(world, views=[view_of(world.name, key="stream")])
    world.control(wait=False)
    wide = world.run()
    world.planes[0].wait_ready()
    fill(world, ("aes-1", "cart-1"))
    wide.stop()
    world = reconfigured(world, views=[view_of(world.name, match={"tenants": ["globex"]})])
    world.run()
    fill(world, ("aes-2",))
    globex = world.carry_out("shred", Scope(tenant="globex", kind=ScopeKind.TENANT, id="globex"))
    assert done(world, globex, "view")["method"] == "tombstones"
    assert streams_in_view(world) == {("acme", "aes-1"), ("acme", "cart-1"), ("globex", "cart-1")}
    acme = world.carry_out("shred", ACME)
    assert done(world, acme, "view")["remaining"] == 0
    assert streams_in_view(world) == {("acme", "cart-1"), ("globex", "cart-1")}


def streams_in_view(world: World) -> set[tuple[str, str]]:
    """(tenant, stream) of the records with a value."""
    carried = [dict(m.headers()) for m in world.records(world.topic("view")) if m.value()]
    return {(of["ce_tenantid"].decode(), of["ce_streamid"].decode()) for of in carried if "ce_streamid" in of}


def test_what_nothing_ends_is_pending_and_says_so_and_there_is_no_complete(make_world: Callable[..., World]) -> None:
    """Control: nothing is declared, nothing is purged, the view's keys are sealed with their events. The same checker finds no end."""
    world = make_world()
    world = reconfigured(world, views=[view_of(world.name, key="source")])
    world.both()
    fill(world, ("aes-1",))
    receipt = world.carry_out("shred", ACME)
    done(world, receipt, "database")
    recycle_wal(world)
    done(world, receipt, "wal")
    destroy_seal_epoch(world)
    done(world, receipt, "seal_epoch")
    until(lambda: "remaining" in residue_of(world, receipt["command_id"])["view", world.topic("view")]["details"], "a look at the view")
    rows = residue_of(world, receipt["command_id"])
    pending = {kind for (kind, _), row in rows.items() if row["state"] == "pending"}
    assert pending == {"view", "source", "backup"}
    assert rows["view", world.topic("view")]["until"] is not None  # its retention
    assert rows["view", world.topic("view")]["details"]["method"] == "retention"
    backup = rows["backup", "keystore backups"]
    assert (backup["until"], "not declared" in backup["details"]["reason"]) == (None, True)
    shown = world.json("receipts", "get", receipt["command_id"])
    assert (shown["status"], shown["irrecoverable_at"]) == ("inaccessible", None)
    assert shown["irrecoverable_reason"].startswith("copies remain: archived WAL")
    assert world.sql("SELECT 1 FROM receipts WHERE status = 'complete'") == []


def test_an_old_snapshot_holds_the_dead_rows_back_and_is_named(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.both()
    fill(world, ("aes-1",))

    async def hold() -> tuple[dict[str, Any], dict[str, Any]]:
        connection = await asyncpg.connect(world.dsn, server_settings={"application_name": "a long report"})
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM tenants")
            receipt = await asyncio.to_thread(world.carry_out, "shred", ACME)
            held = await asyncio.to_thread(until, lambda: row if (row := database(receipt))["details"].get("held_by") else None, "who holds it back")
        await connection.close()
        return receipt, held

    def database(receipt: dict[str, Any]) -> dict[str, Any]:
        return next(row for (kind, _), row in residue_of(world, receipt["command_id"]).items() if kind == "database")

    receipt, held = asyncio.run(hold())
    assert held["state"] == "pending"
    assert any("a long report" in who for who in held["details"]["held_by"])
    done(world, receipt, "database")


def test_the_wrapped_bytes_leave_the_files_of_the_key_tables(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.both()
    for n in range(40):
        world.event(world.topic("in"), b"v", tenant=f"t{n}", stream="aes-1")
    world.event(world.topic("in"), b"v", tenant="acme", stream="aes-1")
    world.settle()
    wrapped = bytes(world.value("SELECT wrapped FROM tenant_keys WHERE tenant_id = 'acme'"))
    assert found_on_disk(world, wrapped)  # control: the search finds what is there
    done(world, world.carry_out("shred", ACME), "database")
    assert not found_on_disk(world, wrapped)


def found_on_disk(world: World, needle: bytes) -> bool:
    """Whether a table's file, as Postgres itself reads it from disk, holds the bytes."""
    world.sql("CHECKPOINT")
    return bool(world.value("SELECT position($1::bytea IN pg_read_binary_file(pg_relation_filepath('tenant_keys'))) > 0", needle))


def test_a_date_is_never_earlier_than_the_act(make_world: Callable[..., World]) -> None:
    """What ends by itself says when, and that moment lies ahead."""
    world = make_world(backups={"database_days": 30, "keystore_days": 7, "wal_days": 2})
    world.both()
    fill(world, ("aes-1",))
    receipt = world.carry_out("shred", ACME)
    done(world, receipt, "database")
    for row in receipt["residue"]:
        if row["until"] is not None:
            assert row["until"] >= receipt["inaccessible_at"], row
    days = {
        place: (datetime.fromisoformat(row["until"].isoformat()) - datetime.fromisoformat(receipt["inaccessible_at"])).days
        for (kind, place), row in residue_of(world, receipt["command_id"]).items()
        if kind == "backup"
    }
    assert days == {"database backups": 30, "keystore backups": 7, "archived WAL": 2}


def test_deleted_plain_events_leave_residue_of_their_own_until_it_is_gone(make_world: Callable[..., World]) -> None:
    """Their text stands in dead rows, in the log, in backups and in a view that was not compacted yet, whatever becomes of keys."""
    world = make_world(backups=NO_BACKUPS)
    world = reconfigured(world, views=[view_of(world.name)])
    world.both()
    fill(world, ("cart-1",))
    plain = Scope(tenant="acme", kind=ScopeKind.STREAM, id="cart-1")
    receipt = world.carry_out("shred", plain, options={"include_plain": True})
    assert (receipt["keys"]["count"], receipt["events"]["plain_deleted"]) == (0, 20)
    assert {row["kind"] for row in receipt["residue"]} == {"view", "source", "consumers", "database", "wal", "backup"}
    assert "messages" in done(world, receipt, "database")["tables"]
    done(world, receipt, "view")
    assert payloads(world, world.topic("view"), "acme") == 0
    assert payloads(world, world.topic("view"), "globex") == 20
    assert world.json("receipts", "get", receipt["command_id"])["irrecoverable_at"] is None  # the log, and the source


NO_RESIDUE = """
from sidecar.residue import Residue
async def nothing(self): return None
Residue.work = nothing
"""


@pytest.mark.parametrize(("scope", "key"), [(ACME, "event"), (Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"), "stream")], ids=str)
def test_what_a_readmitted_scope_publishes_stays_in_the_views(make_world: Callable[..., World], scope: Scope, key: str) -> None:
    """The tombstones of its shred may be written behind it."""
    world = make_world()
    world = reconfigured(world, views=[view_of(world.name, key=key)])
    with kit.control(world.config, broken=NO_RESIDUE):
        world.run()
        world.event(world.topic("in"), b"old", tenant="acme", stream="aes-1")
        world.settle()
        receipt = world.carry_out("shred", scope)
        assert world.carry_out("readmit", scope)["status"] == "done"
        world.event(world.topic("in"), b"new", tenant="acme", stream="aes-1")
        world.settle()
    with kit.control(world.config):
        assert done(world, receipt, "view")["remaining"] == 0
    last: dict[bytes, Any] = {m.key(): m.value() for m in world.records(world.topic("view"))}
    assert [value for value in last.values() if value == b"new"] == [b"new"]
    assert not [m for m in world.records(world.topic("view")) if m.value() not in (None, b"new") and shredded(m, scope)]


async def test_what_events_were_before_they_were_sealed_anew_leaves_the_files_too(
    local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    """Plaintext, or what a key opens that goes on: of others of the class, or of the stream that the person's events lay in."""
    async with control_plane(local_stack, database, tmp_path, unique("c")) as plane:
        tables = {}
        for tenant, resealed in (("acme", 0), ("zeta", 3)):
            await kit.seed(plane.database, tenant, {"a": "C"})
            await kit.add_events(plane.database, tenant, "a", 3)
            await plane.database.execute(
                "INSERT INTO jobs (command_id, chunk, tenant_id, streams, plain, resealed) VALUES (gen_random_uuid(), 0, $1, '{a}', false, $2)",
                tenant, resealed,
            )  # fmt: skip
            shred = await plane.carry_out("shred", Scope(tenant=tenant, kind=ScopeKind.STREAM, id="a"))
            ended = "SELECT details FROM residue WHERE command_id = $1::text::uuid AND kind = 'database' AND state = 'done'"
            async with asyncio.timeout(120):
                while not (details := await plane.database.fetchval(ended, shred["command_id"])):  # noqa: ASYNC110 (no event says so)
                    await asyncio.sleep(0.05)
            tables[tenant] = details["tables"]
    assert "messages" not in tables["acme"]  # control
    assert tables["zeta"]["messages"] == "rewritten"


async def test_of_two_control_planes_that_end_the_last_two_places_at_once_one_says_complete(
    local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has lost the lead, and does not know it yet, may be in the middle of its last look."""
    async with control_plane(local_stack, database, tmp_path, unique("c")) as plane:
        await kit.seed(plane.database, "acme", {"a": "C"})
        shred = await plane.carry_out("shred", ACME)
        async with asyncio.timeout(120):
            while await plane.database.fetchval("SELECT finished_at FROM commands") is None:  # noqa: ASYNC110 (no event says so)
                await asyncio.sleep(0.02)
        settings = plane.settings
    pool, admin = await open_pool(database, max_size=4), Admin(settings)
    steps = Steps(pool, admin, SystemClock(), Ledger(pool, LedgerTopic(settings, admin), control_signer(settings), settings.deployment))
    await pool.execute("UPDATE residue SET state = 'done', done_at = now(), next_at = now() WHERE kind <> 'backup' OR place LIKE 'keystore%'")
    await pool.execute("UPDATE residue SET next_at = now() WHERE state = 'pending'")
    async with transaction(pool) as connection:
        ours, theirs = await residue.due(connection, datetime.now(UTC))
    seen, go = asyncio.Event(), asyncio.Event()
    real = residue.of_command

    async def slowly(*arguments: Any) -> Any:
        rows = await real(*arguments)
        seen.set()
        await go.wait()
        return rows

    def record(entry: Any) -> asyncio.Task[None]:
        own = Residue(settings, steps, Notices(pool, admin, ViewWriter(settings)), lambda: None)  # type: ignore[arg-type,return-value]
        return asyncio.create_task(own._record(entry, residue.Look(again=None)))

    try:
        monkeypatch.setattr(residue, "of_command", slowly)
        first = record(ours)
        await seen.wait()
        monkeypatch.setattr(residue, "of_command", real)
        second = record(theirs)
        await asyncio.wait({second}, timeout=1)  # it waits for the first, or is through
        go.set()
        await asyncio.gather(first, second)
        for late in (None, ours):
            if late is not None:
                await record(late)
            complete = await pool.fetch("SELECT * FROM receipts WHERE status = 'complete'")
            assert [str(row["command_id"]) for row in complete] == [shred["command_id"]]
            assert await pool.fetchval("SELECT count(*) FROM audit_log WHERE action = 'shred.complete'") == 1
    finally:
        await pool.close()
