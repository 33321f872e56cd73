"""Promise: a control plane that is killed at any step of a shred, a rotation, a hold or a release goes on where it was.

One receipt of each status on the topic, no command lost, a shredded tenant never active again, the audit chain whole.
"""

# ruff: noqa: ASYNC110 (what is waited for happens in another process)

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar.control import Outbox
from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.admin import Admin
from sidecar.kafka.receipts import Outgoing, ReceiptPublisher
from sidecar.postgres import audit, commands, holds, migrations
from sidecar.postgres.connection import Connection, connect, open_pool
from sidecar.settings import Settings, load
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack

KILLED = -9
ACME = Scope.of_tenant("acme")


async def prepare(stack: LocalStack, dsn: str, folder: Path, unique: Callable[[str], str]) -> tuple[Path, Settings, Connection, str]:
    """-> configuration, settings, database, a view topic of two partitions. The tenant has 20 streams and 30 plain events."""
    config = kit.write_config(folder, kit.document(unique("k"), stack.bootstrap_servers, dsn))
    settings = load(config)
    database = await connect(dsn)
    await migrations.migrate(database)
    await kit.seed(database, "acme", {f"s{i}": "C" for i in range(20)})
    await kit.add_events(database, "acme", "s0", 5)
    await kit.add_events(database, "acme", "cart", 30, plain=True)
    view = unique("view")
    Admin(settings).create(view, 2, {})
    await database.execute("INSERT INTO views (name, topic, partitions, key_mode, definition) VALUES ($1, $1, 2, 'event', '{}')", view)
    # an instance that died while it held the guard: the fencing has something to do in every case
    await database.execute("INSERT INTO instances VALUES ('dead', $1, 1, now(), 'running', now())", unique("dead"))
    return config, settings, database, view


async def finished(database: Connection, command_id: UUID, settings: Settings) -> list[dict[str, Any]]:
    """The receipts of the command on the topic, once it is done and its last one is published."""
    unfinished = """SELECT EXISTS (SELECT FROM commands WHERE finished_at IS NULL) OR NOT EXISTS (SELECT FROM commands WHERE command_id = $1)
                      OR EXISTS (SELECT FROM receipts WHERE published_at IS NULL)"""
    async with asyncio.timeout(120):
        while await database.fetchval(unfinished, command_id):
            await asyncio.sleep(0.05)
    return [receipt for receipt in kit.published(settings) if receipt["command_id"] == str(command_id)]


SHRED_STEPS = [
    "receive",  # nothing is written yet
    "received",  # in the inbox, not acked: Kafka delivers it again
    "published:accepted",  # on the topic, not yet marked as published
    "shred:accepted",
    "shred:fenced",
    "shred:released",  # instances fenced, no barrier yet
    "shred:barred",
    "shred:in ledger",  # the entry is on its topic, the receipt is not written
    "shred:inaccessible",  # the receipt is written
    "shred:noticed",  # the notices are in Kafka, that is not recorded
    "published:inaccessible",
]
PLAIN_STEPS = ["shred:noticed", "shred:clearing", "shred:cleared"]
ROTATE_STEPS = ["receive", "received", "published:accepted", "rotate:accepted", "rotate:marked", "published:done"]


@pytest.mark.parametrize(("step", "include_plain"), [(s, False) for s in SHRED_STEPS] + [(s, True) for s in PLAIN_STEPS])
async def test_shred_killed_at(
    step: str, include_plain: bool, local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config, settings, db, view = await prepare(local_stack, database, tmp_path, unique)
    command_id, value = kit.command(settings, "shred", ACME, options={"include_plain": include_plain})
    first = kit.start_control(config, failpoint=step)
    try:
        first.wait_ready()
        kit.send(settings, value, key="acme")
        assert await asyncio.to_thread(first.wait_dead) == KILLED
    finally:
        first.kill()
    with kit.control(config):
        receipts = await finished(db, command_id, settings)
        # the state that was reached is never given up
        assert await db.fetchval("SELECT state FROM tenants") == "shredded"
    assert Counter(r["status"] for r in receipts) == {"accepted": 1, "inaccessible": 1}
    assert [r["status"] for r in receipts] == ["accepted", "inaccessible"]
    final = receipts[1]
    assert final["keys"]["count"] == 1
    assert final["instances"] == [{"instance_id": "dead", "outcome": "fenced"}]
    assert final["events"]["unreadable"] == 5
    assert final["events"]["plain_remaining"] == (0 if include_plain else 30)
    assert await db.fetchval("SELECT count(*) FROM tenant_keys WHERE wrapped IS NOT NULL") == 0
    # the act itself is in the trail once, however often its later steps were repeated
    assert await db.fetchval("SELECT count(*) FROM audit_log WHERE action = 'tenant.shred'") == 1
    assert [problem async for _, _, problem in audit.verify(db)] == [None]
    notices = [m for m in kit.read_topic(settings, view) if m.value()]
    assert {m.partition() for m in notices} == {0, 1}
    assert len({dict(m.headers())["ce_id"] for m in notices}) == 2  # one that was repeated has the same id
    if include_plain:
        gone = {m.key().decode() for m in kit.read_topic(settings, view) if m.value() is None}
        plain = {f"acme/cart/{n}" for n in range(1, 31)}
        assert (
            plain <= gone <= plain | {f"acme/s0/{n}" for n in range(1, 6)}
        )  # those of the encrypted events are the residue's, and come in their time
    await db.close()


@pytest.mark.parametrize("step", ROTATE_STEPS)
async def test_rotation_killed_at(step: str, local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> None:
    config, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)
    command_id, value = kit.command(settings, "rotate", ACME)
    first = kit.start_control(config, failpoint=step)
    try:
        first.wait_ready()
        kit.send(settings, value, key="acme")
        assert await asyncio.to_thread(first.wait_dead) == KILLED
    finally:
        first.kill()
    with kit.control(config):
        receipts = await finished(db, command_id, settings)
    assert [r["status"] for r in receipts] == ["accepted", "done"]
    assert receipts[1]["keys"]["count"] == 20
    assert await db.fetchval("SELECT count(*) FROM encryption_keys WHERE is_active") == 0
    assert await db.fetchval("SELECT epoch FROM tenants") == 2
    assert await db.fetchval("SELECT count(*) FROM audit_log WHERE action = 'keys.rotate'") == 1
    assert [problem async for _, _, problem in audit.verify(db)] == [None]
    await db.close()


@pytest.mark.parametrize("step", ["shred:closed", "shred:emptied"])
async def test_shred_of_a_class_of_many_keys_killed_at(
    step: str, local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    """Its keys go outside of the guard, behind its fence."""
    config, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)
    await kit.seed(db, "acme", {"other": "D"})
    scope = Scope(tenant="acme", kind=ScopeKind.CLASS, id="C")
    command_id, value = kit.command(settings, "shred", scope)
    many = "import sidecar.shredding\nsidecar.shredding.MANY_KEYS = 5\n"
    first = kit.start_control(config, failpoint=step, broken=many)
    live = "SELECT count(*) FROM encryption_keys WHERE key_material IS NOT NULL"
    try:
        first.wait_ready()
        kit.send(settings, value, key="acme")
        assert await asyncio.to_thread(first.wait_dead) == KILLED
        assert await db.fetchval(live) == (21 if step == "shred:closed" else 1)
        assert await db.fetchval("SELECT count(*) FROM erased_scopes WHERE readmitted_at IS NULL") == 1
        assert await db.fetchval("SELECT count(*) FROM receipts WHERE status = 'inaccessible'") == 0
    finally:
        first.kill()
    with kit.control(config):
        receipts = await finished(db, command_id, settings)
    assert [r["status"] for r in receipts] == ["accepted", "inaccessible"]
    assert (receipts[1]["keys"]["count"], receipts[1]["instances"][0]["outcome"]) == (20, "fenced")
    assert await db.fetchval(live) == 1
    assert await db.fetchval("SELECT cardinality(fingerprints) FROM erased_scopes") == 20
    assert await db.fetchval("SELECT epoch FROM tenants") == 3
    acts = await db.fetch("SELECT action FROM audit_log WHERE action LIKE 'class.%' ORDER BY seq")
    assert [row["action"] for row in acts] == ["class.close", "class.destroy", "class.shred"]
    await db.close()


HOLD_STEPS = ["received", "accepted", "placed", "published:done"]


@pytest.mark.parametrize(("op", "step"), [(op, s) for op in ("hold", "release") for s in HOLD_STEPS])
async def test_hold_and_release_killed_at(
    op: str, step: str, local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    config, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)
    if op == "release":
        await holds.place(db, ACME, hold_id=uuid4(), reason="Case 7/26", by="test", at=datetime.now(UTC))
    command_id, value = kit.command(settings, op, ACME)
    name = {"accepted": f"{op}:accepted", "placed": "hold:placed" if op == "hold" else "release:released"}.get(step, step)
    first = kit.start_control(config, failpoint=name)
    try:
        first.wait_ready()
        kit.send(settings, value, key="acme")
        assert await asyncio.to_thread(first.wait_dead) == KILLED
    finally:
        first.kill()
    with kit.control(config):
        receipts = await finished(db, command_id, settings)
    assert [r["status"] for r in receipts] == ["accepted", "done"]
    (held,) = await holds.listed(db, released=True)
    assert receipts[1]["holds"] == [str(held.hold_id)]
    assert (held.released_at is None) is (op == "hold")
    assert len(await holds.overlapping(db, ACME)) == (op == "hold")
    # once in the trail and once on the ledger, which has it before the receipt
    assert await db.fetchval("SELECT count(*) FROM audit_log WHERE action LIKE 'hold.%'") == 1
    assert len({m.key() for m in kit.read_topic(settings, settings.control.ledger)}) == 1
    assert [problem async for _, _, problem in audit.verify(db)] == [None]
    await db.close()


async def test_no_command_is_lost_over_many_kills(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> None:
    """Commands of many tenants under way, and one kill after the other."""
    config, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)
    Admin(settings).create(settings.control.topic, 4, {})
    ids = []
    for number, step in enumerate(("received", "shred:fenced", "rotate:marked", "shred:inaccessible", "shred:noticed")):
        for tenant in (f"t{number}a", f"t{number}b", f"t{number}c"):
            await kit.seed(db, tenant, {"a": "C"})
            for op in ("rotate", "shred"):
                command_id, value = kit.command(settings, op, Scope.of_tenant(tenant))
                ids.append(str(command_id))
                kit.send(settings, value, key=tenant)
        process = kit.start_control(config, failpoint=step)
        try:
            await asyncio.to_thread(process.wait_dead, 15)
        except subprocess.TimeoutExpired:
            pass  # a rotation may be refused because its tenant's shred came first; then it is killed at any other moment
        finally:
            process.kill()
    with kit.control(config):
        async with asyncio.timeout(120):
            while await db.fetchval("SELECT count(*) FROM commands WHERE finished_at IS NOT NULL") < len(ids):
                await asyncio.sleep(0.1)
            while await db.fetchval("SELECT EXISTS (SELECT FROM receipts WHERE published_at IS NULL)"):
                await asyncio.sleep(0.1)
    seen = Counter((r["command_id"], r["status"]) for r in kit.published(settings))
    assert set(seen.values()) == {1}
    for command_id in ids:
        statuses = {status for identity, status in seen if identity == command_id}
        # a rotation that came after its tenant's shred was begun is refused, with a receipt
        assert statuses in ({"accepted", "done"}, {"accepted", "inaccessible"}, {"accepted", "rejected"}), statuses
    assert {r["state"] for r in await db.fetch("SELECT state FROM tenants WHERE tenant_id LIKE 't%'")} == {"shredded"}
    assert [problem async for _, _, problem in audit.verify(db)] == [None]
    await db.close()


async def test_control_without_looking_on_the_topic_a_receipt_stands_there_twice(
    local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    """The checker can go red: the same crash with an outbox that does not look first."""
    config, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)

    class Blind(ReceiptPublisher):
        def already_published(self, since: Any) -> set[UUID]:
            return set()

    command_id, value = kit.command(settings, "rotate", ACME)
    process = kit.start_control(config, failpoint="published:accepted")
    try:
        process.wait_ready()
        kit.send(settings, value, key="acme")
        assert await asyncio.to_thread(process.wait_dead) == KILLED
    finally:
        process.kill()
    pool = await open_pool(database)
    outbox = asyncio.create_task(Outbox(pool, Blind(settings)).run())
    async with asyncio.timeout(120):
        while await commands.unpublished(db):
            await asyncio.sleep(0.05)
    outbox.cancel()
    await asyncio.gather(outbox, return_exceptions=True)
    await pool.close()
    statuses = Counter(r["status"] for r in kit.published(settings) if r["command_id"] == str(command_id))
    assert statuses["accepted"] == 2
    await db.close()


async def test_receipts_of_a_predecessor_that_still_lives_are_void(
    local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]
) -> None:
    """A process that was cut off and comes back cannot publish behind its successor's back."""
    _, settings, db, _ = await prepare(local_stack, database, tmp_path, unique)
    Admin(settings).create(settings.control.receipts, 1, {})
    old, new = ReceiptPublisher(settings), ReceiptPublisher(settings)
    item = Outgoing(outbox_id=UUID(int=1), key=b"k", value=json.dumps({"n": 1}).encode())
    old.open()
    new.open()
    with pytest.raises(Exception, match="Kafka"):
        old.publish([item])
    new.publish([item])
    assert len(kit.read_topic(settings, settings.control.receipts)) == 1
    await db.close()
