"""Promise: a control plane that is killed at any step of a shred, a rotation, a hold or a release goes on where it was.

One receipt of each status on the topic, no command lost, a shredded tenant never active again, the audit chain whole.
"""

# ruff: noqa: ASYNC110 (what is waited for happens in another process)

import asyncio
import json
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.admin import Admin
from sidecar.kafka.receipts import Outgoing, ReceiptPublisher
from sidecar.outbox import Outbox
from sidecar.postgres import audit, commands, holds, migrations
from sidecar.postgres.connection import Connection, connected, open_pool
from sidecar.settings import Settings, load
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack

KILLED = -9
ACME = Scope.of_tenant("acme")


@dataclass(kw_only=True)
class Stage:
    """A tenant `acme` of 20 streams and 30 plain events, a view topic of two partitions, and nothing that runs."""

    config: Path
    settings: Settings
    db: Connection
    dsn: str
    view: str

    async def killed_at(self, step: str, value: bytes, broken: str = "") -> None:
        """A control plane gets the command, and dies at that step."""
        process = kit.start_control(self.config, failpoint=step, broken=broken)
        try:
            process.wait_ready()
            kit.send(self.settings, value, key="acme")
            assert await asyncio.to_thread(process.wait_dead) == KILLED
        finally:
            process.kill()

    async def finished(self, command_id: UUID) -> list[dict[str, Any]]:
        """The receipts of the command on the topic, once the next control plane is done with it and its last one is published."""
        unfinished = """SELECT EXISTS (SELECT FROM commands WHERE finished_at IS NULL) OR NOT EXISTS (SELECT FROM commands WHERE command_id = $1)
                          OR EXISTS (SELECT FROM receipts WHERE published_at IS NULL)"""
        with kit.control(self.config):
            async with asyncio.timeout(120):
                while await self.db.fetchval(unfinished, command_id):
                    await asyncio.sleep(0.05)
        return [receipt for receipt in kit.published(self.settings) if receipt["command_id"] == str(command_id)]

    async def trail_is_whole(self, like: str) -> None:
        """The act itself is in the trail once, however often its later steps were repeated."""
        assert await self.db.fetchval("SELECT count(*) FROM audit_log WHERE action LIKE $1", like) == 1
        assert [problem async for _, _, problem in audit.verify(self.db)] == [None]


@pytest.fixture
async def stage(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> AsyncIterator[Stage]:
    config = kit.write_config(tmp_path, kit.document(unique("k"), local_stack.bootstrap_servers, database))
    settings, view = load(config), unique("view")
    async with connected(database) as db:
        await migrations.migrate(db)
        await kit.seed(db, "acme", {f"s{i}": "C" for i in range(20)})
        await kit.add_events(db, "acme", "s0", 5)
        await kit.add_events(db, "acme", "cart", 30, plain=True)
        Admin(settings).create(view, 2, {})
        await db.execute("INSERT INTO views (name, topic, partitions, key_mode, definition) VALUES ($1, $1, 2, 'event', '{}')", view)
        # an instance that died while it held the guard: the fencing has something to do in every case
        await db.execute("INSERT INTO instances VALUES ('dead', $1, 1, now(), 'running', now())", unique("dead"))
        yield Stage(config=config, settings=settings, db=db, dsn=database, view=view)


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
async def test_shred_killed_at(stage: Stage, step: str, include_plain: bool) -> None:
    settings, db = stage.settings, stage.db
    command_id, value = kit.command(settings, "shred", ACME, options={"include_plain": include_plain})
    await stage.killed_at(step, value)
    receipts = await stage.finished(command_id)
    assert await db.fetchval("SELECT state FROM tenants") == "shredded", "the state that was reached is never given up"
    assert Counter(r["status"] for r in receipts) == {"accepted": 1, "inaccessible": 1}
    assert [r["status"] for r in receipts] == ["accepted", "inaccessible"]
    final = receipts[1]
    assert final["keys"]["count"] == 1
    assert final["instances"] == [{"instance_id": "dead", "outcome": "fenced"}]
    assert final["events"]["unreadable"] == 5
    assert final["events"]["plain_remaining"] == (0 if include_plain else 30)
    assert await db.fetchval("SELECT count(*) FROM tenant_keys WHERE wrapped IS NOT NULL") == 0
    await stage.trail_is_whole("tenant.shred")
    notices = [m for m in kit.read_topic(settings, stage.view) if m.value()]
    assert {m.partition() for m in notices} == {0, 1}
    assert len({dict(m.headers())["ce_id"] for m in notices}) == 2  # one that was repeated has the same id
    if include_plain:
        gone = {m.key().decode() for m in kit.read_topic(settings, stage.view) if m.value() is None}
        plain = {f"acme/cart/{n}" for n in range(1, 31)}
        assert (
            plain <= gone <= plain | {f"acme/s0/{n}" for n in range(1, 6)}
        )  # those of the encrypted events are the residue's, and come in their time


@pytest.mark.parametrize("step", ROTATE_STEPS)
async def test_rotation_killed_at(stage: Stage, step: str) -> None:
    settings, db = stage.settings, stage.db
    command_id, value = kit.command(settings, "rotate", ACME)
    await stage.killed_at(step, value)
    receipts = await stage.finished(command_id)
    assert [r["status"] for r in receipts] == ["accepted", "done"]
    assert receipts[1]["keys"]["count"] == 20
    assert await db.fetchval("SELECT count(*) FROM encryption_keys WHERE is_active") == 0
    assert await db.fetchval("SELECT epoch FROM tenants") == 2
    await stage.trail_is_whole("keys.rotate")


@pytest.mark.parametrize("step", ["shred:closed", "shred:emptied"])
async def test_shred_of_a_class_of_many_keys_killed_at(stage: Stage, step: str) -> None:
    """Its keys go outside of the guard, behind its fence."""
    settings, db = stage.settings, stage.db
    await kit.seed(db, "acme", {"other": "D"})
    scope = Scope(tenant="acme", kind=ScopeKind.CLASS, id="C")
    command_id, value = kit.command(settings, "shred", scope)
    many = "import sidecar.shredding\nsidecar.shredding.MANY_KEYS = 5\n"
    live = "SELECT count(*) FROM encryption_keys WHERE key_material IS NOT NULL"
    await stage.killed_at(step, value, broken=many)
    assert await db.fetchval(live) == (21 if step == "shred:closed" else 1)
    assert await db.fetchval("SELECT count(*) FROM erased_scopes WHERE readmitted_at IS NULL") == 1
    assert await db.fetchval("SELECT count(*) FROM receipts WHERE status = 'inaccessible'") == 0
    receipts = await stage.finished(command_id)
    assert [r["status"] for r in receipts] == ["accepted", "inaccessible"]
    assert (receipts[1]["keys"]["count"], receipts[1]["instances"][0]["outcome"]) == (20, "fenced")
    assert await db.fetchval(live) == 1
    assert await db.fetchval("SELECT cardinality(fingerprints) FROM erased_scopes") == 20
    assert await db.fetchval("SELECT epoch FROM tenants") == 3
    acts = await db.fetch("SELECT action FROM audit_log WHERE action LIKE 'class.%' ORDER BY seq")
    assert [row["action"] for row in acts] == ["class.close", "class.destroy", "class.shred"]


HOLD_STEPS = ["received", "accepted", "placed", "published:done"]


@pytest.mark.parametrize(("op", "step"), [(op, s) for op in ("hold", "release") for s in HOLD_STEPS])
async def test_hold_and_release_killed_at(stage: Stage, op: str, step: str) -> None:
    settings, db = stage.settings, stage.db
    if op == "release":
        await holds.place(db, ACME, hold_id=uuid4(), reason="Case 7/26", by="test", at=datetime.now(UTC))
    command_id, value = kit.command(settings, op, ACME)
    name = {"accepted": f"{op}:accepted", "placed": "hold:placed" if op == "hold" else "release:released"}.get(step, step)
    await stage.killed_at(name, value)
    receipts = await stage.finished(command_id)
    assert [r["status"] for r in receipts] == ["accepted", "done"]
    (held,) = await holds.listed(db, released=True)
    assert receipts[1]["holds"] == [str(held.hold_id)]
    assert (held.released_at is None) is (op == "hold")
    assert len(await holds.overlapping(db, ACME)) == (op == "hold")
    # once in the trail and once on the ledger, which has it before the receipt
    await stage.trail_is_whole("hold.%")
    assert len({m.key() for m in kit.read_topic(settings, settings.control.ledger)}) == 1


async def test_no_command_is_lost_over_many_kills(stage: Stage) -> None:
    """Commands of many tenants under way, and one kill after the other."""
    settings, db = stage.settings, stage.db
    Admin(settings).create(settings.control.topic, 4, {})
    ids = []
    for number, step in enumerate(("received", "shred:fenced", "rotate:marked", "shred:inaccessible", "shred:noticed")):
        for tenant in (f"t{number}a", f"t{number}b", f"t{number}c"):
            await kit.seed(db, tenant, {"a": "C"})
            for op in ("rotate", "shred"):
                command_id, value = kit.command(settings, op, Scope.of_tenant(tenant))
                ids.append(str(command_id))
                kit.send(settings, value, key=tenant)
        process = kit.start_control(stage.config, failpoint=step)
        try:
            await asyncio.to_thread(process.wait_dead, 15)
        except subprocess.TimeoutExpired:
            pass  # a rotation may be refused because its tenant's shred came first; then it is killed at any other moment
        finally:
            process.kill()
    with kit.control(stage.config):
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


async def test_control_without_looking_on_the_topic_a_receipt_stands_there_twice(stage: Stage) -> None:
    """The checker can go red: the same crash with an outbox that does not look first."""
    settings, db = stage.settings, stage.db

    class Blind(ReceiptPublisher):
        def already_published(self, since: Any) -> set[UUID]:
            return set()

    command_id, value = kit.command(settings, "rotate", ACME)
    await stage.killed_at("published:accepted", value)
    pool = await open_pool(stage.dsn)
    outbox = asyncio.create_task(Outbox(pool, Blind(settings)).run())
    async with asyncio.timeout(120):
        while await commands.unpublished(db):
            await asyncio.sleep(0.05)
    outbox.cancel()
    await asyncio.gather(outbox, return_exceptions=True)
    await pool.close()
    statuses = Counter(r["status"] for r in kit.published(settings) if r["command_id"] == str(command_id))
    assert statuses["accepted"] == 2


async def test_receipts_of_a_predecessor_that_still_lives_are_void(stage: Stage) -> None:
    """A process that was cut off and comes back cannot publish behind its successor's back."""
    settings = stage.settings
    Admin(settings).create(settings.control.receipts, 1, {})
    old, new = ReceiptPublisher(settings), ReceiptPublisher(settings)
    item = Outgoing(outbox_id=UUID(int=1), key=b"k", value=json.dumps({"n": 1}).encode())
    old.open()
    new.open()
    with pytest.raises(Exception, match="Kafka"):
        old.publish([item])
    new.publish([item])
    assert len(kit.read_topic(settings, settings.control.receipts)) == 1
