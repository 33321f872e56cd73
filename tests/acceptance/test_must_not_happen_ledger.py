"""What must not happen: 2 (a key resurrected by a rotation that races a shred), 4 (by a restored backup), 5 (by readmitting the tenant).

Each checker is seen red on a variant that is broken on purpose.
"""

import asyncio
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.command import stored
from sidecar.core.errors import CommandRejected, LedgerBehind
from sidecar.core.model import Scope, ScopeKind
from sidecar.event_store import EventStore
from sidecar.inbox import ControlRecord, Inbox
from sidecar.kafka.admin import Admin
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.receipts import ViewWriter
from sidecar.keys import KeyManagement
from sidecar.kms import open_kms
from sidecar.ledger import Ledger, LedgerGate
from sidecar.notices import Notices
from sidecar.pipeline import Pipeline
from sidecar.postgres import fresh, readmissions, scopes
from sidecar.postgres.commands import Job
from sidecar.postgres.connection import Connection, open_pool, transaction
from sidecar.readmission import Readmission
from sidecar.residue import Residue
from sidecar.rotation import Rotation
from sidecar.sealing import Sealing
from sidecar.shredding import Shredding
from sidecar.signing import control_signer
from sidecar.steps import FINISHED, Steps, SystemClock
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack, start_postgres, stop_postgres
from tests.acceptance.world import World, again_and_again, build, in_process, until

ACME = Scope.of_tenant("acme")


# 2


class Race:
    """Commands that are taken through their steps by hand, in any order: no executor keeps a tenant's commands apart."""

    def __init__(self, world: World, pool: Any) -> None:
        self._settings, clock = world.settings, SystemClock()
        admin = Admin(world.settings)
        ledger = Ledger(pool, LedgerTopic(world.settings, admin), control_signer(world.settings), world.name)
        steps = Steps(pool, admin, clock, ledger)
        notices = Notices(pool, admin, ViewWriter(world.settings))
        self.sealing = Sealing(pool, clock, open_kms(world.settings.kms.uri), world.settings.kms)
        shredding = Shredding(world.settings, steps, notices, Residue(world.settings, steps, notices, lambda: self.sealing))
        self.flows: dict[str, Any] = {"shred": shredding, "rotate": Rotation(steps)}
        self._pool, self._inbox = pool, Inbox(world.settings, pool, clock, lambda: None)

    async def accepted(self, op: str, scope: Scope) -> "Walk":
        command_id, raw = kit.command(self._settings, op, scope)
        await self._inbox.receive(ControlRecord(value=raw, source=f"test/0/{command_id.int % 10**9}"))
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow("SELECT * FROM commands WHERE command_id = $1", command_id)
        assert row["status"] == "accepted"
        names = ("command_id", "op", "payload", "step", "received_at")
        job = Job(**{name: row[name] for name in names}, tenant=row["tenant_id"], facts=row["result"] or {})
        return Walk(self.flows[op], job, stored(raw))


class Walk:
    def __init__(self, flow: Any, job: Job, command: Any) -> None:
        self._flow, self._job, self._command = flow, job, command
        self.rejected: str | None = None

    @property
    def at_end(self) -> bool:
        return self._job.step == FINISHED or self.rejected is not None

    async def step(self) -> None:
        try:
            self._job = await self._flow.step(self._job, self._command)
        except CommandRejected as error:
            self.rejected = error.code

    async def to_the_end(self) -> None:
        while not self.at_end:
            await self.step()


@asynccontextmanager
async def race(world: World) -> AsyncIterator[Race]:
    pool = await open_pool(world.dsn, max_size=8)
    try:
        yield Race(world, pool)
    finally:
        await pool.close()


async def in_order(shred: Walk, rotate: Walk, turns: str) -> None:
    """`s` a step of the shred, `r` one of the rotation; then both to their ends."""
    for turn in turns:
        walk = shred if turn == "s" else rotate
        if not walk.at_end:
            await walk.step()
    await rotate.to_the_end()
    await shred.to_the_end()


async def at_once(shred: Walk, rotate: Walk, _turns: str) -> None:
    await asyncio.gather(shred.to_the_end(), rotate.to_the_end())


def live_keys(world: World, scope: Scope) -> list[str]:
    """The checker: keys of the scope that can still be had, and events that open."""
    if scope.kind is ScopeKind.TENANT:
        rows = world.sql("SELECT 'kek/' || generation AS name FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL", scope.tenant)
    else:
        rows = world.sql(
            """SELECT scope_id || '/' || key_version AS name FROM encryption_keys k WHERE tenant_id = $1 AND key_material IS NOT NULL AND (scope_id = $2
                 OR scope_id IN (SELECT stream_id FROM streams WHERE tenant_id = $1 AND stream_type_class = $2))""",
            scope.tenant,
            scope.id,
        )
    opened = [
        row
        for row in world.events(scope.tenant, stream=scope.id if scope.kind is ScopeKind.STREAM else None)
        if row["status"] != "erased" and not row["stream_id"].startswith("chacha")
    ]
    return [row["name"] for row in rows] + [f"{row['stream_id']}/{row['position']} reads {row['status']}" for row in opened]


def traffic(world: World, tenants: list[str]) -> AbstractContextManager[None]:
    """Events of the stream that is shredded, of each tenant."""

    def publish(n: int) -> None:
        for tenant in tenants:
            world.event(world.topic("in"), b"%d" % n, tenant=tenant, stream="aes-1")

    return again_and_again(publish, 0.02)


ORDERS = ["", "r", "s", "sr", "rs", "srr", "rsr", "ss", "ssr", "sss", "sssr", "rss", "rrs"]
"""Every place of the rotation's two steps among the shred's: mark, receipt; fence, barrier, receipt, notice."""


def of_kind(kind: ScopeKind, tenant: str) -> Scope:
    return Scope(tenant=tenant, kind=kind, id={"tenant": tenant, "stream": "aes-1", "class": "Aes"}[kind.value])


@pytest.mark.parametrize("kind", [ScopeKind.TENANT, ScopeKind.STREAM, ScopeKind.CLASS], ids=lambda k: k.value)
async def test_02_a_rotation_that_races_a_shred_resurrects_no_key(world: World, kind: ScopeKind) -> None:
    tenants = [f"t{n}" for n in range(len(ORDERS) + 3)]
    await asyncio.to_thread(world.run)
    with traffic(world, tenants):
        known = "SELECT count(DISTINCT tenant_id) FROM messages"
        await asyncio.to_thread(until, lambda: world.value(known) == len(tenants), "warm caches")
        async with race(world) as started:
            for tenant, turns in zip(tenants, [*ORDERS, None, None, None], strict=True):
                scope = of_kind(kind, tenant)
                shred, rotate = await started.accepted("shred", scope), await started.accepted("rotate", scope)
                await (at_once if turns is None else in_order)(shred, rotate, turns or "")
                assert shred.rejected is None
        counted = world.value("SELECT count(*) FROM refusals")
        await asyncio.to_thread(until, lambda: world.value("SELECT count(*) FROM refusals") > counted + 2 * len(tenants), "records after it all")
    await asyncio.to_thread(world.settle)
    assert {tenant: found for tenant in tenants if (found := live_keys(world, of_kind(kind, tenant)))} == {}


async def test_02_control_a_shred_of_the_active_version_alone_leaves_the_one_before_the_rotation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the enumeration over all versions."""
    whole = scopes.keys_of
    monkeypatch.setattr(scopes, "keys_of", lambda scope: f"{whole(scope)} AND k.is_active")
    scope = of_kind(ScopeKind.STREAM, "t0")
    await asyncio.to_thread(world.run)
    await asyncio.to_thread(publish, world, b"old", "t0")
    async with race(world) as started:
        await (await started.accepted("rotate", scope)).to_the_end()
        await asyncio.to_thread(publish, world, b"new", "t0")
        await (await started.accepted("shred", scope)).to_the_end()
    assert "aes-1/1" in live_keys(world, scope)


@pytest.mark.parametrize("guarded", [True, False], ids=["", "control: without the guard"])
async def test_02_a_batch_that_is_about_to_store_the_next_version_loses_to_the_shred(
    world: World, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """It stands inside its transaction, behind guard and checks, with the key that the rotation called for; then the stream is shredded."""
    there, go_on = threading.Event(), threading.Event()
    insert = fresh.insert

    async def stands(connection: Connection, made: Any, *more: Any) -> None:
        if any(row.name.version == 2 for row in made.deks) and not there.is_set():
            there.set()
            await asyncio.to_thread(go_on.wait, 120)
        await insert(connection, made, *more)

    monkeypatch.setattr(fresh, "insert", stands)
    if not guarded:

        @asynccontextmanager
        async def unguarded(self: Steps, tenant: str) -> AsyncIterator[Connection]:
            async with transaction(self.pool) as connection:
                yield connection

        monkeypatch.setattr(Steps, "under_guard", unguarded)
    scope = of_kind(ScopeKind.STREAM, "t0")

    def act() -> None:
        async def command(op: str) -> None:
            async with race(world) as started:
                await (await started.accepted(op, scope)).to_the_end()

        with in_process(world, Pipeline):
            publish(world, b"old", "t0")
            asyncio.run(command("rotate"))
            world.event(world.topic("in"), b"new", tenant="t0", stream="aes-1")
            world.flush()
            assert there.wait(120)
            asyncio.run(command("shred"))
            go_on.set()
            world.settle()

    await asyncio.to_thread(act)
    found = await asyncio.to_thread(live_keys, world, scope)
    assert (found == []) is guarded, found


def publish(world: World, value: bytes, *tenants: str, stream: str = "aes-1") -> None:
    for tenant in tenants:
        world.event(world.topic("in"), value, tenant=tenant, stream=stream)
    world.settle()


# 4


def copy(source: Path, target: Path) -> None:
    """With owners and modes, as a backup of the data directory is."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


def read_from(world: World, tenant: str, gate: Callable[[World], Any]) -> list[Any]:
    """The checker: what of the tenant's events somebody gets who asks the restored database. Nothing where it is refused."""

    async def main() -> list[Any]:
        pool = await open_pool(world.dsn)
        try:
            found = await EventStore(pool, KeyManagement(open_kms(world.settings.kms.uri)), gate(world)).read(tenant)
        except LedgerBehind:
            return []
        finally:
            await pool.close()
        return [held.value for _, held in found if hasattr(held, "value")]

    return asyncio.run(main())


def asks(world: World) -> LedgerGate:
    return LedgerGate(LedgerTopic(world.settings), world.name)


class AsksNobody(LedgerGate):
    """The broken variant."""

    def __init__(self, _world: World) -> None:
        pass

    async def check(self, connection: Connection) -> None:
        pass


def test_04_a_restored_data_directory_serves_nothing_of_a_shred_neither_before_nor_after_the_replay(own_stack: LocalStack, tmp_path: Path) -> None:
    world = build(own_stack, own_stack.dsn, tmp_path / "world", "w")
    data_directory, backup = own_stack.dir / "postgres", own_stack.dir / "backup"
    try:
        control, data = world.control(wait=False), world.run()
        control.wait_ready()
        publish(world, b"old", "acme", "globex")
        publish(world, b"old", "globex", stream="aes-2")
        assert (control.stop(), data.stop()) == (0, 0)
        stop_postgres(own_stack.dir)
        copy(data_directory, backup)
        start_postgres(own_stack.dir)
        control, data = world.control(wait=False), world.run()
        control.wait_ready()
        publish(world, b"mid", "acme", "globex", "newco")
        publish(world, b"mid", "globex", stream="aes-9")
        for scope in (ACME, Scope.of_tenant("newco"), *(Scope(tenant="globex", kind=ScopeKind.STREAM, id=s) for s in ("aes-2", "aes-9"))):
            assert world.carry_out("shred", scope)["status"] == "inaccessible"
        assert (control.stop(), data.stop()) == (0, 0)
        stop_postgres(own_stack.dir)
        copy(backup, data_directory)
        start_postgres(own_stack.dir)
        # the same server, the same timeline: only the ledger tells
        assert read_from(world, "acme", asks) == []
        assert read_from(world, "acme", AsksNobody) == [b"old"]  # the control: what the gate is for
        waits = world.run(wait=False)
        until(lambda: "sidecar ledger replay" in waits.text(), "the data plane to say what it waits for")
        assert world.json("ledger", "replay")["applied"]["shred"] == 4
        for gate in (asks, AsksNobody):
            assert read_from(world, "acme", gate) == []
            assert read_from(world, "globex", gate) == [b"old"]
        waits.wait_ready()
        world.control(wait=False)
        publish(world, b"new", "acme", "globex", "newco")
        publish(world, b"new", "globex", stream="aes-9")
        assert read_from(world, "acme", AsksNobody) == read_from(world, "newco", AsksNobody) == []
        assert sorted(read_from(world, "globex", AsksNobody)) == [b"mid", b"new", b"old"]
        assert world.value("SELECT count(*) FROM encryption_keys WHERE scope_id = 'aes-9' AND key_material IS NOT NULL") == 0
    finally:
        world.close()


# 5


async def same_generation(connection: Connection, tenant: str) -> int:
    """The broken variant: a readmission that sets the state back, and nothing else."""
    found: int = await connection.fetchval("UPDATE tenants SET state = 'active' WHERE tenant_id = $1 RETURNING generation", tenant)
    return found


def of_before(world: World) -> list[bytes]:
    """The checker: the shredded events that open."""
    return [row["value"] for row in world.events("acme") if row["value"] == b"old"]


@pytest.mark.parametrize("next_generation", [None, same_generation], ids=["", "control: without a generation"])
def test_05_a_readmitted_tenant_does_not_open_its_old_events_even_if_its_old_key_comes_back(
    world: World, monkeypatch: pytest.MonkeyPatch, next_generation: Callable[..., Awaitable[int]] | None
) -> None:
    """The keystore's old row is put back from a backup, as somebody who wants to be helpful would."""
    world.run()
    publish(world, b"old", "acme")
    (kept,) = world.sql("SELECT wrapped FROM tenant_keys WHERE tenant_id = 'acme'")
    if next_generation is not None:
        monkeypatch.setattr(readmissions, "next_generation", next_generation)

    async def act() -> None:
        async with race(world) as started:
            started.flows["readmit"] = Readmission(started.flows["rotate"]._steps, started.sealing.renew_dedicated)
            for op in ("shred", "readmit"):
                walk = await started.accepted(op, ACME)
                await walk.to_the_end()
                assert walk.rejected is None

    asyncio.run(act())
    world.sql("UPDATE tenant_keys SET wrapped = $1, state = 'active' WHERE tenant_id = 'acme' AND generation = 1", kept["wrapped"])
    assert of_before(world) == ([] if next_generation is None else [b"old"])
    if next_generation is None:
        publish(world, b"new", "acme")
        assert [row["value"] or row["status"] for row in world.events("acme")] == ["erased", b"new"]
        assert world.value("SELECT count(*) FROM encryption_keys WHERE generation = 1 AND is_active") == 1  # it looks alive, and is not asked for
