"""What must not happen in a shred (issue 4, E): 3 (a job's copy of a key comes back), 6 (reported done in part), 7 (an unknown tenant), 11 (away is erased).

Each checker is seen red on a variant that is broken on purpose.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from sidecar.core.errors import KeyShredded, KmsUnavailable
from sidecar.core.keys import Kek, KekRow
from sidecar.core.model import Erased, Event, Scope
from sidecar.event_store import EventStore
from sidecar.kafka.ledger import LedgerTopic
from sidecar.keys import KeyManagement
from sidecar.kms import open_kms
from sidecar.kms.file import FileKms
from sidecar.ledger import LedgerGate
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import Connection, open_pool
from sidecar.postgres.errors import mapped
from sidecar.postgres.seal_epochs import SealEpoch
from sidecar.sealing import Sealing
from sidecar.steps import SystemClock
from sidecar.testing import control_plane as kit
from tests.acceptance.rolls import confirm_and_destroy, roll, statuses
from tests.acceptance.test_residue import NO_BACKUPS, done, payloads, reconfigured, recycle_wal, residue_of, view_of
from tests.acceptance.world import World, blocking, until

ACME = Scope.of_tenant("acme")


def fill(world: World, tenants: Sequence[str] = ("acme", "globex")) -> None:
    for n in range(4):
        for tenant in tenants:
            world.event(world.topic("in"), b"v%d" % n, tenant=tenant, stream="aes-1")
    world.settle()


# ── 3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Holding(FileKms):
    """A KMS that answers late: who asked has the tenant's key in memory meanwhile."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()

    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        self.asked.set()
        await self.go_on.wait()
        return await super().wrap(plaintext, aad)


def shred_while_a_roll_holds_the_keys(world: World) -> None:
    """A roller has unwrapped every tenant's key and is about to store it anew; then comes the shred, and then the roller goes on."""

    async def main() -> None:
        pool = await open_pool(world.dsn, max_size=8)
        kms = Holding(world.folder / "kek")
        rolling = asyncio.create_task(Sealing(pool, SystemClock(), kms, world.settings.kms).roll("a test"))
        try:
            await asyncio.wait_for(kms.asked.wait(), 120)
            receipt = await asyncio.to_thread(world.carry_out, "shred", ACME)
            assert receipt["status"] == "inaccessible"
        finally:
            kms.go_on.set()
            await asyncio.gather(rolling, return_exceptions=True)
            await pool.close()

    blocking(main)


def resurrected(world: World) -> list[str]:
    """Keys of the shredded tenant that are there again: the checker."""
    rows = world.sql("SELECT generation, kek_version FROM tenant_keys WHERE tenant_id = 'acme' AND wrapped IS NOT NULL")
    return [f"kek/{row['generation']}/{row['kek_version']}" for row in rows]


def test_03_a_job_that_held_the_key_in_memory_does_not_bring_it_back(world: World) -> None:
    world.run()
    world.control()
    fill(world)
    shred_while_a_roll_holds_the_keys(world)
    assert resurrected(world) == []
    assert set(statuses(world, "acme")) == {"erased"}
    assert set(statuses(world, "globex")) == {"ok"}


def test_03_control_a_job_that_does_not_look_again_brings_it_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind(connection: Connection, epoch: SealEpoch, rows: Sequence[KekRow]) -> list[tuple[str, int, int]]:
        with mapped():
            for row in rows:
                await connection.execute(
                    "UPDATE tenant_keys SET wrapped = $4, kms_key_version = $5 WHERE (tenant_id, generation, kek_version) = ($1, $2, $3)",
                    row.tenant, row.generation, row.version, row.wrapped, row.kms_key_version,
                )  # fmt: skip
        return [(row.tenant, row.generation, row.version) for row in rows]

    monkeypatch.setattr(seal_epochs, "rewrap", blind)
    world.run()
    world.control()
    fill(world)
    shred_while_a_roll_holds_the_keys(world)
    assert resurrected(world) == ["kek/1/1"]


# ── 6 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def broken_control(world: World, patch: str) -> kit.ControlProcess:
    """A control plane of which a part was replaced by `patch` (Python)."""
    log = world.folder / "broken.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", patch + kit._MAIN, str(world.config), "60"], stderr=stderr, env=dict(os.environ))
    return kit.ControlProcess(process, log).wait_ready()


def done_in_part(world: World, command_id: str) -> list[str]:
    """What a command's receipts say too early: the checker. Looks at the places themselves, not at what is on record of them."""
    statuses_ = {row["status"] for row in world.sql("SELECT status FROM receipts WHERE command_id = $1::text::uuid", command_id)}
    found = []
    if statuses_ & {"inaccessible", "complete"}:
        found += ["a key is there"] * bool(resurrected(world))
    if "complete" in statuses_:
        found += ["records in the view"] * bool(payloads(world, world.topic("view"), "acme"))
        epochs = {row["state"] for row in world.sql("SELECT state FROM seal_epochs WHERE state <> 'active'")}
        found += ["the seal epoch lives"] * (epochs != {"destroyed"})
    return found


def watched_to_its_end(make_world: Callable[..., World]) -> World:
    """Where every kind of residue can end soon."""
    world = make_world(backups=NO_BACKUPS, kms={"uri": "file:./kek", "backup": "none"})
    reconfigured(world, views=[view_of(world.name)], sources=[{"topic": f"{world.name}.in", "purge": "after_projection"}])
    world.run()
    fill(world)
    return world


RESIDUE_STEPS = ["residue:view", "residue:tombstones", "residue:database", "residue:wal", "residue:seal_epoch", "residue:complete"]


@pytest.mark.parametrize("step", RESIDUE_STEPS)
def test_06_a_shred_is_complete_once_and_only_when_nothing_is_left_wherever_the_control_plane_dies(
    make_world: Callable[..., World], step: str
) -> None:
    world = watched_to_its_end(make_world)
    first = kit.start_control(world.config, failpoint=step)
    try:
        first.wait_ready()
        receipt = world.carry_out("shred", ACME)
        assert first.wait_dead() == -9
    finally:
        first.kill()
    assert done_in_part(world, receipt["command_id"]) == []
    with kit.control(world.config):
        done(world, receipt, "database")
        recycle_wal(world)
        roll(world, backup="none")
        confirm_and_destroy(world, backup="none")
        until(lambda: complete(world, receipt), f"complete; {residue_of(world, receipt['command_id'])}")
    assert done_in_part(world, receipt["command_id"]) == []
    assert complete(world, receipt) == 1
    assert world.value("SELECT state FROM tenants WHERE tenant_id = 'acme'") == "shredded"
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


def complete(world: World, receipt: dict[str, Any]) -> int:
    return int(world.value("SELECT count(*) FROM receipts WHERE command_id = $1::text::uuid AND status = 'complete'", receipt["command_id"]))


FORGETFUL = """
from sidecar.postgres import residue
every = residue.of_command
async def of_command(connection, command_id):
    return [row for row in await every(connection, command_id) if row.state == "done"]
residue.of_command = of_command
"""


def test_06_control_a_control_plane_that_forgets_what_is_pending_reports_it_done_in_part(make_world: Callable[..., World]) -> None:
    world = watched_to_its_end(make_world)
    broken = broken_control(world, FORGETFUL)
    try:
        receipt = world.carry_out("shred", ACME)
        until(lambda: complete(world, receipt), "the false receipt")
        assert "the seal epoch lives" in done_in_part(world, receipt["command_id"])
    finally:
        broken.kill()


# ── 7 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def said_of_nobody(world: World) -> list[str]:
    """Statuses, other than a refusal, that were given to a tenant that never was: the checker."""
    rows = world.sql("SELECT status, body FROM receipts")
    bodies = [json.loads(row["body"]) if isinstance(row["body"], str) else row["body"] for row in rows]
    return [body["status"] for body in bodies if (body["scope"] or {}).get("tenant") == "nobody" and body["status"] != "rejected"]


def test_07_an_unknown_tenant_is_never_reported_shredded(world: World) -> None:
    world.control()
    for options in ({}, {"dry_run": True}, {"grace": "1h"}, {"include_plain": True}):
        receipt = world.carry_out("shred", Scope.of_tenant("nobody"), options=options)
        assert (receipt["status"], receipt["error"]["code"]) == ("rejected", "unknown_tenant")
    assert said_of_nobody(world) == []
    assert world.sql("SELECT 1 FROM tenants") == []


TRUSTING = """
from sidecar.postgres import commands, tenants
async def exists(connection, tenant):
    return True
async def lock(connection, tenant):
    return tenants.Tenant(state="active", generation=1, epoch=1)
commands.tenant_exists = exists
tenants.lock = lock
"""


def test_07_control_a_control_plane_that_takes_unknown_for_shredded_says_so(world: World) -> None:
    broken = broken_control(world, TRUSTING)
    try:
        world.carry_out("shred", Scope.of_tenant("nobody"), final=("inaccessible", "complete"))
        assert "inaccessible" in said_of_nobody(world)
    finally:
        broken.kill()


# ── 11 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def kms_away(world: World) -> Iterator[None]:
    key, hidden = world.folder / "kek", world.folder / "kek-away"
    key.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(key)


class TakesAwayForErased(KeyManagement):
    """Broken: whatever it cannot open now it says is gone for good."""

    async def open_kek(self, row: KekRow) -> Kek:
        try:
            return await super().open_kek(row)
        except KmsUnavailable:
            raise KeyShredded from None


def answers(world: World, tenant: str, keys: KeyManagement) -> set[str]:
    """What a reader is told, with keys that it opens from a KMS: the checker. `unavailable`: nothing is said of any event."""

    async def read() -> set[str]:
        pool = await open_pool(world.dsn)
        try:
            found = await EventStore(pool, keys, LedgerGate(LedgerTopic(world.settings), world.settings.deployment)).read(tenant)
        except KmsUnavailable:
            return {"unavailable"}
        except KeyShredded:
            return {"erased"}
        finally:
            await pool.close()
        return {"ok" if isinstance(held, Event) else "erased" if isinstance(held, Erased) else "error" for _, held in found}

    return blocking(read)


def test_11_a_kms_that_is_away_is_not_read_as_erased(world: World) -> None:
    world.both()
    fill(world)
    keys = KeyManagement(open_kms(world.settings.kms.uri))
    with kms_away(world):
        receipt = world.carry_out("shred", ACME)  # a shred needs no KMS
        assert receipt["status"] == "inaccessible"
        assert answers(world, "acme", keys) == {"erased"}
        assert answers(world, "globex", keys) == {"unavailable"}
        said = world.cli("-o", "json", "events", "list", "--tenant", "globex")
        assert said.returncode != 0
        assert b"erased" not in said.stdout
        world.event(world.topic("in"), b"late", tenant="acme", stream="aes-1")
        waiting = world.event(world.topic("in"), b"new", tenant="initech", stream="aes-1")  # needs a key: the partition waits
        world.flush()
        until(lambda: any("KmsUnavailable" in plane.text() or "key file" in plane.text() for plane in world.planes), "the data plane to wait")
        assert world.sql("SELECT 1 FROM refusals WHERE tenant_id <> 'acme'") == []
        assert world.sql("SELECT 1 FROM messages WHERE message_id = $1", waiting) == []
    world.settle()
    assert set(statuses(world, "globex")) == {"ok"}
    assert statuses(world, "initech") == ["ok"]
    assert {(row["tenant_id"], row["reason"]) for row in world.sql("SELECT * FROM refusals")} == {("acme", "tenant_shredded")}


def test_11_control_a_kms_that_says_gone_for_away_is_caught(world: World) -> None:
    world.run()
    fill(world)
    keys = TakesAwayForErased(open_kms(world.settings.kms.uri))
    assert answers(world, "globex", keys) == {"ok"}
    with kms_away(world):
        assert answers(world, "globex", keys) == {"erased"}
