"""Promise: a database that was restored or failed over is not served before `sidecar ledger replay`; then every shred since holds again.

A backup here is a copy of the database on the same server; test_must_not_happen_ledger.py has one of the whole data directory.
"""

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from sidecar.core import dsse
from sidecar.core.audit import scope_ref, tenant_ref
from sidecar.core.errors import BrokerUnavailable, LedgerBehind
from sidecar.core.ledger import PAYLOAD_TYPE, Entry, SourceEnd, parse_entry
from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.client import client_config
from sidecar.kafka.ledger import LedgerTopic
from sidecar.ledger import Ledger, LedgerGate, key_of
from sidecar.postgres.connection import connect, open_pool
from sidecar.signing import control_signer, create_signing_key, public_path
from sidecar.steps import SystemClock
from sidecar.testing import control_plane as kit
from tests.acceptance.world import Plane, World, blocking, until

MEND = "sidecar ledger replay"


def tenant(name: str) -> Scope:
    return Scope.of_tenant(name)


def stream_of(of: str, name: str) -> Scope:
    return Scope(tenant=of, kind=ScopeKind.STREAM, id=name)


def class_of(of: str, name: str) -> Scope:
    return Scope(tenant=of, kind=ScopeKind.CLASS, id=name)


def publish(world: World, value: bytes, **streams: tuple[str, ...]) -> None:
    """`value` to the streams of each tenant."""
    for name, of_tenant in streams.items():
        for stream in of_tenant:
            world.event(world.topic("in"), value, tenant=name, stream=stream)
    world.settle()


def seen(world: World, name: str, stream: str) -> list[Any]:
    return [row["value"] or row["status"] for row in world.events(name, stream=stream)]


def on_the_server(world: World, *statements: str) -> None:
    """As the administrator, from another database; whoever is connected to the world's is cut off."""
    database = urlsplit(world.dsn).path[1:]

    async def main() -> None:
        connection = await asyncpg.connect(world.stack.dsn)
        try:
            await connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")
            for statement in statements:
                await connection.execute(statement.format(database=database))
        finally:
            await connection.close()

    blocking(main)


def stop(*planes: Plane) -> None:
    for plane in planes:
        plane.stop()


def back_up(world: World) -> None:
    """No plane may run: the copy is of a database that nobody is connected to."""
    on_the_server(world, 'CREATE DATABASE "{database}_backup" TEMPLATE "{database}"')


def restore(world: World) -> None:
    on_the_server(world, 'DROP DATABASE "{database}" WITH (FORCE)', 'ALTER DATABASE "{database}_backup" RENAME TO "{database}"')


def refused(world: World, *words: str) -> None:
    said = world.cli(*words)
    assert said.returncode == 1, said.stdout
    assert MEND in said.stderr.decode()


@pytest.fixture
def shredded_since(world: World) -> World:
    """Backed up, then shredded in every way, then restored. No plane runs.

    Known to the backup: alpha (tenant shredded), beta (stream aes-1 and class Siv shredded), gamma (shredded and readmitted), delta (nothing).
    Unknown to it: newco (shredded), newer (shredded and readmitted), and of beta the stream aes-9 (shredded) and the class ChaCha (shredded).
    """
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", alpha=("aes-1", "class-1"), beta=("aes-1", "aes-2", "siv-1"), gamma=("aes-1",), delta=("aes-1", "tenant-1"))
    stop(control, data)
    back_up(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"mid", alpha=("aes-1",), beta=("aes-1", "aes-2", "aes-9", "siv-1", "chacha-1"), delta=("aes-1", "aes-3"))
    publish(world, b"mid", newco=("aes-1",), newer=("aes-1",), gamma=("aes-1",))
    for scope in (tenant("alpha"), stream_of("beta", "aes-1"), class_of("beta", "Siv"), tenant("gamma"), tenant("newco"), tenant("newer")):
        assert world.carry_out("shred", scope)["status"] == "inaccessible"
    for scope in (stream_of("beta", "aes-9"), class_of("beta", "ChaCha")):
        assert world.carry_out("shred", scope)["status"] == "inaccessible"
    for scope in (tenant("gamma"), tenant("newer")):
        assert world.carry_out("readmit", scope)["status"] == "done"
    publish(world, b"new", gamma=("aes-1",), newer=("aes-1",), delta=("aes-1",))
    stop(control, data)
    restore(world)
    return world


def test_a_restored_database_is_refused_by_every_door_until_the_ledger_is_replayed(shredded_since: World) -> None:
    world = shredded_since
    control, data = world.control(wait=False), world.run(wait=False)
    for words in (("events", "list", "--tenant", "alpha"), ("events", "list", "--tenant", "delta"), ("ledger", "status")):
        refused(world, *words)
    with pytest.raises(LedgerBehind):
        world.events("alpha")
    for plane in (control, data):
        until(lambda plane=plane: MEND in plane.text(), "the plane to say what it waits for")  # type: ignore[misc]
        assert "\nready" not in plane.text()
    replayed = world.json("ledger", "replay")
    assert replayed["applied"] == {"shred": 8, "hold": 0, "release": 0, "readmit": 2}
    # both serve by themselves
    control.wait_ready()
    data.wait_ready()
    world.settle()
    assert world.json("ledger", "status")["serves"]
    assert world.json("ledger", "replay")["applied"] == {"shred": 0, "hold": 0, "release": 0, "readmit": 0}


def test_a_data_plane_writes_nothing_into_a_database_that_it_may_not_serve(world: World) -> None:
    """Not its views and first policies either: what it stood at before would be gone, and a shred's residue is planned by the views on record."""
    control = world.control()
    world.sql("INSERT INTO tenants (tenant_id) VALUES ('alpha')")
    assert world.carry_out("shred", tenant("alpha"))["status"] == "inaccessible"
    stop(control)
    world.sql("DELETE FROM ledger")  # as in a backup from before
    data = world.run(wait=False)
    until(lambda: MEND in data.text(), "the plane to say what it waits for")
    recorded = "SELECT (SELECT count(*) FROM views), (SELECT count(*) FROM encryption_policies WHERE stream_type_class = 'PerClass')"
    assert tuple(world.sql(recorded)[0]) == (0, 0)
    assert world.json("ledger", "replay")["applied"]["shred"] == 1
    data.wait_ready()
    assert tuple(world.sql(recorded)[0]) == (1, 1)


def test_after_the_replay_every_shred_holds_and_everything_else_is_whole(shredded_since: World) -> None:
    world = shredded_since
    shown = view(world)
    world.json("ledger", "replay")
    # what the backup had is unreadable before any plane has run
    assert seen(world, "alpha", "aes-1") == seen(world, "alpha", "class-1") == ["erased"]
    assert seen(world, "beta", "aes-1") == seen(world, "beta", "siv-1") == ["erased"]
    assert seen(world, "gamma", "aes-1") == ["erased"]
    assert (seen(world, "beta", "aes-2"), seen(world, "delta", "tenant-1")) == ([b"old"], [b"old"])
    world.control()
    world.run()
    publish(world, b"last", alpha=("aes-1",), beta=("aes-1", "aes-2", "aes-9", "siv-1", "chacha-1"), gamma=("aes-1",), delta=("aes-1",))
    publish(world, b"last", newco=("aes-1",), newer=("aes-1",))
    # what is read again from the topic is refused where it was shredded, by the fence and, where it was lifted again, by the barrier
    assert seen(world, "alpha", "aes-1") == ["erased"]
    assert seen(world, "beta", "aes-1") == seen(world, "beta", "siv-1") == ["erased"]
    assert seen(world, "beta", "aes-9") == seen(world, "beta", "chacha-1") == seen(world, "newco", "aes-1") == []
    assert seen(world, "beta", "aes-2") == [b"old", b"mid", b"last"]
    assert seen(world, "delta", "aes-1") == [b"old", b"mid", b"new", b"last"]
    assert seen(world, "delta", "aes-3") == [b"mid"]
    assert world.value("SELECT state FROM tenants WHERE tenant_id = 'newco'") == "shredded"
    assert world.value("SELECT generation FROM tenants WHERE tenant_id = 'newer'") == 2
    # what was in the view is not there twice
    again = view(world)
    assert [record for record in again if record[2] != b"last"] == shown
    assert world.value("SELECT count(*) FROM audit_log WHERE action = 'ledger.replay'") == 7


def test_what_was_readmitted_before_the_restore_takes_what_came_after_its_shred_and_nothing_before(shredded_since: World) -> None:
    world = shredded_since
    world.json("ledger", "replay")
    world.control(wait=False)
    world.run()
    publish(world, b"last", gamma=("aes-1",), newer=("aes-1",))
    assert seen(world, "gamma", "aes-1") == ["erased", b"new", b"last"]
    assert seen(world, "newer", "aes-1") == [b"new", b"last"]


def view(world: World) -> list[tuple[bytes, bytes, bytes]]:
    """Tenant, stream and value of every record that is no notice, sorted."""
    found = [(dict(m.headers()), m.value()) for m in world.records(world.topic("view")) if m.value()]
    return sorted((h["ce_tenantid"], h["ce_streamid"], value) for h, value in found if "ce_streamid" in h)


def test_a_replay_that_is_killed_in_the_middle_is_done_again(shredded_since: World) -> None:
    world = shredded_since
    for _ in range(2):
        assert world.cli("ledger", "replay", environment={"SIDECAR_TEST_FAILPOINT": "replay:applied"}).returncode == -9
        refused(world, "events", "list", "--tenant", "alpha")
    assert sum(world.json("ledger", "replay")["applied"].values()) == 8
    assert seen(world, "alpha", "aes-1") == seen(world, "beta", "aes-1") == ["erased"]


def test_an_entry_that_nobody_vouches_for_stops_the_replay_before_anything_is_changed(shredded_since: World, tmp_path: Path) -> None:
    world = shredded_since
    other = create_signing_key(tmp_path / "other")
    forged = entry(world, tenant("delta"))
    put(world, forged, dsse.sign(PAYLOAD_TYPE, forged.to_bytes(), [other]).to_bytes())
    said = world.cli("ledger", "replay")
    assert said.returncode == 2
    assert "--trust-key" in said.stderr.decode()
    assert world.value("SELECT count(*) FROM ledger") == 0
    assert world.json("ledger", "verify", code=1)["unverified"]
    trust = ("--trust-key", str(public_path(tmp_path / "other")))
    assert world.json("ledger", "verify", *trust)["unverified"] == []
    assert world.json("ledger", "replay", *trust)["applied"]["shred"] == 9
    assert seen(world, "delta", "aes-1") == ["erased"]


def entry(world: World, scope: Scope, **changes: Any) -> Entry:
    known: dict[str, Any] = {
        "entry_id": uuid4(), "command_id": uuid4(), "deployment": world.name, "act": "shred", "at": SystemClock().now(),
        "tenant_ref": tenant_ref(scope.tenant), "kind": scope.kind, "scope_ref": scope_ref(scope), "generation": 1,
    }  # fmt: skip
    return Entry(**known | changes)


def put(world: World, said: Entry, envelope: bytes) -> None:
    producer = Producer(client_config(world.settings, acks="all"))
    producer.produce(world.topic("ledger"), envelope, key_of(said.deployment, said.entry_id))
    assert producer.flush(60) == 0


def test_a_database_on_another_server_or_timeline_is_refused_although_it_lacks_nothing(world: World) -> None:
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", acme=("aes-1",))
    for change in ("system_identifier = '1'", "timeline = timeline + 1", "deployment = 'another'"):
        world.sql(f"UPDATE ledger_watermark SET {change}")
        with pytest.raises(LedgerBehind):
            world.events("acme")
        if "deployment" not in change:
            stop(*(plane for plane in (control, data) if plane.process.poll() is None))
            assert sum(world.json("ledger", "replay")["applied"].values()) == 0
            assert seen(world, "acme", "aes-1") == [b"old"]


def test_a_topic_that_was_deleted_is_filled_again_from_the_database(world: World) -> None:
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", acme=("aes-1",), other=("aes-1",))
    world.carry_out("shred", tenant("acme"))
    stop(control, data)
    admin = AdminClient(client_config(world.settings))
    admin.delete_topics([world.topic("ledger")])[world.topic("ledger")].result()
    until(lambda: world.topic("ledger") not in admin.list_topics(timeout=10).topics, "the topic to go")
    with pytest.raises(LedgerBehind, match="topics apply"):
        world.events("other")
    world.json("topics", "apply")
    with pytest.raises(LedgerBehind, match=MEND):
        world.events("other")
    assert world.json("ledger", "replay")["published_again"] == 1
    assert [found["act"] for found in world.json("ledger", "list")] == ["shred"]
    assert seen(world, "other", "aes-1") == [b"old"]


def test_the_ledger_names_no_tenant_no_scope_and_no_key(world: World) -> None:
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", acme=("aes-jane-doe",))
    world.carry_out("shred", stream_of("acme", "aes-jane-doe"), reason="about Jane Doe")
    stop(control, data)
    (record,) = world.records(world.topic("ledger"))
    document = json.loads(record.value())
    payload = base64.b64decode(document["payload"])
    said = parse_entry(payload)
    assert (said.act, said.scope_ref) == ("shred", scope_ref(stream_of("acme", "aes-jane-doe")))
    assert {end.topic for end in said.sources} == {world.topic("in")}
    assert sum(end.end_offset for end in said.sources) == 1
    text = record.key() + record.value() + payload
    assert b"acme" not in text
    assert b"jane" not in text.lower()
    for row in world.sql("SELECT key_id, commitment FROM encryption_keys"):
        assert str(row["key_id"]).encode() not in text
        assert row["commitment"].hex().encode() not in text


async def test_an_entry_that_the_broker_does_not_take_stays_in_the_outbox_and_is_not_skipped(world: World) -> None:
    class Away(LedgerTopic):
        def publish(self, entries: Any) -> int:
            raise BrokerUnavailable

    world.create(world.topic("ledger"), 1, cleanup_policy="compact")
    pool = await open_pool(world.dsn)
    signer = control_signer(world.settings)
    command: Any = type("Command", (), {"command_id": uuid4(), "scope": tenant("acme"), "include_plain": False})()
    try:
        away, back = (Ledger(pool, topic, signer, world.name) for topic in (Away(world.settings), LedgerTopic(world.settings)))
        async with pool.acquire() as connection, connection.transaction():
            await away.enter(connection, command, "shred", at=SystemClock().now(), generation=1)
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                await away.publish()
        assert await asyncio.to_thread(world.records, world.topic("ledger")) == []
        await back.publish()
        await back.publish()
        assert len(await asyncio.to_thread(world.records, world.topic("ledger"))) == 1
    finally:
        await pool.close()


async def test_the_gate_asks_kafka_once_and_again_when_the_contents_may_be_other_ones(world: World) -> None:
    asked: list[str] = []

    class Counted(LedgerTopic):
        def log(self) -> Any:
            asked.append("log")
            return super().log()

    world.create(world.topic("ledger"), 1, cleanup_policy="compact")
    gate = LedgerGate(Counted(world.settings), world.name, records=True)
    connection = await connect(world.dsn)
    try:
        for _ in range(3):
            await gate.check(connection)
        assert len(asked) == 1
        await connection.execute("CREATE TABLE kept AS SELECT * FROM ledger; TRUNCATE ledger; DROP TABLE kept")  # as a dump that is put back does
        await gate.check(connection)
        assert len(asked) == 2
    finally:
        await connection.close()


def test_pseudonyms_in_sql_are_those_of_the_code(world: World) -> None:
    for name in ("acme", "ac→me", "x" * 100):
        assert world.value("SELECT tenant_ref($1)", name) == tenant_ref(name)
        for kind in ScopeKind:
            scope = Scope.of_tenant(name) if kind is ScopeKind.TENANT else Scope(tenant=name, kind=kind, id="žluť/1 ")
            assert world.value("SELECT scope_ref($1, $2, $3)", name, kind.value, scope.id) == scope_ref(scope)


def test_an_entry_is_what_it_was_after_it_was_written_and_read(world: World) -> None:
    ends = tuple(SourceEnd(topic="users", topic_id=topic_id, partition=p, end_offset=p * 7) for topic_id in ("a", "b") for p in range(2))
    said = entry(world, stream_of("acme", "s"), sources=ends, keys_sha256="00", undoes=uuid4())
    assert parse_entry(said.to_bytes()) == said


def test_the_ledger_topic_is_compacted_and_has_one_order(world: World) -> None:
    world.json("topics", "apply")
    described = world.json("topics", "plan")
    mine = next(row for row in described if row["topic"] == world.topic("ledger"))
    assert (mine["action"], mine["partitions"], mine["config"]["cleanup.policy"]) == ("none", 1, "compact")


def test_a_ledger_topic_that_forgets_is_refused_at_start_and_one_that_forgot_is_not_believed(world: World) -> None:
    world.create(world.topic("ledger"), 1, cleanup_policy="delete")
    said = world.cli("control")
    assert said.returncode == 2
    assert "would forget shreds" in said.stderr.decode()
    world.json("topics", "apply")
    for _ in range(2):
        told = entry(world, tenant("acme"))
        put(world, told, dsse.sign(PAYLOAD_TYPE, told.to_bytes(), [control_signer(world.settings)]).to_bytes())
    admin = AdminClient(client_config(world.settings))
    for future in admin.delete_records([TopicPartition(world.topic("ledger"), 0, 2)]).values():
        future.result()
    with pytest.raises(LedgerBehind, match="lost entries"):
        world.events("acme")
    assert "lost entries" in world.cli("ledger", "replay").stderr.decode()


def test_a_replay_brings_back_holds_and_skips_what_was_taken_back_within_its_grace(world: World) -> None:
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", alpha=("aes-1",), beta=("aes-1",), gamma=("aes-1", "aes-2"))
    stop(control, data)
    back_up(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"mid", gamma=("aes-9",))
    assert world.carry_out("shred", tenant("alpha"), options={"grace": "1h"})["status"] == "inaccessible"
    assert world.carry_out("readmit", tenant("alpha"), options={"restore": True})["status"] == "done"
    for scope in (tenant("beta"), stream_of("gamma", "aes-1"), stream_of("gamma", "aes-9"), stream_of("gamma", "aes-2")):
        assert world.carry_out("hold", scope)["status"] == "done"
    assert world.carry_out("release", stream_of("gamma", "aes-2"))["status"] == "done"
    stop(control, data)
    restore(world)
    assert world.json("ledger", "replay")["applied"] == {"shred": 1, "hold": 4, "release": 1, "readmit": 1}
    assert seen(world, "alpha", "aes-1") == [b"old"]
    world.control()
    for held in (tenant("beta"), stream_of("gamma", "aes-1"), stream_of("gamma", "aes-9")):  # the last has no name here yet
        assert world.carry_out("shred", held)["error"]["code"] == "legal_hold"
    assert world.carry_out("shred", stream_of("gamma", "aes-2"))["status"] == "inaccessible"
    assert seen(world, "beta", "aes-1") == seen(world, "gamma", "aes-1") == [b"old"]


def test_a_person_and_a_class_that_the_backup_does_not_know_stay_erased(make_world: Callable[..., World]) -> None:
    policies = {"install": [{"class": "Aes", "key_scope": "subject", "subject": "header:ce_subjectid"}]}
    world = make_world(policies=policies)
    jane, joe = ([("ce_subjectid", name)] for name in (b"jane", b"joe"))
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    world.event(world.topic("in"), b"joe 1", stream="aes-1", headers=joe)
    world.settle()
    stop(control, data)
    back_up(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    for stream in ("aes-1", "aes-2"):
        world.event(world.topic("in"), b"jane 1", stream=stream, headers=jane)
    world.settle()
    assert world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane"))["status"] == "inaccessible"
    stop(control, data)
    restore(world)
    assert world.json("ledger", "replay")["applied"]["shred"] == 1
    world.control(wait=False)
    world.run()
    world.event(world.topic("in"), b"jane 2", stream="aes-1", headers=jane)
    world.event(world.topic("in"), b"joe 2", stream="aes-1", headers=joe)
    world.settle()
    assert seen(world, "acme", "aes-1") == [b"joe 1", b"joe 2"]
    assert seen(world, "acme", "aes-2") == []
    assert world.value("SELECT count(*) FROM refusals WHERE reason = 'scope_erased'") == 3


def test_a_database_from_within_a_grace_learns_that_the_shred_was_taken_back(world: World) -> None:
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", alpha=("aes-1",), beta=("aes-1", "aes-2"))
    for scope in (tenant("alpha"), stream_of("beta", "aes-1")):
        assert world.carry_out("shred", scope, options={"grace": "1h"})["status"] == "inaccessible"
    stop(control, data)
    back_up(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    for scope in (tenant("alpha"), stream_of("beta", "aes-1")):
        assert world.carry_out("readmit", scope, options={"restore": True})["status"] == "done"
    stop(control, data)
    restore(world)
    assert world.json("ledger", "replay")["applied"] == {"shred": 0, "hold": 0, "release": 0, "readmit": 2}
    assert seen(world, "alpha", "aes-1") == seen(world, "beta", "aes-1") == [b"old"]
    assert world.value("SELECT count(*) FROM quarantined_keys") == 0
    assert world.value("SELECT count(*) FROM shred_barriers") == 0


def test_a_command_that_a_restored_database_does_not_know_is_not_carried_out_again(world: World) -> None:
    """Else a copy of an old shred erases what was readmitted behind it."""
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    publish(world, b"old", alpha=("aes-1",))
    stop(control, data)
    back_up(world)
    control, data = world.control(wait=False), world.run()
    control.wait_ready()
    command_id, value = kit.command(world.settings, "shred", tenant("alpha"))
    kit.send(world.settings, value)
    assert world.receipt(str(command_id))["status"] == "inaccessible"
    assert world.carry_out("readmit", tenant("alpha"))["status"] == "done"
    publish(world, b"new", alpha=("aes-1",))
    stop(control, data)
    restore(world)
    assert world.json("ledger", "replay")["applied"]["shred"] == 1
    world.control()
    kit.send(world.settings, value)
    receipt = world.receipt(str(command_id), ("rejected", "inaccessible"))
    assert (receipt["status"], receipt["error"]["code"]) == ("rejected", "carried_out_before")
    assert world.value("SELECT state FROM tenants WHERE tenant_id = 'alpha'") == "active"
