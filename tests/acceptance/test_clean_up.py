"""Promise: a retired key version goes when no stored event needs it, and not before."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sidecar.clean_up import CleanUp
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.store import DEFAULT_TENANT, NewEvent
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
from tests.acceptance.world import World

STREAMS = ("aes-1", "class-1", "tenant-1", "siv-1")
NOW = ("keys", "clean-up", "--older-than", "0s")


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """Keys of every scope, in two versions each; the first is retired."""
    install = [{"class": "PerClass", "key_scope": "class"}, {"class": "PerTenant", "key_scope": "tenant"}, {"class": "Siv", "key_scope": "subject"}]
    world = make_world(policies={"install": install})
    world.both()
    events(world)
    assert world.carry_out("rotate", Scope.of_tenant("acme"))["status"] == "done"
    events(world)
    return world


def events(world: World) -> None:
    for stream in STREAMS:
        for _ in range(3):
            world.event(world.topic("in"), b"v", stream=stream, headers=(("ce_subjectid", b"jane"),))
    world.settle()


def expire(world: World, condition: str = "stream_position <= 3") -> None:
    """As an operator's retention does: rows go, positions stay taken."""
    newest = "SELECT max(stream_position) FROM messages m WHERE m.tenant_id = s.tenant_id AND m.stream_id = s.stream_id"
    world.sql(f"UPDATE streams s SET position = ({newest})")
    world.sql(f"DELETE FROM messages WHERE tenant_id = 'acme' AND {condition}")


def outcomes(found: list[dict[str, Any]]) -> set[tuple[str, int, str]]:
    return {(row["scope_kind"], row["key_version"], row["outcome"]) for row in found}


EVERY_FIRST = {(kind, 1) for kind in ("stream", "class", "tenant", "subject")}


def test_a_retired_version_stays_as_long_as_an_event_needs_it(world: World) -> None:
    assert world.json(*NOW) == []
    expire(world, "stream_position <= 2")
    assert world.json(*NOW) == [], "one event is enough"
    assert {row["status"] for row in world.events("acme")} == {"ok"}
    assert world.value("SELECT count(*) FROM encryption_keys WHERE is_destroyed") == 0


def test_versions_that_no_event_needs_are_destroyed_with_an_audit_row_and_the_next_epoch(world: World) -> None:
    expire(world)
    assert outcomes(world.json(*NOW, "--dry-run")) == {(*key, "unneeded") for key in EVERY_FIRST}
    assert world.value("SELECT count(*) FROM encryption_keys WHERE is_destroyed") == 0
    assert world.json("keys", "clean-up", "--older-than", "1h") == [], "retired a moment ago"
    assert world.json(*NOW, "--tenant", "globex") == []
    epoch = world.value("SELECT epoch FROM tenants WHERE tenant_id = 'acme'")
    assert outcomes(world.json(*NOW)) == {(*key, "destroyed") for key in EVERY_FIRST}
    assert world.value("SELECT epoch FROM tenants WHERE tenant_id = 'acme'") == epoch + 1
    assert world.value("SELECT count(*) FROM encryption_keys WHERE key_material IS NULL AND is_destroyed AND key_version = 1") == 4
    (details,) = [row["details"] for row in world.sql("SELECT details FROM audit_log WHERE action = 'keys.clean_up'")]
    assert (details["count"], len(details["keys"])) == (4, 4)
    assert world.json(*NOW) == []
    events(world)
    assert {row["status"] for row in world.events("acme")} == {"ok"}
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


@pytest.mark.parametrize("kind", ["tenant", "stream", "class"])
def test_a_dead_letter_needs_its_key_too(world: World, kind: str) -> None:
    expire(world)
    name = world.sql("SELECT key_id, key_version FROM encryption_keys WHERE scope_kind = $1 AND key_version = 1", kind)[0]
    sealed = b"\x4b\x53\x01\x01\x02" + name["key_id"].bytes + name["key_version"].to_bytes(4) + bytes(40)
    world.sql("INSERT INTO dead_letters (reason, tenant_id, value_encrypted) VALUES ('malformed', 'acme', $1)", sealed)
    assert outcomes(world.json(*NOW)) == {(*key, "destroyed") for key in EVERY_FIRST - {(kind, 1)}}
    world.sql("DELETE FROM dead_letters")
    assert outcomes(world.json(*NOW)) == {(kind, 1, "destroyed")}


def test_an_event_that_the_history_does_not_know_of_keeps_its_key_and_is_reported(world: World) -> None:
    """The history is exact, by test; a key is not destroyed on its word alone."""
    world.sql("DELETE FROM stream_key_history WHERE key_version = 1")
    assert outcomes(world.json(*NOW)) == {(*key, "in_use") for key in EVERY_FIRST}
    assert {row["status"] for row in world.events("acme")} == {"ok"}


def test_the_newest_version_may_go_too_and_the_next_write_makes_another_key(world: World) -> None:
    assert world.carry_out("rotate", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"))["status"] == "done"
    expire(world, "stream_id = 'aes-1'")
    assert {(row["scope_id"], row["key_version"]) for row in world.json(*NOW)} == {("aes-1", 1), ("aes-1", 2)}
    events(world)
    rows = world.events("acme", stream="aes-1")
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert world.value("SELECT count(DISTINCT key_id) FROM encryption_keys WHERE scope_id = 'aes-1'") == 2
    receipt = world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"))
    assert (receipt["status"], receipt["events"]["unreadable"]) == ("inaccessible", 3)


def test_a_shredded_tenants_keys_are_no_matter_of_clean_up(world: World) -> None:
    assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
    expire(world)
    assert world.json(*NOW) == []


async def test_what_the_library_sealed_into_another_store_keeps_its_key(database: str, tmp_path: Path) -> None:
    """A clean-up looks into our store alone, so it does not judge keys that are used elsewhere too."""
    connection = await connect(database)
    await migrations.migrate(connection)
    create_key_file(tmp_path / "kek")
    pool = await open_pool(database)
    keys = KeyManagementService(pool, KeyManagement(open_kms(f"file:{tmp_path / 'kek'}")), clock=SystemClock())
    elsewhere, ours = (create_crypto_event_store(base, keys=keys) for base in (MemoryEventStore(), PostgresEventStore(pool)))
    try:
        for store, stream in ((elsewhere, "there"), (ours, "here")):
            await store.append_to_stream(stream, [NewEvent(type="T", data={"n": 1})])
            await keys.rotate_key(Scope(tenant=DEFAULT_TENANT, kind=ScopeKind.STREAM, id=stream))
        await connection.execute("DELETE FROM messages")
        found = await CleanUp(pool, SystemClock()).run(older_than=timedelta(0))
        assert [(c.version.scope_id, c.outcome) for c in found] == [("here", "destroyed")]
        assert [event.data for event in (await elsewhere.read_stream("there")).events] == [{"n": 1}]
    finally:
        await pool.close()
        await connection.close()
