"""Promise: what was promised before a restore of the database is kept after it: holds, also within a grace, and commands that were accepted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from confluent_kafka import Consumer, TopicPartition

from sidecar import grace, rereading
from sidecar.control import ControlPlane
from sidecar.core.command import receipt, receipt_id
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope, ScopeKind
from sidecar.inbox import ControlRecord
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.receipts import Outgoing, ReceiptPublisher
from sidecar.ledger import Ledger
from sidecar.ledger_replay import LedgerReplay, trusted
from sidecar.postgres import holds, migrations, shreds
from sidecar.postgres.connection import connect, connected, open_pool
from sidecar.settings import Settings, load
from sidecar.signing import control_signer
from sidecar.steps import Steps, SystemClock
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.test_e09_a_hold_is_never_overrun import Plane, control_plane

ACME = Scope.of_tenant("acme")
STREAM, LATE, LATER = (Scope(tenant="acme", kind=ScopeKind.STREAM, id=i) for i in ("a", "late", "later"))
CLASS = Scope(tenant="acme", kind=ScopeKind.CLASS, id="C")


@dataclass
class Restored:
    """A deployment, its database, and a backup of it. `before` serves the one, `after` the other."""

    stack: LocalStack
    name: str
    folder: Path
    dsn: str
    backup: str

    def before(self) -> Any:
        return control_plane(self.stack, self.dsn, self.folder, self.name)

    def after(self) -> Any:
        return control_plane(self.stack, self.backup, self.folder, self.name)

    @asynccontextmanager
    async def steps(self) -> AsyncIterator[tuple[Settings, Steps]]:
        settings = load(kit.write_config(self.folder, kit.document(self.name, self.stack.bootstrap_servers, self.backup)))
        pool, admin = await open_pool(self.backup), Admin(settings)
        ledger = Ledger(pool, LedgerTopic(settings, admin), control_signer(settings), self.name)
        try:
            yield settings, Steps(pool, admin, SystemClock(), ledger)
        finally:
            await pool.close()

    async def replay(self) -> dict[str, Any]:
        async with self.steps() as (settings, steps), connected(self.backup) as lead:
            replay = LedgerReplay(settings, steps.pool, steps, LedgerTopic(settings), trusted(settings, []))
            return (await replay.run(lead))["applied"]  # type: ignore[no-any-return]

    async def sql(self, query: str) -> list[Any]:
        """Of the restored database."""
        connection = await asyncpg.connect(self.backup)
        try:
            return list(await connection.fetch(query))
        finally:
            await connection.close()


@pytest.fixture
async def restored(local_stack: LocalStack, make_database: Callable[[], str], tmp_path: Path, unique: Callable[[str], str]) -> Restored:
    """Tenant acme with stream a of class C was backed up."""
    dsn, backup = make_database(), make_database()
    connection = await connect(dsn)
    await migrations.migrate(connection)
    await kit.seed(connection, "acme", {"a": "C"})
    await connection.close()
    server = await asyncpg.connect(local_stack.dsn)
    here, there = (urlsplit(d).path[1:] for d in (dsn, backup))
    await server.execute(f"DROP DATABASE {there}")
    await server.execute(f"CREATE DATABASE {there} TEMPLATE {here}")
    await server.close()
    return Restored(local_stack, unique("r"), tmp_path, dsn, backup)


async def destroyed(restored: Restored) -> list[str]:
    """The checker: tenants whose key is nowhere any more, not even in quarantine."""
    rows = await restored.sql(
        "SELECT tenant_id FROM tenant_keys k WHERE wrapped IS NULL AND NOT EXISTS (SELECT FROM quarantined_keys q WHERE q.tenant_id = k.tenant_id)"
    )
    return [row["tenant_id"] for row in rows]


# a hold within a grace


@pytest.mark.parametrize("held", [ACME, STREAM], ids=str)
async def test_a_hold_that_was_placed_within_a_grace_is_not_overrun_by_a_restore_and_a_replay(restored: Restored, held: Scope) -> None:
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", ACME, options={"grace": "1h"}))["status"] == "inaccessible"
        placed = await plane.carry_out("hold", held)
        assert placed["status"] == "done"
    assert await restored.replay() == {"shred": 1, "hold": 1, "release": 0, "readmit": 0}
    assert await destroyed(restored) == []
    assert [row["state"] for row in await restored.sql("SELECT state FROM tenants")] == ["shredded"]  # and nobody reads it
    assert await restored.sql("SELECT 1 FROM tenant_keys WHERE wrapped IS NOT NULL") == []
    await restored.sql("UPDATE quarantined_keys SET until = now() - interval '1 minute'")
    async with restored.steps() as (_, steps):
        await grace.destroy_unwatched(steps)
        assert await destroyed(restored) == []
        async with restored.after() as plane:
            assert (await plane.carry_out("release", ACME, options={"hold_id": placed["holds"][0]}))["status"] == "done"
        await grace.destroy_unwatched(steps)
        assert await destroyed(restored) == ["acme"]
        (act,) = await restored.sql("SELECT action FROM audit_log WHERE action LIKE '%.destroy'")
        assert act["action"] == "tenant.destroy"


async def test_control_a_replay_that_knows_no_grace_overruns_the_hold(restored: Restored, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shreds.take_keys
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", ACME, options={"grace": "1h"}))["status"] == "inaccessible"
        assert (await plane.carry_out("hold", ACME))["status"] == "done"
    monkeypatch.setattr(shreds, "take_keys", lambda connection, scope, command_id, _: real(connection, scope, command_id, None))
    await restored.replay()
    assert await destroyed(restored) == ["acme"]


async def test_a_grace_that_was_over_before_the_restore_is_over_when_the_replay_ends(restored: Restored) -> None:
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", ACME, options={"grace": "0s"}))["status"] == "inaccessible"
        assert (await plane.carry_out("shred", ACME, options={"grace": "1s"}))["status"] == "inaccessible"
    await asyncio.sleep(1.1)
    await restored.replay()
    assert await destroyed(restored) == ["acme"]


async def test_within_a_grace_a_replayed_shred_can_still_be_taken_back(restored: Restored) -> None:
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", STREAM, options={"grace": "1h"}))["status"] == "inaccessible"
    await restored.replay()
    assert await restored.sql("SELECT 1 FROM encryption_keys WHERE key_material IS NOT NULL") == []
    async with restored.after() as plane:
        assert (await plane.carry_out("readmit", STREAM, options={"restore": True}))["status"] == "done"
    assert len(await restored.sql("SELECT 1 FROM encryption_keys WHERE key_material IS NOT NULL AND is_active")) == 1


async def test_a_replayed_shred_finds_the_key_of_a_stream_that_has_texts_and_no_event(restored: Restored) -> None:
    for dsn in (restored.dsn, restored.backup):
        async with connected(dsn) as connection:
            await connection.execute(
                """INSERT INTO encryption_keys (tenant_id, key_id, scope_kind, scope_id, generation, kek_version, key_material, commitment)
                   SELECT tenant_id, md5('text')::uuid, 'stream', 'text', generation, kek_version, key_material, commitment FROM encryption_keys"""
            )
    async with restored.before() as plane:
        await plane.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="text"))
    await restored.replay()
    live = await restored.sql("SELECT scope_id FROM encryption_keys WHERE key_material IS NOT NULL")
    assert [row["scope_id"] for row in live] == ["a"]


# a hold whose name has not come up


@pytest.fixture
async def foretold(restored: Restored) -> str:
    """A hold on stream `late`, which the backup does not know; -> its id. Replayed."""
    async with restored.before() as plane:
        await kit.seed(plane.database, "acme", {"late": "L"})
        placed = await plane.carry_out("hold", LATE)
    await restored.replay()
    assert await restored.sql("SELECT 1 FROM legal_holds") == []
    return str(placed["command_id"])


async def test_a_hold_whose_name_has_not_come_up_since_the_restore_stands_in_the_way_of_whatever_may_cover_it(
    restored: Restored, foretold: str
) -> None:
    async with restored.after() as plane:
        for scope in (ACME, CLASS, Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane")):
            refused = await plane.carry_out("shred", scope)
            assert (refused["status"], (refused["error"] or {}).get("code"), refused.get("holds")) == ("rejected", "legal_hold", [foretold])
        preview = await plane.carry_out("shred", ACME, options={"dry_run": True})
        assert [hold["hold_id"] for hold in preview["holds"]] == [foretold]
        assert (await plane.carry_out("shred", LATER))["status"] == "inaccessible"  # another stream
        named = await plane.carry_out("shred", LATE)  # a command is a way to name it
        assert (named["error"]["code"], named["holds"]) == ("legal_hold", [foretold])


@pytest.mark.parametrize(("scope", "options"), [(ACME, "hold_id"), (LATE, None)], ids=["by its id", "by its name"])
async def test_a_hold_whose_name_has_not_come_up_can_be_released(restored: Restored, foretold: str, scope: Scope, options: str | None) -> None:
    async with restored.after() as plane:
        released = await plane.carry_out("release", scope, options={options: foretold} if options else {})
        assert (released["status"], released["holds"]) == ("done", [foretold])
        assert (await plane.carry_out("release", LATE))["error"]["code"] == "unknown_hold"  # nor does its name bring it back
        assert (await plane.carry_out("shred", ACME))["status"] == "inaccessible"


async def test_control_holds_by_name_alone_let_the_tenants_shred_through(restored: Restored, foretold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(holds, "_foretold", nothing)
    async with restored.after() as plane:
        assert (await plane.carry_out("shred", ACME))["status"] == "inaccessible"


# commands that were accepted


def acked(settings: Settings, *values: bytes) -> None:
    """On the control topic, and behind the group's committed offsets: what a control plane did before the database was restored."""
    kit.send(settings, *values, key="acme")
    ends = Admin(settings).offsets({settings.control.topic: 4})[settings.control.topic]
    consumer = Consumer(client_config(settings, **{"group.id": f"{settings.deployment}.control"}))
    try:
        consumer.commit(offsets=[TopicPartition(settings.control.topic, p, end) for p, end in ends.items()], asynchronous=False)
    finally:
        consumer.close()


async def test_a_command_that_was_only_accepted_when_the_database_was_lost_is_carried_out(restored: Restored) -> None:
    async with restored.after() as plane:  # makes the topics
        settings = plane.settings
    accepted, value = kit.command(settings, "shred", STREAM)
    expired, old = kit.command(settings, "shred", ACME, not_after="2020-01-01T00:00:00Z")
    await asyncio.to_thread(acked, settings, value, old)
    async with restored.after() as plane:
        assert (await plane.receipt(accepted))["status"] == "inaccessible"
        said = await plane.receipt(expired)
        assert (said["status"], said["error"]["code"]) == ("rejected", "expired")  # no more, but not in silence
        assert await plane.database.fetchval("SELECT sum(next_offset) FROM control_cursors") == 2
    async with restored.after() as plane:
        assert await plane.database.fetchval("SELECT count(*) FROM receipts") == 3  # nothing is read a third time


async def test_a_command_that_was_refused_for_a_hold_does_not_come_alive_with_the_restore(restored: Restored) -> None:
    """The hold is gone by then."""
    async with restored.after() as plane:
        settings = plane.settings
    command_id, value = kit.command(settings, "shred", ACME)
    await asyncio.to_thread(acked, settings, value)
    refused = CommandRejected("legal_hold", "a legal hold is in force")
    await asyncio.to_thread(publish, settings, receipt_id(command_id, "rejected"), command_id, refused)
    assert await took_again(restored) == []


async def test_a_negative_receipt_for_a_record_that_only_named_the_command_does_not_answer_it(restored: Restored) -> None:
    """Else whoever may write to the topic could have any command forgotten at the next restore."""
    async with restored.after() as plane:
        settings = plane.settings
    command_id, value = kit.command(settings, "shred", ACME)
    await asyncio.to_thread(acked, settings, value)
    await asyncio.to_thread(publish, settings, receipt_id("record", "elsewhere/0/7"), command_id, CommandRejected("bad_signature", "forged"))
    assert await took_again(restored) == [command_id]


async def test_control_without_a_look_at_the_receipts_the_refused_command_comes_alive(restored: Restored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "_answered_by", lambda _: None)
    with pytest.raises(AssertionError):
        await test_a_command_that_was_refused_for_a_hold_does_not_come_alive_with_the_restore(restored)


def publish(settings: Settings, identity: Any, command_id: Any, error: CommandRejected) -> None:
    body = receipt(identity, command_id=command_id, op="shred", scope=ACME.to_json(), status="rejected", error=error)
    publisher = ReceiptPublisher(settings)
    publisher.open()
    publisher.publish([Outgoing(outbox_id=identity, key=None, value=kit.json.dumps(body).encode())])


async def took_again(restored: Restored) -> list[Any]:
    """The commands that the restored database has once a control plane serves it."""
    async with restored.after():
        return [row["command_id"] for row in await restored.sql("SELECT command_id FROM commands")]


async def test_what_is_received_is_remembered_with_its_place(restored: Restored) -> None:
    async def nothing(*_: Any) -> None:
        return None

    async with restored.steps() as (settings, _):
        plane = ControlPlane(settings, lead=nothing, follow=nothing)
        await plane.open()
        running = asyncio.create_task(plane.run())
        try:
            await asyncio.wait_for(plane.settled.wait(), 120)
            here = Plane(plane, await connect(restored.backup), settings)
            command_id, value = kit.command(settings, "rotate", ACME)
            await plane.receive([ControlRecord(value=value, source=f"{settings.control.topic}/3/41")])
            assert (await here.receipt(command_id))["status"] == "done"
            rows = await here.database.fetch("SELECT partition, next_offset FROM control_cursors")
            assert [tuple(row) for row in rows] == [(3, 42)]
            await here.database.close()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await plane.close()


async def test_a_replayed_shred_is_shredded_again_to_have_what_it_left_watched(restored: Restored) -> None:
    async with restored.before() as plane:
        first = await plane.carry_out("shred", ACME)
    await restored.replay()
    assert await restored.sql("SELECT 1 FROM residue") == []
    async with restored.after() as plane:
        again = await plane.carry_out("shred", ACME)
        assert again["status"] == "inaccessible"
        assert {row["kind"] for row in again["residue"]} == {row["kind"] for row in first["residue"]} >= {"database", "wal", "backup", "seal_epoch"}
        assert again["keys"] == first["keys"]
        assert await plane.database.fetchval("SELECT count(*) FROM residue") == len(again["residue"])


@pytest.mark.parametrize(("include_plain", "left"), [(True, 0), (False, 3)], ids=["deleted", "kept"])
async def test_plain_events_that_a_shred_deleted_do_not_come_back_with_a_restore(restored: Restored, include_plain: bool, left: int) -> None:
    for dsn in (restored.dsn, restored.backup):
        async with connected(dsn) as database:
            await kit.add_events(database, "acme", "a", 3, plain=True)
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", ACME, options={"include_plain": include_plain}))["status"] == "inaccessible"
    await restored.replay()
    assert [row["n"] for row in await restored.sql("SELECT count(*) AS n FROM messages")] == [left]


# a shred that was under way in the backup, and that a readmission has followed since


@pytest.mark.parametrize(("scope", "step"), [(CLASS, "closed"), (ACME, "noticed")], ids=str)
async def test_a_shred_that_was_under_way_in_the_backup_does_not_reach_behind_its_readmission(restored: Restored, scope: Scope, step: str) -> None:
    async with restored.before() as plane:
        assert (await plane.carry_out("shred", scope, options={"include_plain": True}))["status"] == "inaccessible"
        assert (await plane.carry_out("readmit", scope))["status"] == "done"
        command = await plane.database.fetchrow("SELECT * FROM commands WHERE op = 'shred'")
        entries = await plane.database.fetch("SELECT * FROM ledger ORDER BY seq")
    async with connected(restored.backup) as database:
        await database.execute(
            """INSERT INTO commands (command_id, op, tenant_id, payload, payload_sha256, status, step, result)
               VALUES ($1, 'shred', 'acme', $2, $3, 'accepted', $4, $5)""",
            command["command_id"], command["payload"], command["payload_sha256"], step, {name: fact for name, fact in command["result"].items() if not name.startswith("plain")},
        )  # fmt: skip
        if step == "noticed":  # behind the fence: its entry was written with that
            await database.execute("UPDATE tenants SET state = 'shredding'")
            await kit.add_events(database, "acme", "a", 2, plain=True, first=11)  # these it had not deleted yet
            await database.execute(
                "INSERT INTO ledger (entry_id, command_id, tenant_ref, envelope, published_at) VALUES ($1, $2, $3, $4, now())",
                *[entries[0][name] for name in ("entry_id", "command_id", "tenant_ref", "envelope")],
            )
        else:
            await shreds.fence(database, scope, command["command_id"])
    await restored.replay()
    async with connected(restored.backup) as database:  # what came behind the readmission is read again
        await database.execute(
            """INSERT INTO encryption_keys (tenant_id, key_id, scope_kind, scope_id, generation, kek_version, key_material, commitment)
               SELECT 'acme', md5('new')::uuid, 'stream', 'a', generation, 1, 'wrapped', 'new' FROM tenants"""
        )
        await kit.add_events(database, "acme", "a", 3, plain=True)
    async with restored.after() as plane:
        again = await plane.receipt(command["command_id"])
    assert (again["status"], again["error"]["code"]) == ("rejected", "carried_out_before")
    assert [row["n"] for row in await restored.sql("SELECT count(*) AS n FROM messages")] == [3]
    assert [row["n"] for row in await restored.sql("SELECT count(*) AS n FROM encryption_keys WHERE key_material = 'wrapped'")] == [1]
