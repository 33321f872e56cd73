"""Promise: within a grace a shred's data is as unreadable as after it; only what cannot be undone waits for the end."""

import asyncio
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from sidecar import grace
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import connected
from sidecar.testing import control_plane as kit
from tests.acceptance.rolls import confirm_and_destroy, roll, states, statuses
from tests.acceptance.test_residue import done, reconfigured, residue_of
from tests.acceptance.world import World, blocking, until

ACME = Scope.of_tenant("acme")
AES_1 = Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1")
LONG, SHORT = {"grace": "1h"}, {"grace": "3s"}


@pytest.fixture
def filled(world: World) -> World:
    world.run()
    for n in range(5):
        for stream in ("aes-1", "aes-2"):
            world.event(world.topic("in"), b"v%d" % n, tenant="acme", stream=stream)
    world.settle()
    return world


def wrapped(world: World, scope: Scope) -> set[bytes]:
    """The wrapped bytes of the scope's keys, as they stand where everybody looks."""
    table = "SELECT wrapped AS w FROM tenant_keys WHERE tenant_id = $1" if scope.kind is ScopeKind.TENANT else (
        f"SELECT key_material AS w FROM encryption_keys WHERE tenant_id = $1 AND scope_id = '{scope.id}'"
    )  # fmt: skip
    return {bytes(row["w"]) for row in world.sql(table, scope.tenant) if row["w"] is not None}


def kept(world: World, keys: set[bytes]) -> list[str]:
    """The tables that hold any of those bytes: the checker."""
    columns = {"tenant_keys": "wrapped", "encryption_keys": "key_material", "quarantined_keys": "wrapped"}
    return [table for table, column in columns.items() if world.value(f"SELECT count(*) FROM {table} WHERE {column} = ANY ($1)", list(keys))]


@pytest.mark.parametrize("scope", [ACME, AES_1], ids=str)
def test_within_its_grace_a_shred_is_inaccessible_and_at_its_end_the_keys_are_destroyed(filled: World, scope: Scope) -> None:
    keys = wrapped(filled, scope)
    assert kept(filled, keys) == ["tenant_keys" if scope is ACME else "encryption_keys"]  # control: the checker finds what is there
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", scope, options=SHORT)
        assert receipt["status"] == "inaccessible"
        assert (receipt["irrecoverable_at"], receipt["keys"]["count"]) == (None, 1)
        assert receipt["irrecoverable_reason"].startswith("grace until 20")
        assert set(statuses(filled, "acme", stream="aes-1")) == {"erased"}
        filled.event(filled.topic("in"), b"late", tenant="acme", stream="aes-1")
        filled.settle()
        assert len(filled.sql("SELECT 1 FROM refusals")) == 1
        done(filled, receipt, "grace")
        assert kept(filled, keys) == []
        done(filled, receipt, "database")
    gone = (
        "SELECT count(*) FROM tenant_keys WHERE state = 'destroyed'" if scope is ACME else "SELECT count(*) FROM encryption_keys WHERE is_destroyed"
    )
    assert filled.value(gone) == 1
    (act,) = filled.sql("SELECT details FROM audit_log WHERE action = $1", f"{scope.kind}.destroy")
    assert act["details"]["count"] == 1
    assert all(entry["ok"] for entry in filled.json("audit", "verify"))


def test_within_the_grace_the_bytes_wait_in_quarantine_and_no_residue_of_the_database_is_done(filled: World) -> None:
    keys = wrapped(filled, ACME)
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", ACME, options=LONG)
        until(lambda: residue_of(filled, receipt["command_id"])["database", "dead rows of key tables"]["details"].get("reason"), "a look")
        rows = residue_of(filled, receipt["command_id"])
    assert kept(filled, keys) == ["quarantined_keys"]
    assert {kind for (kind, _), row in rows.items() if row["state"] == "pending"} >= {"grace", "database", "wal", "seal_epoch", "backup"}
    assert filled.json("receipts", "get", receipt["command_id"])["irrecoverable_reason"].startswith("grace until")


def test_a_hold_that_is_placed_within_the_grace_keeps_the_keys_until_it_is_released(filled: World) -> None:
    keys = wrapped(filled, ACME)
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", ACME, options=SHORT)
        assert filled.carry_out("hold", ACME)["status"] == "done"
        place = ("grace", "keys in quarantine")
        held = until(lambda: residue_of(filled, receipt["command_id"])[place]["details"].get("waits_for"), "the hold to stand in the way")
        assert "legal hold" in held
        assert kept(filled, keys) == ["quarantined_keys"]
        assert filled.carry_out("release", ACME)["status"] == "done"
        done(filled, receipt, "grace")
        assert kept(filled, keys) == []


@pytest.mark.parametrize("scope", [ACME, AES_1], ids=str)
def test_what_is_restored_within_its_grace_reads_as_before_and_is_never_complete(filled: World, scope: Scope) -> None:
    before = filled.events("acme")
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", scope, options=LONG)
        assert set(statuses(filled, "acme", stream="aes-1")) == {"erased"}
        restored(filled, scope)
        assert filled.events("acme") == before
        assert residue_of(filled, receipt["command_id"]) == {}
        filled.event(filled.topic("in"), b"after", tenant="acme", stream="aes-1")
        filled.settle()
    assert statuses(filled, "acme", stream="aes-1") == ["ok"] * 6
    assert filled.sql("SELECT 1 FROM quarantined_keys") == []
    assert filled.sql("SELECT 1 FROM receipts WHERE status = 'complete'") == []
    with pytest.raises(CommandRejected, match="nothing can be brought back"):
        restored(filled, scope)


def restored(world: World, scope: Scope) -> None:
    """As a readmission with `restore` does it."""

    async def act() -> None:
        async with connected(world.dsn) as connection, connection.transaction():
            await grace.restore(connection, scope, datetime.now(UTC))
            await connection.execute("UPDATE erased_scopes SET readmitted_at = now()")
            await connection.execute("UPDATE tenants SET state = 'active', epoch = epoch + 1")

    blocking(act)


def test_a_roll_keeps_the_seal_epoch_of_keys_in_quarantine_so_that_they_can_come_back(filled: World) -> None:
    with kit.control(filled.config):
        filled.carry_out("shred", ACME, options=LONG)
        (old,) = states(filled)
        with pytest.raises(Exception, match="not empty"):
            roll(filled)
        assert states(filled)[old] == "retiring"
        restored(filled, ACME)
    assert set(statuses(filled, "acme")) == {"ok"}
    roll(filled)
    confirm_and_destroy(filled)
    assert states(filled)[old] == "destroyed"
    assert set(statuses(filled, "acme")) == {"ok"}


def test_a_shred_without_grace_ends_the_grace_of_an_earlier_one(filled: World) -> None:
    keys = wrapped(filled, ACME) | wrapped(filled, AES_1)
    with kit.control(filled.config):
        filled.carry_out("shred", AES_1, options=LONG)
        filled.carry_out("shred", AES_1)
        assert kept(filled, keys) == ["tenant_keys"]
        filled.carry_out("shred", ACME, options=LONG)
        filled.carry_out("shred", ACME)
    assert kept(filled, keys) == []


def test_plain_events_cannot_be_deleted_with_a_grace(filled: World) -> None:
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", ACME, options=LONG | {"include_plain": True})
    assert (receipt["status"], receipt["error"]["code"]) == ("rejected", "grace_with_plain")
    assert set(statuses(filled, "acme")) == {"ok"}


@pytest.mark.parametrize("step", ["residue:grace", "grace:destroyed"])
def test_a_control_plane_killed_at_the_end_of_a_grace_goes_on(filled: World, step: str) -> None:
    keys = wrapped(filled, ACME)
    first = kit.start_control(filled.config, failpoint=step)
    try:
        first.wait_ready()
        receipt = filled.carry_out("shred", ACME, options=SHORT)
        assert first.wait_dead() == -9
    finally:
        first.kill()
    with kit.control(filled.config):
        done(filled, receipt, "grace")
    assert kept(filled, keys) == []
    assert filled.value("SELECT count(*) FROM audit_log WHERE action = 'tenant.destroy'") == 1
    assert filled.value("SELECT state FROM tenants") == "shredded"


def test_data_plane_and_readers_need_no_right_to_the_quarantine(make_world: Callable[..., World]) -> None:
    world = make_world()
    role = f"worker_{secrets.token_hex(4)}"
    parts = urlsplit(world.dsn)
    world.sql(f"CREATE ROLE {role} LOGIN")
    world.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    world.sql(f"REVOKE ALL ON quarantined_keys FROM {role}")
    limited = parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}").geturl()
    reconfigured(world, postgres={"dsn": world.dsn, "dsn_data": limited, "dsn_reader": limited})
    try:
        world.both()
        world.event(world.topic("in"), b"v", tenant="acme", stream="aes-1")
        world.settle()
        assert statuses(world, "acme") == ["ok"]
        world.carry_out("shred", ACME, options=LONG)
        assert statuses(world, "acme") == ["erased"]
        assert denied(limited)  # control: the role is what it should be
    finally:
        world.close()
        world.sql(f"DROP OWNED BY {role}")
        world.sql(f"DROP ROLE {role}")


def denied(dsn: str) -> bool:
    async def read() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetch("SELECT * FROM quarantined_keys")
        except asyncpg.InsufficientPrivilegeError:
            return "denied"
        finally:
            await connection.close()

    return asyncio.run(read()) == "denied"


CLASS = Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes")


@pytest.mark.parametrize(("first", "again"), [(ACME, ACME), (AES_1, AES_1), (CLASS, AES_1)], ids=str)
def test_keys_that_a_restore_can_bring_back_are_shredded_again_only_without_a_grace(filled: World, first: Scope, again: Scope) -> None:
    """Else the restore of the one would undo the other, which has its receipt."""
    keys = wrapped(filled, again)
    with kit.control(filled.config):
        assert filled.carry_out("shred", first, options=LONG)["status"] == "inaccessible"
        refused = filled.carry_out("shred", again, options=LONG)
        assert (refused["status"], (refused["error"] or {}).get("code")) == ("rejected", "in_grace")
        assert filled.carry_out("shred", again)["status"] == "inaccessible"
        assert kept(filled, keys) == []


def test_a_restore_brings_back_nothing_of_before_a_readmission(filled: World) -> None:
    old = wrapped(filled, AES_1)
    with kit.control(filled.config):
        filled.carry_out("shred", AES_1, options=LONG)
        assert filled.carry_out("readmit", AES_1)["status"] == "done"
        filled.event(filled.topic("in"), b"new", tenant="acme", stream="aes-1")
        filled.settle()
        filled.carry_out("shred", AES_1, options=LONG)
        assert filled.carry_out("readmit", AES_1, options={"restore": True})["status"] == "done"
        assert statuses(filled, "acme", stream="aes-1") == ["erased"] * 5 + ["ok"]
        assert kept(filled, old) == ["quarantined_keys"]


def test_after_its_grace_nothing_is_restored_or_held_although_the_bytes_are_still_there(filled: World) -> None:
    """They may be: the control plane was down, or the database was restored to within a grace that ended, with its receipts, long ago."""
    keys = wrapped(filled, AES_1)
    over = "UPDATE quarantined_keys SET until = now() - interval '1 minute'"
    with kit.control(filled.config):
        filled.carry_out("shred", AES_1, options=LONG)
        filled.sql(over)
        for op, options, code in (("readmit", {"restore": True}, "grace_over"), ("hold", {}, "scope_erased")):
            assert (filled.carry_out(op, AES_1, options=options)["error"] or {}).get("code") == code
        assert kept(filled, keys) == ["quarantined_keys"]
        filled.sql("UPDATE quarantined_keys SET until = now() + interval '1 hour'")
        assert filled.carry_out("hold", AES_1)["status"] == "done"
        filled.sql(over)  # what a hold kept there can be held again, and given back
        assert filled.carry_out("hold", AES_1)["status"] == "done"
        assert filled.carry_out("readmit", AES_1, options={"restore": True})["status"] == "done"
    assert kept(filled, keys) == ["encryption_keys"]


def test_whoever_asks_after_a_shred_that_was_taken_back_is_told_so(filled: World) -> None:
    """Its receipt and its certificate were true when they were given."""
    with kit.control(filled.config):
        receipt = filled.carry_out("shred", AES_1, options=LONG)
        kept_back = filled.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-2"), options=LONG)
        until(lambda: len(filled.json("evidence", "list")) == 2, "the certificates")
        filled.carry_out("readmit", AES_1, options={"restore": True})
        filled.carry_out("readmit", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-2"))
        assert filled.json("receipts", "get", receipt["command_id"])["note"] == "taken_back"
        assert filled.json("receipts", "get", kept_back["command_id"]).get("note") is None
    listed = {row["command_id"]: row["taken_back"] for row in filled.json("evidence", "list")}
    assert listed == {receipt["command_id"]: True, kept_back["command_id"]: False}
    report = filled.json("report", "--tenant", "acme")
    assert {row["scope"]: row["status"] for row in report["shreds"]} == {"stream aes-1": "taken back", "stream aes-2": "inaccessible"}
    assert {row["scope"]: row["old_data"] for row in report["readmissions"]} == {"stream aes-1": "restored", "stream aes-2": "unreadable"}
