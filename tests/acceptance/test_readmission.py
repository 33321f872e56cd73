"""Promise: a shredded scope that is readmitted takes events again, under new keys; what was shredded stays unreadable, and refused."""

import base64
import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.client import client_config
from sidecar.postgres.connection import connected
from sidecar.testing import control_plane as kit
from tests.acceptance.world import World, blocking, until

ACME = Scope.of_tenant("acme")
STREAMS = ("aes-1", "chacha-1", "class-1", "class-2", "tenant-1")
"""Under keys of their own, of their class, of the tenant."""


def stream_of(name: str) -> Scope:
    return Scope(tenant="acme", kind=ScopeKind.STREAM, id=name)


def publish(world: World, value: bytes, streams: tuple[str, ...] = STREAMS) -> None:
    for stream in streams:
        world.event(world.topic("in"), value, stream=stream)
    world.settle()


def seen(world: World, stream: str) -> list[Any]:
    """Of a stream by position: the value, or that it is erased."""
    return [row["value"] or row["status"] for row in world.events("acme", stream=stream)]


@pytest.fixture
def running(world: World) -> World:
    world.both()
    return world


def test_a_readmitted_tenant_takes_events_under_new_keys_and_nothing_old_comes_back(running: World) -> None:
    publish(running, b"old")
    old_keys = {(row["key_id"], row["key_version"]) for row in running.sql("SELECT * FROM encryption_keys")}
    assert running.carry_out("shred", ACME)["status"] == "inaccessible"
    publish(running, b"refused")
    receipt = running.carry_out("readmit", ACME)
    assert (receipt["status"], receipt["generation"]) == ("done", 2)
    publish(running, b"new")
    publish(running, b"newer")
    for stream in STREAMS:
        assert seen(running, stream) == ["erased", b"new", b"newer"], stream
    used = {(row["key_id"], row["key_version"]) for row in running.sql("SELECT * FROM stream_key_history WHERE used_from_position > 1")}
    assert len(used) == 4  # the two of the class share theirs
    assert not used & old_keys
    assert {row["generation"] for row in running.sql("SELECT generation FROM tenant_keys WHERE wrapped IS NOT NULL")} == {2}
    assert running.value("SELECT count(*) FROM refusals WHERE reason = 'tenant_shredded'") == len(STREAMS)
    assert all(entry["ok"] for entry in running.json("audit", "verify"))


def test_a_readmitted_tenant_can_be_shredded_and_readmitted_again(running: World) -> None:
    for generation in (1, 2, 3):
        publish(running, b"v%d" % generation)
        assert running.carry_out("shred", ACME)["status"] == "inaccessible"
        assert running.carry_out("readmit", ACME)["generation"] == generation + 1
    publish(running, b"last")
    for stream in STREAMS:
        assert seen(running, stream) == ["erased"] * 3 + [b"last"], stream


def test_smaller_scopes_of_a_readmitted_tenant_are_shredded_by_their_new_keys(running: World) -> None:
    publish(running, b"old")
    running.carry_out("shred", ACME)
    running.carry_out("readmit", ACME)
    publish(running, b"new")
    assert running.carry_out("shred", stream_of("aes-1"))["status"] == "inaccessible"
    refused = running.carry_out("shred", stream_of("class-1"))
    assert refused["error"]["code"] == "shared_key"
    assert "class-2" in refused["error"]["message"]
    assert running.carry_out("rotate", ACME)["status"] == "done"
    publish(running, b"newer", ("chacha-1", "class-1"))
    assert seen(running, "aes-1") == ["erased", "erased"]
    assert seen(running, "chacha-1") == ["erased", b"new", b"newer"]
    assert seen(running, "class-1") == ["erased", b"new", b"newer"]


def test_a_readmitted_stream_gets_a_new_key_and_its_positions_go_on(running: World) -> None:
    publish(running, b"old")
    running.carry_out("shred", stream_of("aes-1"))
    publish(running, b"refused", ("aes-1",))
    assert running.carry_out("readmit", stream_of("aes-1"))["status"] == "done"
    publish(running, b"new")
    assert seen(running, "aes-1") == ["erased", b"new"]
    assert seen(running, "chacha-1") == [b"old", b"new"]
    keys = running.sql("SELECT key_id, key_material FROM encryption_keys WHERE scope_kind = 'stream' AND scope_id = 'aes-1' ORDER BY created_at")
    assert [row["key_material"] is None for row in keys] == [True, False]
    assert keys[0]["key_id"] != keys[1]["key_id"]


def test_a_readmitted_class_takes_events_but_a_stream_of_it_that_was_shredded_itself_does_not(running: World) -> None:
    publish(running, b"old", ("aes-1", "aes-2"))
    running.carry_out("shred", stream_of("aes-2"))
    running.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes"))
    assert running.carry_out("readmit", Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes"))["status"] == "done"
    publish(running, b"new", ("aes-1", "aes-2"))
    assert seen(running, "aes-1") == ["erased", b"new"]
    assert seen(running, "aes-2") == ["erased"]


def test_what_is_not_shredded_is_not_readmitted_and_the_receipt_says_why(running: World) -> None:
    publish(running, b"old", ("aes-1", "aes-2", "chacha-1"))

    def code(scope: Scope) -> str:
        return str((running.carry_out("readmit", scope)["error"] or {}).get("code"))

    assert code(ACME) == "not_shredded"
    assert code(stream_of("aes-1")) == "not_shredded"
    assert code(Scope.of_tenant("nobody")) == "unknown_tenant"
    running.carry_out("shred", stream_of("aes-1"))
    running.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes"))
    assert code(stream_of("aes-1")) == "class_shredded"
    running.carry_out("shred", ACME)
    assert code(stream_of("aes-1")) == "tenant_shredded"
    publish(running, b"new", ("aes-1", "chacha-1"))
    assert seen(running, "aes-1") == seen(running, "chacha-1") == ["erased"]


def test_old_records_of_sources_that_nobody_had_read_at_the_shred_are_refused_after_a_readmission(make_world: Callable[..., World]) -> None:
    """Of one that is named, and of one that only a pattern names; nor do partitions that came later let anything old in."""
    more = f"more-{secrets.token_hex(5)}"
    world = make_world(extra_sources=[{"topic": f"*.{more}"}])
    topics = [world.create(world.topic(name)) for name in ("in", more)]
    blocking(world.migrate)
    blocking(lambda: seeded(world))
    for topic in topics:
        for partition in (0, 1):
            world.event(topic, b"old", stream="aes-1", partition=partition)
    world.flush()
    with kit.control(world.config):
        assert world.carry_out("shred", ACME)["status"] == "inaccessible"
        assert world.carry_out("readmit", ACME)["status"] == "done"
    admin = AdminClient(client_config(world.settings))
    admin.create_partitions([NewPartitions(topics[0], 3)])[topics[0]].result()
    world.run()
    for topic in topics:
        world.event(topic, b"new", stream="aes-1", partition=0)
    world.flush()
    world._producer = None  # one that knows the new partition
    world.event(topics[0], b"new", stream="aes-1", partition=2)
    world.settle()
    assert seen(world, "aes-1") == [b"new"] * 3
    assert world.value("SELECT count(*) FROM refusals WHERE reason = 'tenant_shredded'") == 4


async def seeded(world: World) -> None:
    """The tenant is known; from the library, say."""
    async with connected(world.dsn) as connection:
        await kit.seed(connection, "acme", {"other": "Aes"})


@pytest.mark.parametrize("at", ["readmit:accepted", "readmit:readmitted", "readmit:in ledger"])
def test_a_readmission_whose_control_plane_dies_is_carried_out_once(world: World, at: str) -> None:
    with kit.control(world.config):
        world.run()
        publish(world, b"old", ("aes-1",))
        world.carry_out("shred", ACME)
    command_id, raw = kit.command(world.settings, "readmit", ACME)
    died = kit.start_control(world.config, failpoint=at)
    kit.send(world.settings, raw, key="acme")
    assert died.wait_dead() == -9
    with kit.control(world.config):
        assert world.receipt(str(command_id))["generation"] == 2
        publish(world, b"new", ("aes-1",))
    assert seen(world, "aes-1") == ["erased", b"new"]
    assert [entry["act"] for entry in ledger(world)] == ["shred", "readmit"]


def ledger(world: World) -> list[Any]:
    """What the ledger topic says, each entry once."""
    records = {m.key(): m.value() for m in world.records(world.topic("ledger"))}
    return [json.loads(base64.b64decode(json.loads(value)["payload"])) for value in records.values()]


def test_the_receipts_of_shred_and_readmission_come_after_their_entries_on_the_ledger(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.control()
    world.run()
    publish(world, b"old", ("aes-1",))
    assert ledger(world) == []
    for count, op in enumerate(("shred", "readmit"), start=1):
        world.carry_out(op, ACME)
        assert len(ledger(world)) == count
    until(lambda: world.value("SELECT count(*) FROM ledger WHERE published_at IS NULL") == 0, "the outbox to be empty")


@pytest.mark.parametrize("scope", [ACME, stream_of("aes-1")], ids=lambda s: s.kind.value)
def test_within_the_grace_a_restore_takes_the_shred_back_as_if_it_had_not_been(running: World, scope: Scope) -> None:
    publish(running, b"old", ("aes-1",))
    assert running.carry_out("shred", scope, options={"grace": "1h"})["status"] == "inaccessible"
    assert seen(running, "aes-1") == ["erased"]
    receipt = running.carry_out("readmit", scope, options={"restore": True})
    assert (receipt["status"], receipt["generation"]) == ("done", 1)
    publish(running, b"new", ("aes-1",))
    assert seen(running, "aes-1") == [b"old", b"new"]
    shred, restored = ledger(running)
    assert restored["undoes"] == shred["command_id"]
    assert running.value("SELECT count(*) FROM shred_barriers") == 0


def test_without_a_grace_nothing_is_restored(running: World) -> None:
    publish(running, b"old", ("aes-1",))
    running.carry_out("shred", ACME)
    assert running.carry_out("readmit", ACME, options={"restore": True})["error"]["code"] == "grace_over"
    assert running.carry_out("readmit", ACME)["status"] == "done"
    assert seen(running, "aes-1") == ["erased"]
