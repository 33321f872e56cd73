"""The control plane on a real broker and database: one process of it per test, killed or stopped at the end."""

# ruff: noqa: ASYNC110 (what is waited for happens in another process)

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from confluent_kafka import KafkaException, Producer

from sidecar import rotation
from sidecar.control import ControlPlane, Executor, Outbox
from sidecar.core.command import stored
from sidecar.core.errors import BrokerUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import guard_stripe
from sidecar.inbox import ControlRecord, Inbox
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.receipts import ReceiptPublisher
from sidecar.ledger import Ledger
from sidecar.postgres import audit, commands, migrations, rotations
from sidecar.postgres.connection import Connection, connect, open_pool
from sidecar.settings import Settings, load
from sidecar.signing import control_signer
from sidecar.steps import FINISHED, Foreground, Steps, SystemClock
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack


@dataclass(frozen=True)
class World:
    config: Path
    settings: Settings
    database: Connection

    async def final(self, command_id: UUID) -> dict[str, Any]:
        return await kit.final_receipt(self.database, command_id)

    async def carry_out(self, op: str, scope: Scope, **changes: Any) -> dict[str, Any]:
        command_id, value = kit.command(self.settings, op, scope, **changes)
        kit.send(self.settings, value)
        return await self.final(command_id)

    async def finished(self, command_id: UUID | str) -> None:
        """Its notices too."""
        async with asyncio.timeout(120):
            while await self.database.fetchval("SELECT finished_at FROM commands WHERE command_id = $1", UUID(str(command_id))) is None:
                await asyncio.sleep(0.02)

    async def published(self, count: int) -> list[dict[str, Any]]:
        """What is on the receipts topic, once that many are, and that no more come."""
        async with asyncio.timeout(120):
            while len(kit.published(self.settings)) < count:
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)
        return kit.published(self.settings)

    async def add_view(self, topic: str, partitions: int, *, key_mode: str = "event", **match: list[str]) -> None:
        Admin(self.settings).create(topic, partitions, {})
        await self.database.execute(
            "INSERT INTO views (name, topic, partitions, key_mode, definition) VALUES ($1, $1, $2, $3, $4)",
            topic,
            partitions,
            key_mode,
            {"match": match},
        )


@pytest.fixture
async def world(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[World]:
    config = kit.write_config(tmp_path, kit.document(unique("c"), local_stack.bootstrap_servers, database))
    connection = await connect(database)
    await migrations.migrate(connection)
    yield World(config, load(config), connection)
    await connection.close()


def stream_of(tenant: str, name: str) -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.STREAM, id=name)


def class_of(tenant: str, name: str) -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.CLASS, id=name)


ACME = Scope.of_tenant("acme")


# receipts


async def test_every_command_that_is_refused_gets_a_receipt_and_the_topic_moves_on(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "Shared", "b": "Shared"}, shared=class_of("acme", "Shared"))
    await kit.seed(world.database, "acme", {"own": "Own"})
    past = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    bad: list[tuple[str, UUID | None, bytes | None]] = [("malformed", None, raw) for raw in (b"not json", None, b"[]", b"[" * 50_000, b"\xff", b"")]
    for code, scope, changes in (
        ("unknown_op", ACME, {"op": "explode"}),
        ("malformed", ACME, {"reason": "nul \0 in it"}),
        ("malformed", ACME, {"reason": "\ud800"}),
        ("unknown_tenant", Scope.of_tenant("nobody"), {}),
        ("expired", ACME, {"not_after": past}),
        ("wrong_audience", ACME, {"audience": "another"}),
        ("include_plain_unsupported", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane"), {"options": {"include_plain": True}}),
        ("shared_key", stream_of("acme", "a"), {}),
    ):
        bad.append((code, *kit.command(world.settings, "shred", scope, **changes)))
    bad.append(("unknown_stream", *kit.command(world.settings, "rotate", stream_of("acme", "none"))))
    bad.append(("dry_run_unsupported", *kit.command(world.settings, "rotate", ACME, options={"dry_run": True})))
    bad.append(("malformed", None, json.dumps({"payloadType": "x", "payload": "e30=", "signatures": []}).encode()))
    bad.append(("unknown_issuer", *kit.command(world.settings, "shred", ACME, signers=[kit.issuer("stranger")[0]])))
    good, last = kit.command(world.settings, "rotate", stream_of("acme", "own"))
    with kit.control(world.config):
        kit.send(world.settings, *(raw for _, _, raw in bad), last, key="acme")  # one key: one partition, in order
        assert (await world.final(good))["status"] == "done"
        # rejected at once: one receipt; refused by what the execution found: accepted, then rejected
        late = {str(i) for code, i, _ in bad if code in ("shared_key", "unknown_stream")}
        receipts = await world.published(len(bad) + len(late) + 2)
    rejected = [r for r in receipts if r["status"] == "rejected"]
    assert Counter(r["error"]["code"] for r in rejected) == Counter(code for code, _, _ in bad)
    assert {r["command_id"]: r["error"]["code"] for r in rejected if r["command_id"]} == {str(i): code for code, i, _ in bad if i}
    assert {r["command_id"] for r in receipts if r["status"] == "accepted"} == late | {str(good)}
    assert len({r["receipt_id"] for r in receipts}) == len(receipts)
    shared = next(r for r in rejected if r["error"]["code"] == "shared_key")
    assert "class Shared" in shared["error"]["message"]
    assert shared["error"]["message"].endswith("with b")
    assert await world.database.fetchval("SELECT count(*) FROM encryption_keys WHERE key_material IS NULL") == 0
    assert await world.database.fetchval("SELECT count(*) FROM erased_scopes") == 0


async def test_the_same_id_with_other_bytes_is_refused_and_the_first_stands(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    command_id, first = kit.command(world.settings, "rotate", ACME)
    _, other = kit.command(world.settings, "shred", ACME, command_id=str(command_id))
    with kit.control(world.config):
        kit.send(world.settings, first, other)
        assert (await world.final(command_id))["status"] == "done"
        receipts = await world.published(3)
        assert Counter(r["status"] for r in receipts) == {"accepted": 1, "done": 1, "rejected": 1}
        refused = next(r for r in receipts if r["status"] == "rejected")
        assert (refused["command_id"], refused["error"]["code"], refused["op"]) == (str(command_id), "id_reused", "shred")
        assert (await commands.receipt(world.database, command_id) or {})["status"] == "done"
    assert await world.database.fetchval("SELECT state FROM tenants") == "active"


async def test_the_same_bytes_again_give_the_stored_receipt_again(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    command_id, value = kit.command(world.settings, "rotate", ACME)
    with kit.control(world.config):
        kit.send(world.settings, value)
        done = await world.final(command_id)
        kit.send(world.settings, value)
        receipts = await world.published(3)
    assert Counter(r["status"] for r in receipts) == {"accepted": 1, "done": 2}
    assert [r for r in receipts if r["status"] == "done"] == [done, done]
    assert await world.database.fetchval("SELECT epoch FROM tenants") == 2  # it was carried out once
    assert [r["status"] for r in await commands.receipts(world.database, command_id=command_id)] == ["accepted", "done"]


async def test_a_redelivery_by_kafka_gives_no_second_receipt(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    pool = await open_pool(world.settings.postgres.for_role("control"))
    inbox = Inbox(world.settings, pool, SystemClock(), lambda: None)
    _, value = kit.command(world.settings, "rotate", ACME)
    for source in ("control/0/5", "control/0/5", "control/0/6", "control/0/6"):
        await inbox.receive(ControlRecord(value=value, source=source))
    for source in ("control/1/1", "control/1/1"):
        await inbox.receive(ControlRecord(value=b"not json", source=source))
    assert await world.database.fetchval("SELECT count(*) FROM receipts WHERE command_id IS NOT NULL") == 2  # the first, and once more for 6
    assert await world.database.fetchval("SELECT count(*) FROM receipts WHERE command_id IS NULL") == 1
    await pool.close()


async def test_unsigned_commands_need_permission(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    strict = world.settings.model_copy(update={"control": world.settings.control.model_copy(update={"allow_unsigned": False})})
    pool = await open_pool(strict.postgres.for_role("control"))
    command_id, value = kit.command(strict, "shred", ACME)
    await Inbox(strict, pool, SystemClock(), lambda: None).receive(ControlRecord(value=value, source="c/0/0"))
    await pool.close()
    assert (await commands.receipt(world.database, command_id) or {})["error"]["code"] == "unsigned"
    assert await world.database.fetchval("SELECT count(*) FROM commands WHERE finished_at IS NULL") == 0


async def test_a_command_whose_sender_aborted_is_not_carried_out(world: World, unique: Callable[[str], str]) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    aborted_id, aborted = kit.command(world.settings, "shred", ACME)
    with kit.control(world.config):
        producer = Producer(client_config(world.settings, **{"transactional.id": unique("sender")}))
        producer.init_transactions(10)
        producer.begin_transaction()
        producer.produce(world.settings.control.topic, aborted, key="acme")
        producer.flush(10)
        producer.abort_transaction(10)
        assert (await world.carry_out("rotate", ACME))["status"] == "done"
    assert await world.database.fetchval("SELECT count(*) FROM commands WHERE command_id = $1", aborted_id) == 0


# shred and rotate


async def test_shred_of_a_tenant(world: World, unique: Callable[[str], str]) -> None:
    await kit.seed(world.database, "acme", {"a": "C", "b": "D"})
    await kit.seed(world.database, "zeta", {"a": "C"})
    await kit.add_events(world.database, "acme", "a", 7)
    await kit.add_events(world.database, "acme", "p", 3, plain=True)
    source, view, other = unique("users"), unique("view"), unique("other")
    admin = Admin(world.settings)
    admin.create(source, 2, {"retention.ms": "3600000"})
    topic_id = admin.describe([source])[source].topic_id
    source_id = await world.database.fetchval("INSERT INTO source_topics (topic, topic_id) VALUES ($1, $2) RETURNING source_id", source, topic_id)
    await world.database.execute("INSERT INTO source_topics (topic, topic_id) VALUES ($1, 'of a topic that was made again')", source)
    await world.add_view(view, 2, tenants=["*"])
    await world.add_view(other, 1, tenants=["z*"])
    producer = Producer(client_config(world.settings))
    for _ in range(3):
        producer.produce(source, b"x", partition=1)
        producer.produce(view, b"x", partition=0)
    producer.flush(10)
    with kit.control(world.config):
        receipt = await world.carry_out("shred", ACME)
        await world.finished(receipt["command_id"])
        again = await world.carry_out("shred", ACME)
        rotate = await world.carry_out("rotate", ACME)
    assert receipt["status"] == again["status"] == "inaccessible"
    assert rotate["error"]["code"] == "tenant_shredded"
    kek = await world.database.fetchrow("SELECT wrapped, state, fingerprint, destroyed_at FROM tenant_keys WHERE tenant_id = 'acme'")
    assert (kek["wrapped"], kek["state"]) == (None, "destroyed")
    assert receipt["keys"]["count"] == 1
    assert receipt["keys"]["deks_below"] == 2
    assert receipt["keys"]["fingerprints_sha256"] == again["keys"]["fingerprints_sha256"]
    assert receipt["events"] == {"unreadable": 7, "plain_remaining": 3}
    assert receipt["barrier"][view] == {"0": 3, "1": 0}
    assert receipt["accepted_at"] <= receipt["inaccessible_at"]
    assert (receipt["irrecoverable_at"], receipt["irrecoverable_reason"]) == (None, "next seal epoch")
    residue = {entry["where"]: entry["until"] for entry in receipt["residue"]}
    assert residue[f"topic {source}"].endswith("Z")
    states = {r["tenant_id"]: r["state"] for r in await world.database.fetch("SELECT tenant_id, state FROM tenants")}
    assert states == {"acme": "shredded", "zeta": "active"}
    barriers = await world.database.fetch(
        "SELECT source_id, partition, end_offset FROM shred_barriers WHERE command_id = $1 ORDER BY partition", UUID(receipt["command_id"])
    )
    assert [tuple(r) for r in barriers] == [(source_id, 0, 0), (source_id, 1, 3)]
    notices = [m for m in kit.read_topic(world.settings, view) if m.value() != b"x" and receipt["command_id"] in m.value().decode()]
    assert sorted(m.partition() for m in notices) == [0, 1]
    assert dict(notices[0].headers())["ce_type"] == b"io.sidecar.erased.v1"
    said = json.loads(notices[0].value())
    assert said == {"tenant": "acme", "scope": {"kind": "tenant"}, "command_id": receipt["command_id"], "erased_at": receipt["inaccessible_at"]}
    assert kit.read_topic(world.settings, other) == []
    row = await world.database.fetchrow(
        "SELECT action, details FROM audit_log WHERE writer = $1 AND seq = $2", receipt["audit"]["writer"], receipt["audit"]["seq"]
    )
    assert (row["action"], row["details"]["command_id"]) == ("tenant.shred", receipt["command_id"])
    assert [entry async for entry in audit.verify(world.database)] == [
        ("control-0", await world.database.fetchval("SELECT max(seq) FROM audit_log"), None)
    ]


async def test_shred_of_a_stream_destroys_every_version_and_leaves_its_neighbour(world: World) -> None:
    keys = await kit.seed(world.database, "acme", {"jane@acme.com": "C", "a_b": "C", "a%": "C"})
    key_id, _ = keys["jane@acme.com"]
    second = """INSERT INTO encryption_keys SELECT tenant_id, key_id, 2, scope_kind, scope_id, generation, kek_version, key_material, commitment
                FROM encryption_keys WHERE key_id = $1 AND key_version = 1"""
    await world.database.execute("UPDATE encryption_keys SET is_active = false, retired_at = now() WHERE key_id = $1", key_id)
    await world.database.execute(second, key_id)
    with kit.control(world.config):
        receipt = await world.carry_out("shred", stream_of("acme", "jane@acme.com"))
    assert (receipt["status"], receipt["keys"]["count"], receipt.get("note")) == ("inaccessible", 2, None)
    rows = await world.database.fetch("SELECT scope_id, key_material IS NULL AS gone, is_active, is_destroyed FROM encryption_keys ORDER BY scope_id")
    assert {(r["scope_id"], r["gone"], r["is_active"], r["is_destroyed"]) for r in rows} == {
        ("a%", False, True, False),
        ("a_b", False, True, False),
        ("jane@acme.com", True, False, True),
    }
    fence = await world.database.fetchrow("SELECT scope_kind, scope_id, command_id, fingerprints FROM erased_scopes")
    assert (fence["scope_kind"], fence["scope_id"], str(fence["command_id"])) == ("stream", "jane@acme.com", receipt["command_id"])
    assert len(fence["fingerprints"]) == 2
    tenant = await world.database.fetchrow("SELECT state, epoch FROM tenants")
    assert (tenant["state"], tenant["epoch"]) == ("active", 2)
    # a data subject's name must not stand in a trail that outlives the shred
    assert await world.database.fetchval("SELECT count(*) FROM audit_log WHERE details::text LIKE '%jane@%'") == 0


async def test_shred_of_an_unknown_stream_or_class_leaves_a_fence(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    with kit.control(world.config):
        for scope in (stream_of("acme", "not yet"), class_of("acme", "NotYet")):
            receipt = await world.carry_out("shred", scope)
            assert (receipt["status"], receipt["keys"]["count"], receipt["note"]) == ("inaccessible", 0, "nothing_found, fenced")
    fences = await world.database.fetch("SELECT scope_kind, scope_id FROM erased_scopes ORDER BY scope_kind")
    assert [tuple(r) for r in fences] == [("class", "NotYet"), ("stream", "not yet")]
    assert await world.database.fetchval("SELECT count(*) FROM encryption_keys WHERE is_destroyed") == 0


async def test_shred_of_a_class_takes_its_own_key_and_those_of_its_streams(world: World) -> None:
    await kit.seed(world.database, "acme", {f"own{i}": "C" for i in range(30)} | {"other": "D"})
    await kit.seed(world.database, "acme", {"x": "C", "y": "C"}, shared=class_of("acme", "C"))
    with kit.control(world.config):
        receipt = await world.carry_out("shred", class_of("acme", "C"))
    assert (receipt["status"], receipt["keys"]["count"]) == ("inaccessible", 31)
    assert await world.database.fetchval("SELECT array_agg(scope_id) FROM encryption_keys WHERE NOT is_destroyed") == ["other"]


@pytest.mark.parametrize("kind", ["stream", "class"])
async def test_a_key_that_others_need_is_not_destroyed_and_the_sharers_are_named(world: World, kind: str) -> None:
    names = {f"s{i:02d}": "C" for i in range(30)} | {"z1": "D", "z2": "D"}
    await kit.seed(world.database, "acme", names, shared=ACME)
    scope = stream_of("acme", "s00") if kind == "stream" else class_of("acme", "D")
    with kit.control(world.config):
        receipt = await world.carry_out("shred", scope)
    assert receipt["error"]["code"] == "shared_key"
    assert "a key of the tenant" in receipt["error"]["message"]
    assert "s01, s02" in receipt["error"]["message"]
    assert receipt["error"]["message"].endswith(f"and {11 if kind == 'stream' else 10} more")
    assert await world.database.fetchval("SELECT count(*) FROM encryption_keys WHERE is_destroyed") == 0
    assert await world.database.fetchval("SELECT count(*) FROM erased_scopes") == 0
    assert await world.database.fetchval("SELECT epoch FROM tenants") == 1


async def test_include_plain_deletes_plain_events_and_tombstones_their_view_records(world: World, unique: Callable[[str], str]) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    await world.database.execute(
        "INSERT INTO streams (tenant_id, stream_id, stream_type_class, is_encrypted) VALUES ('acme', 'cart', 'CartData', false)"
    )
    await kit.add_events(world.database, "acme", "a", 4)
    await kit.add_events(world.database, "acme", "cart", 5003, plain=True)
    view, of_c = unique("view"), unique("of-c")
    await world.add_view(view, 3)
    await world.add_view(of_c, 1, classes=["C"])
    with kit.control(world.config):
        receipt = await world.carry_out("shred", ACME, options={"include_plain": True})
    assert receipt["events"] == {"unreadable": 4, "plain_remaining": 0, "plain_deleted": 5003}
    assert await world.database.fetchval("SELECT count(*) FROM messages WHERE data_encrypted IS NULL") == 0
    assert await world.database.fetchval("SELECT position FROM streams WHERE stream_id = 'cart'") == 5003  # no position is given twice
    records = kit.read_topic(world.settings, view)
    assert {m.key().decode() for m in records if m.value() is None} == {f"acme/cart/{n}" for n in range(1, 5004)}
    of_cart = [m for m in records if m.partition() == next(m.partition() for m in records if m.value() is None)]
    assert of_cart[0].value() is not None  # the notice stands before the tombstones
    assert [m.value() is None for m in kit.read_topic(world.settings, of_c)] == [False]


async def test_a_shred_does_not_wait_for_the_plain_events_of_an_earlier_one(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C", "cart": "D"})
    await kit.add_events(world.database, "acme", "cart", 15_003, plain=True)
    slow, first = kit.command(world.settings, "shred", stream_of("acme", "cart"), options={"include_plain": True})
    quick, second = kit.command(world.settings, "shred", stream_of("acme", "a"))
    with kit.control(world.config):
        kit.send(world.settings, first, second, key="acme")
        assert (await world.final(slow))["events"]["plain_deleted"] == 15_003
        assert (await world.final(quick))["status"] == "inaccessible"
    order = await world.database.fetch("SELECT command_id FROM receipts WHERE status = 'inaccessible' ORDER BY created_at")
    assert [row["command_id"] for row in order] == [quick, slow]


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([("shred", "noticed"), ("shred", None)], 1),
        ([("shred", "noticed"), ("shred", None), ("hold", None)], 1),
        ([("shred", "noticed"), ("hold", None), ("shred", None)], 0),  # a hold that came first is never overtaken
        ([("shred", "noticed"), ("readmit", None)], 0),  # what it gives back would be cleared
        ([("shred", "noticed"), ("shred", "barred")], 1),
        ([("shred", "fenced"), ("shred", None)], 0),
        ([("rotate", "marked"), ("shred", None)], 1),
        ([("rotate", None), ("shred", "noticed")], 1),
        ([("hold", None), ("shred", None)], 0),
        ([("rotate", None), ("rotate", "marked")], 1),
    ],
)
async def test_what_is_done_next_for_a_tenant(world: World, waiting: list[tuple[str, str | None]], expected: int) -> None:
    ids = [uuid4() for _ in waiting]
    for n, (command_id, (op, step)) in enumerate(zip(ids, waiting, strict=True)):
        await world.database.execute(
            """INSERT INTO commands (command_id, op, tenant_id, payload, payload_sha256, status, step, received_at)
               VALUES ($1, $2, 'acme', '', '', 'accepted', $3, $4)""",
            command_id,
            op,
            step,
            datetime(2026, 1, 1, second=n, tzinfo=UTC),
        )
    job = await commands.next_job(world.database, "acme")
    assert job is not None
    assert ids.index(job.command_id) == expected


async def test_dry_run_counts_and_changes_nothing(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C", "b": "C"})
    await kit.add_events(world.database, "acme", "a", 5)
    with kit.control(world.config):
        receipt = await world.carry_out("shred", ACME, options={"dry_run": True})
    assert (receipt["status"], receipt["dry_run"], receipt["keys"]["count"], receipt["events"]["unreadable"]) == ("done", True, 2, 5)
    assert tuple(await world.database.fetchrow("SELECT state, epoch FROM tenants")) == ("active", 1)


async def test_rotate_marks_the_keys_of_its_scope_and_says_so_again_when_repeated(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C", "b": "C", "c": "D"})
    await kit.seed(world.database, "acme", {"x": "S", "y": "S"}, shared=class_of("acme", "S"))

    async def active() -> set[str]:
        return {r["scope_id"] for r in await world.database.fetch("SELECT scope_id FROM encryption_keys WHERE is_active")}

    with kit.control(world.config):
        for scope, count, left in (
            (stream_of("acme", "a"), 1, {"b", "c", "S"}),
            (stream_of("acme", "a"), 0, {"b", "c", "S"}),
            (stream_of("acme", "x"), 1, {"b", "c"}),
            (class_of("acme", "C"), 1, {"c"}),
            (ACME, 1, set()),
        ):
            receipt = await world.carry_out("rotate", scope)
            assert (receipt["status"], receipt["keys"]["count"]) == ("done", count)
            assert await active() == left
    assert await world.database.fetchval("SELECT epoch FROM tenants") == 6
    assert await world.database.fetchval("SELECT count(*) FROM encryption_keys WHERE key_material IS NULL OR retired_at IS NULL") == 0


async def test_a_shred_goes_before_a_rotation_of_the_same_tenant(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    pool = await open_pool(world.settings.postgres.for_role("control"))
    inbox = Inbox(world.settings, pool, SystemClock(), lambda: None)
    ids = []
    for number, op in enumerate(("rotate", "rotate", "shred")):
        command_id, value = kit.command(world.settings, op, ACME)
        await inbox.receive(ControlRecord(value=value, source=f"c/0/{number}"))
        ids.append(command_id)
    await pool.close()
    with kit.control(world.config):
        receipts = [await world.final(command_id) for command_id in ids]
    assert [(r["status"], (r["error"] or {}).get("code")) for r in receipts] == [
        ("rejected", "tenant_shredded"),
        ("rejected", "tenant_shredded"),
        ("inaccessible", None),
    ]


async def test_rotation_by_age_follows_the_tenants_own_policy_before_the_common_one(world: World) -> None:
    day = timedelta(days=1)
    now = datetime.now(UTC)
    await world.database.execute(
        """INSERT INTO encryption_policies (policy_id, stream_type_class, tenant_id, encryption_required, key_rotation_interval_days)
           VALUES ('own', 'UserPersonalData', 'patient', true, 400), ('never', 'AuditLog', 'acme', true, NULL)"""
    )
    await kit.seed(world.database, "acme", {"old": "UserPersonalData", "log": "AuditLog", "free": "Unmatched"}, created_at=now - 500 * day)
    await kit.seed(world.database, "acme", {"young": "UserPersonalData"}, created_at=now - 80 * day)
    await kit.seed(world.database, "acme", {"f1": "FormSubmissions"}, shared=class_of("acme", "FormSubmissions"), created_at=now - 181 * day)
    await kit.seed(world.database, "patient", {"old": "UserPersonalData"}, created_at=now - 399 * day)
    with kit.control(world.config, timer_seconds=0.2):
        async with asyncio.timeout(120):
            while await world.database.fetchval("SELECT count(*) FROM commands WHERE finished_at IS NOT NULL") < 2:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.7)  # some more turns of the timer: nothing is due any more
    found = await world.database.fetch("SELECT issuer, op, status, result ->> 'class' AS class FROM commands ORDER BY class")
    assert [tuple(r) for r in found] == [("timer", "rotate", "done", "FormSubmissions"), ("timer", "rotate", "done", "UserPersonalData")]
    retired = await world.database.fetch("SELECT tenant_id, scope_id FROM encryption_keys WHERE NOT is_active ORDER BY scope_id")
    assert [tuple(r) for r in retired] == [("acme", "FormSubmissions"), ("acme", "old")]


async def test_a_tenants_key_is_due_by_the_shortest_interval_of_the_classes_that_use_it(world: World) -> None:
    day, now = timedelta(days=1), datetime.now(UTC)
    await world.database.execute(
        """INSERT INTO encryption_policies (policy_id, stream_type_class, tenant_id, encryption_required, key_scope, key_rotation_interval_days)
           VALUES ('a', 'Short', '*', true, 'tenant', 30), ('b', 'Long', '*', true, 'tenant', 300)"""
    )
    for tenant, age in (("acme", 31), ("young", 29)):
        await kit.seed(world.database, tenant, {"s": "Short", "l": "Long"}, shared=Scope.of_tenant(tenant), created_at=now - age * day)
    with kit.control(world.config, timer_seconds=0.2):
        async with asyncio.timeout(120):
            while await world.database.fetchval("SELECT count(*) FROM commands WHERE finished_at IS NOT NULL") < 1:
                await asyncio.sleep(0.05)
    assert await world.database.fetchval("SELECT result ->> 'class' FROM commands") == "Short"
    assert [tuple(r) for r in await world.database.fetch("SELECT tenant_id, is_active FROM encryption_keys ORDER BY 1")] == [
        ("acme", False),
        ("young", True),
    ]
    assert await rotations.due(world.database, now) == []


async def test_many_keys_are_rotated_in_chunks_outside_the_guard_and_the_last_few_under_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "CHUNK", 4)
    await kit.seed(world.database, "acme", {f"s{n}": "C" for n in range(11)})
    pool = await open_pool(world.settings.postgres.for_role("control"))
    admin = Admin(world.settings)
    steps = Steps(pool, admin, SystemClock(), Ledger(pool, LedgerTopic(world.settings, admin), control_signer(world.settings), "x"))
    flow, inbox = rotation.Rotation(steps), Inbox(world.settings, pool, SystemClock(), lambda: None)
    command_id, value = kit.command(world.settings, "rotate", ACME)
    await inbox.receive(ControlRecord(value=value, source="c/0/1"))
    live = "SELECT count(*) FROM encryption_keys WHERE is_active"
    try:
        job = await commands.next_job(world.database, "acme")
        assert job is not None
        seen = []
        while job.step != FINISHED:
            job = await flow.step(job, stored(value))
            seen.append((job.step, await world.database.fetchval(live), await world.database.fetchval("SELECT epoch FROM tenants")))
            if len(seen) == 1:  # a stream gets its next version meanwhile: it is not rotated once more
                await kit.seed(world.database, "acme", {"new": "C"}, created_at=datetime.now(UTC) + timedelta(hours=1))
    finally:
        await pool.close()
    assert seen == [("marking", 7, 1), ("marking", 4, 1), ("marking", 1, 1), ("marked", 1, 2), ("done", 1, 2)]
    said = await commands.receipt(world.database, command_id)
    assert said is not None
    assert said["keys"] == {"count": 11}
    named = [r["details"]["count"] for r in await world.database.fetch("SELECT details FROM audit_log WHERE action = 'keys.rotate' ORDER BY seq")]
    assert named == [4, 4, 3, 0]


# one of it, and what it does when others fail


def readyz(process: kit.ControlProcess, path: str = "/readyz") -> str:
    with urllib.request.urlopen(process.url + path, timeout=60) as answer:
        return str(answer.read().decode())


async def test_a_second_control_process_stands_by_and_takes_over(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    with kit.control(world.config) as first, kit.control(world.config) as second:
        assert (await asyncio.to_thread(readyz, first)).strip() == "active"
        assert (await asyncio.to_thread(readyz, second)).strip() == "standby"
        assert (await world.carry_out("rotate", ACME))["status"] == "done"
        first.kill()
        assert (await world.carry_out("shred", ACME))["status"] == "inaccessible"
        async with asyncio.timeout(120):
            while (await asyncio.to_thread(readyz, second)).strip() != "active":
                await asyncio.sleep(0.1)
        assert "sidecar_commands_total" in await asyncio.to_thread(readyz, second, "/metrics")
        assert second.stop() == 0


async def test_a_lost_lead_is_taken_again(world: World) -> None:
    """Every session of the control plane is cut; it comes back by itself and goes on."""
    await kit.seed(world.database, "acme", {"a": "C"})
    with kit.control(world.config) as process:
        await world.database.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert (await world.carry_out("shred", ACME))["status"] == "inaccessible"
        assert process.process.poll() is None
        assert Counter(r["status"] for r in await world.published(2)) == {"accepted": 1, "inaccessible": 1}


async def test_a_command_sent_before_the_first_start_is_carried_out(world: World) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    Admin(world.settings).create(world.settings.control.topic, 2, {})
    command_id, value = kit.command(world.settings, "rotate", ACME)
    kit.send(world.settings, value)
    with kit.control(world.config) as process:
        assert (await world.final(command_id))["status"] == "done"
        assert process.stop() == 0
    log = process.log.read_text()
    assert "allow_unsigned" in log
    assert all(line.startswith(("{", "ready ")) for line in log.splitlines()), log


async def test_a_holder_of_the_guard_that_does_not_let_go_is_fenced(world: World, unique: Callable[[str], str]) -> None:
    """As of a process that was stopped between its store transaction and its Kafka commit."""
    await kit.seed(world.database, "acme", {"a": "C"})
    view = unique("view")
    await world.add_view(view, 1)
    holder = await connect(world.settings.postgres.for_role("data"))
    await holder.execute("SELECT pg_advisory_lock_shared(1, $1)", guard_stripe("acme"))
    bystander = await connect(world.settings.postgres.for_role("data"))
    add = """INSERT INTO instances (instance_id, transactional_id, guard_pid, guard_started, state, heartbeat_at)
             SELECT $1, $2, pid, backend_start, $3, now() FROM pg_stat_activity WHERE pid = pg_backend_pid()"""
    stuck_id = unique("stuck")
    await holder.execute(add, "stuck", stuck_id, "running")
    await bystander.execute(add, "healthy", unique("healthy"), "running")
    await bystander.execute(add, "retired", unique("retired"), "stopped")
    await world.database.execute("INSERT INTO instances VALUES ('dead', $1, 1, now(), 'running', now())", unique("dead"))
    late = Producer(client_config(world.settings, **{"transactional.id": stuck_id}))
    late.init_transactions(10)
    late.begin_transaction()
    late.produce(view, b"payload", partition=0)
    late.flush(10)
    with kit.control(world.config):
        receipt = await world.carry_out("shred", ACME)
    assert receipt["status"] == "inaccessible"
    outcome = {i["instance_id"]: i["outcome"] for i in receipt["instances"]}
    assert outcome == {"stuck": "fenced", "dead": "fenced", "healthy": "released", "retired": "stopped"}
    with pytest.raises(KafkaException):
        late.commit_transaction(10)
    states = {r["instance_id"]: r["state"] for r in await world.database.fetch("SELECT instance_id, state FROM instances")}
    assert states == {"stuck": "fenced", "dead": "fenced", "healthy": "running", "retired": "stopped"}
    # what the late one wrote stands below the barrier, aborted: nothing with a payload is beyond
    assert receipt["barrier"][view]["0"] >= 2
    assert [m.value() for m in kit.read_topic(world.settings, view) if m.value() == b"payload"] == []
    assert holder.is_closed() or not await _answers(holder)
    assert await _answers(bystander)
    await bystander.close()
    holder.terminate()


async def _answers(connection: Connection) -> bool:
    try:
        return await connection.fetchval("SELECT 1") == 1
    except Exception:
        return False


@pytest.mark.parametrize("why", ["waits", "has many chunks"])
async def test_a_tenant_whose_command_takes_long_does_not_hold_up_another(world: World, why: str) -> None:
    """More stuck tenants than there are slots, and one that is not."""

    class Stuck:
        async def step(self, job: commands.Job, command: Any) -> commands.Job:
            if job.tenant.startswith("stuck") and why == "waits":
                raise BrokerUnavailable
            if job.tenant.startswith("stuck"):
                await asyncio.sleep(0.01)
                return replace(job, step="a chunk")
            async with pool.acquire() as held:
                await commands.advance(held, job, FINISHED, finished=True)
            return replace(job, step=FINISHED)

    pool = await open_pool(world.settings.postgres.for_role("control"), max_size=8)
    inbox = Inbox(world.settings, pool, SystemClock(), lambda: None)
    for number, tenant in enumerate([*(f"stuck{i}" for i in range(8)), "free"]):
        await kit.seed(world.database, tenant, {})
        _, value = kit.command(world.settings, "rotate", Scope.of_tenant(tenant))
        await inbox.receive(ControlRecord(value=value, source=f"c/0/{number}"))
    executor = Executor(pool, {"rotate": Stuck()}, lambda: None, Foreground())
    running = asyncio.create_task(executor.run())
    async with asyncio.timeout(120):
        while await world.database.fetchval("SELECT count(*) FROM commands WHERE finished_at IS NOT NULL") < 1:
            await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()
    assert await world.database.fetchval("SELECT tenant_id FROM commands WHERE finished_at IS NOT NULL") == "free"


@pytest.mark.parametrize("part", ["executor", "outbox"])
async def test_what_is_woken_and_cancelled_at_once_ends(world: World, part: str) -> None:
    """Else a control plane that loses its lead, or is stopped, would wait for it for ever."""
    pool = await open_pool(world.settings.postgres.for_role("control"), max_size=2)
    works: Any = Executor(pool, {}, lambda: None, Foreground()) if part == "executor" else Outbox(pool, ReceiptPublisher(world.settings))
    running = asyncio.create_task(works.run())
    while not works.wake._waiters:
        await asyncio.sleep(0.01)
    works.wake.set()
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=120)
    await pool.close()
    assert done
    assert running.cancelled()


async def test_a_timer_with_a_defect_ends_nothing() -> None:
    """The process that carries out shreds goes on, and the timer is tried again."""
    turns = asyncio.Queue[int]()

    async def act() -> None:
        turns.put_nowait(1)
        raise ZeroDivisionError

    running = asyncio.create_task(ControlPlane._again("a test", 0.01, act))
    async with asyncio.timeout(120):
        for _ in range(3):
            await turns.get()
    assert not running.done()
    running.cancel()


# audit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE audit_log SET details = jsonb_set(details, '{op}', '\"hold\"') WHERE seq = 2", "row 2 was changed"),
        ("UPDATE audit_log SET actor = 'somebody else' WHERE seq = 1", "row 1 was changed"),
        ("DELETE FROM audit_log WHERE seq = 2", "row 2 is missing"),
        ("DELETE FROM audit_log WHERE seq = 1", "row 1 is missing"),
        ("UPDATE audit_log SET seq = 100 WHERE seq = 2", "row 2 is missing"),
    ],
)
async def test_the_audit_chain_goes_red(world: World, damage: str, said: str) -> None:
    await kit.seed(world.database, "acme", {"a": "C"})
    pool = await open_pool(world.settings.postgres.for_role("control"))
    inbox = Inbox(world.settings, pool, SystemClock(), lambda: None)
    for number in range(3):
        _, value = kit.command(world.settings, "rotate", ACME, command_id=str(uuid4()))
        await inbox.receive(ControlRecord(value=value, source=f"c/0/{number}"))
    await pool.close()
    assert [problem async for _, _, problem in audit.verify(world.database)] == [None]
    await world.database.execute(damage)
    assert [said in str(problem) async for _, _, problem in audit.verify(world.database)] == [True]
