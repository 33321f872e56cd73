"""Seal epochs: rolled from the command line and by the timer, with a backup to confirm, and with tenants that get a new KEK."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from sidecar import rekeying
from sidecar.core.errors import Unavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.kms.file import _Slot, _write_new
from sidecar.postgres import rekeys
from sidecar.testing import control_plane as kit
from tests.acceptance.rolls import backup, confirm_and_destroy, irrecoverable, opened_by_anybody, restore, roll, sealing, states, statuses, wrapped_by
from tests.acceptance.world import World, until

TENANTS = ("acme", "globex", "initech")


@pytest.fixture
def filled(world: World) -> World:
    """Three tenants with events of two streams each, stored; the data plane runs."""
    world.run()
    for tenant in TENANTS:
        for n in range(6):
            world.event(world.topic("in"), f"{tenant} {n}".encode(), tenant=tenant, stream=f"aes-{n % 2}")
    world.settle()
    return world


def stream_of(tenant: str, stream: str) -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.STREAM, id=stream)


def audited(world: World) -> list[str]:
    return [row["action"] for row in world.sql("SELECT action FROM audit_log WHERE action LIKE 'keys.%' ORDER BY writer, seq")]


def test_a_roll_from_the_command_line_moves_every_tenant_and_destroys_the_old_version_once_a_backup_is_confirmed(filled: World) -> None:
    (old,) = states(filled)
    rolled = filled.json("keys", "roll-epoch", "--by", "ops@example.org")
    assert [(row["state"], row["tenant_keys"]) for row in rolled] == [("retired", 0), ("active", 3)]
    new = rolled[1]["kms_key_version"]
    assert wrapped_by(filled) == dict.fromkeys(TENANTS, new)
    assert filled.json("keys", "roll-epoch", "--wait", "1", code=4)[0]["state"] == "retired", "nothing is destroyed without a backup"
    confirmed = filled.json("keys", "confirm-backup", "--by", "ops@example.org", "--epoch", old)
    assert (confirmed[0]["state"], confirmed[1]["state"]) == ("destroyed", "retired")
    assert confirmed[0]["irrecoverable_at"] is not None
    for tenant in TENANTS:
        filled.event(filled.topic("in"), b"after", tenant=tenant, stream="aes-0")
        filled.event(filled.topic("in"), b"after", tenant=tenant, stream="aes-new")
    filled.event(filled.topic("in"), b"after", tenant="hooli", stream="aes-0")
    filled.settle()
    for tenant in TENANTS:
        assert statuses(filled, tenant) == ["ok"] * 8
    assert statuses(filled, "hooli") == ["ok"]
    assert {"keys.roll_epoch.begin", "keys.roll_epoch.rewrap", "keys.roll_epoch.retired", "keys.roll_epoch.destroyed"} <= set(audited(filled))
    assert all(row["ok"] for row in filled.json("audit", "verify"))


def test_a_tenant_of_which_a_stream_was_shredded_gets_a_new_kek_and_loses_nothing_else(filled: World) -> None:
    filled.control()
    filled.carry_out("shred", stream_of("acme", "aes-1"))
    before = {row["key_id"]: bytes(row["commitment"]) for row in filled.sql("SELECT * FROM encryption_keys WHERE tenant_id = 'acme'")}
    roll(filled)
    keks = filled.sql("SELECT kek_version, state, wrapped IS NULL AS gone FROM tenant_keys WHERE tenant_id = 'acme' ORDER BY 1")
    assert [(k["kek_version"], k["state"], k["gone"]) for k in keks] == [(1, "destroyed", True), (2, "active", False)]
    after = filled.sql("SELECT * FROM encryption_keys WHERE tenant_id = 'acme'")
    assert {row["key_id"]: bytes(row["commitment"]) for row in after} == before, "the DEKs are the same"
    assert {(row["kek_version"], row["key_material"] is None) for row in after} == {(2, False), (1, True)}
    assert filled.value("SELECT below_kek FROM erased_scopes WHERE tenant_id = 'acme'") == 2
    for stream in ("aes-0", "aes-1", "aes-2"):
        filled.event(filled.topic("in"), b"after", tenant="acme", stream=stream)
    filled.settle()
    assert statuses(filled, "acme", stream="aes-0") == ["ok"] * 4
    assert statuses(filled, "acme", stream="aes-2") == ["ok"]
    assert statuses(filled, "acme", stream="aes-1") == ["erased"] * 3
    assert filled.value("SELECT count(*) FROM tenant_keys WHERE tenant_id = 'globex'") == 1, "nobody else gets one"
    roll(filled)
    assert filled.value("SELECT count(*) FROM tenant_keys WHERE tenant_id = 'acme'") == 2, "what was shredded is behind it now"


def test_the_timer_rolls_when_it_is_due_and_destroys_what_needs_no_backup(make_world: Callable[..., World]) -> None:
    world = make_world(kms={"uri": "file:./kek", "roll_every": "1s", "backup": "none"})
    world.run()
    world.event(world.topic("in"), b"x", tenant="acme", stream="aes-1")
    world.settle()
    (old,) = states(world)
    with kit.control(world.config, timer_seconds=0.2):
        until(lambda: states(world)[old] == "destroyed", f"the first epoch to be destroyed; {states(world)}")
    assert statuses(world, "acme") == ["ok"]


def test_a_confirmed_backup_is_refused_for_an_epoch_that_still_wraps(filled: World) -> None:
    (active,) = states(filled)
    said = filled.cli("keys", "confirm-backup", "--epoch", active)
    assert said.returncode == 2
    assert b"active" in said.stderr
    roll(filled)
    confirm_and_destroy(filled)
    assert list(states(filled).values()) == ["destroyed", "active"]
    assert json.loads(filled.cli("-o", "json", "keys", "confirm-backup").stdout) != [], (
        "a second confirmation changes nothing and shows where it stands"
    )
    assert list(states(filled).values()) == ["destroyed", "active"]


# a KMS key per tenant


def own_keys(world: World) -> dict[str, list[str]]:
    """tenant → the states of its own KMS key's versions, oldest first."""
    out: dict[str, list[str]] = {}
    for row in world.sql("SELECT * FROM seal_epochs ORDER BY created_at"):
        out.setdefault(row["tenant_id"], []).append(row["state"])
    return out


@pytest.fixture
def dedicated(make_world: Callable[..., World]) -> World:
    world = make_world(kms={"uri": "file:./kek", "dedicated": True})
    world.run()
    world.control()
    for tenant in ("acme", "globex"):
        for stream in ("aes-0", "aes-1"):
            world.event(world.topic("in"), b"x", tenant=tenant, stream=stream)
    world.settle()
    return world


def test_a_dedicated_key_is_destroyed_at_its_tenants_shred_and_nobody_elses(dedicated: World) -> None:
    world = dedicated
    assert own_keys(world) == {"acme": ["active"], "globex": ["active"]}
    assert len({row["kms_uri"] for row in world.sql("SELECT kms_uri FROM tenant_keys")}) == 2
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    until(lambda: own_keys(world)["acme"] == ["destroyed"], "the key to be destroyed, without a roll and without a backup")
    assert own_keys(world)["globex"] == ["active"]
    assert statuses(world, "globex") == ["ok", "ok"]
    at, why = irrecoverable(world, receipt)
    assert (at is not None, why) == (True, None)

    assert world.carry_out("readmit", Scope.of_tenant("acme"))["status"] == "done"
    world.event(world.topic("in"), b"again", tenant="acme", stream="aes-7")
    world.settle()
    assert own_keys(world)["acme"] == ["destroyed", "active"]
    assert statuses(world, "acme", stream="aes-7") == ["ok"]
    assert statuses(world, "acme", stream="aes-0") == ["erased"]


def test_a_tenant_that_is_readmitted_before_its_own_key_is_destroyed_gets_the_next_version(dedicated: World) -> None:
    world = dedicated
    world.sql("CREATE FUNCTION not_yet() RETURNS TRIGGER LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
    world.sql("CREATE TRIGGER not_yet BEFORE UPDATE ON seal_epochs FOR EACH ROW WHEN (NEW.state = 'destroying') EXECUTE FUNCTION not_yet()")
    world.carry_out("shred", Scope.of_tenant("acme"))
    assert world.carry_out("readmit", Scope.of_tenant("acme"))["status"] == "done"
    world.event(world.topic("in"), b"again", tenant="acme", stream="aes-7")
    world.settle()
    assert own_keys(world)["acme"][-1] == "active"
    assert own_keys(world)["acme"][0] in ("retiring", "retired")
    world.sql("DROP TRIGGER not_yet ON seal_epochs")
    until(lambda: own_keys(world)["acme"] == ["destroyed", "active"], "the first version to be destroyed")
    assert statuses(world, "acme", stream="aes-7") == ["ok"]


def test_what_a_shred_still_has_to_destroy_is_never_the_key_of_the_readmitted_tenant(dedicated: World) -> None:
    """The residue of the shred is worked on after the readmission: it destroys what wrapped then, and comes to its end."""
    world = dedicated
    world.sql("CREATE FUNCTION not_yet() RETURNS TRIGGER LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
    world.sql("CREATE TRIGGER not_yet BEFORE UPDATE ON seal_epochs FOR EACH ROW WHEN (NEW.state = 'destroying') EXECUTE FUNCTION not_yet()")
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    assert world.carry_out("readmit", Scope.of_tenant("acme"))["status"] == "done"

    def looks() -> int:
        return int(world.value("SELECT attempts FROM residue WHERE kind = 'seal_epoch'"))

    before = looks()
    until(lambda: looks() >= before + 2, "two looks, before the tenant has a new key")
    assert own_keys(world)["acme"][-1] == "active"
    world.sql("DROP TRIGGER not_yet ON seal_epochs")
    world.event(world.topic("in"), b"again", tenant="acme", stream="aes-7")
    world.settle()
    state = "SELECT state FROM residue WHERE command_id = $1::text::uuid AND kind = 'seal_epoch'"
    until(lambda: world.value(state, receipt["command_id"]) == "done", "the end of what the shred had to destroy", 60)
    assert own_keys(world)["acme"] == ["destroyed", "active"]
    assert statuses(world, "acme", stream="aes-7") == ["ok"]


def test_a_dedicated_key_rolls_when_a_stream_of_its_tenant_was_shredded(dedicated: World) -> None:
    world = dedicated
    receipt = world.carry_out("shred", stream_of("globex", "aes-1"))
    assert irrecoverable(world, receipt) == (None, "next seal epoch")

    def rolled_when_due() -> bool:
        sealing(world, lambda s: s.follow_up(), dedicated=True, roll_every="1s")
        return own_keys(world) == {"acme": ["active"], "globex": ["retired", "active"]}

    until(rolled_when_due, "the tenant's own key to be rolled")
    assert irrecoverable(world, receipt) == (None, "keystore backup to be confirmed")
    confirm_and_destroy(world, dedicated=True)
    assert own_keys(world) == {"acme": ["active"], "globex": ["destroyed", "active"]}
    assert irrecoverable(world, receipt)[0] is not None
    assert statuses(world, "globex", stream="aes-0") == ["ok"]
    assert statuses(world, "acme") == ["ok", "ok"]


# quarantine


def test_what_is_in_quarantine_keeps_its_epoch_from_being_destroyed(filled: World) -> None:
    """Within a grace a key may come back: its wrap needs the KEK, and that the version of the KMS key."""
    filled.sql(
        """INSERT INTO quarantined_keys (command_id, tenant_id, generation, kek_version, wrapped, until, was)
           SELECT gen_random_uuid(), tenant_id, generation, kek_version, wrapped, now() + interval '1 day', state
           FROM tenant_keys WHERE tenant_id = 'acme'"""
    )
    filled.sql("UPDATE tenant_keys SET wrapped = NULL WHERE tenant_id = 'acme'")
    (old,) = states(filled)
    with pytest.raises(Unavailable, match="not empty yet"):
        roll(filled)
    assert states(filled)[old] == "retiring"
    filled.sql(
        "WITH q AS (DELETE FROM quarantined_keys RETURNING *) UPDATE tenant_keys k SET wrapped = q.wrapped FROM q WHERE k.tenant_id = q.tenant_id"
    )
    roll(filled)
    assert list(states(filled).values()) == ["retired", "active"], "the roll that was begun went on; no other was begun"
    assert statuses(filled, "acme") == ["ok"] * 6


def test_a_tenant_with_a_shredded_stream_in_quarantine_keeps_its_kek_until_the_next_roll(filled: World) -> None:
    filled.control()
    filled.carry_out("shred", stream_of("acme", "aes-1"))
    filled.sql(
        """INSERT INTO quarantined_keys (command_id, tenant_id, generation, key_id, key_version, wrapped, until, was)
           VALUES (gen_random_uuid(), 'acme', 1, gen_random_uuid(), 1, '', now() + interval '1 day', 'active')"""
    )
    roll(filled)
    assert filled.value("SELECT count(*) FROM tenant_keys WHERE tenant_id = 'acme'") == 1
    assert filled.value("SELECT below_kek FROM erased_scopes WHERE tenant_id = 'acme'") is None
    filled.sql("DELETE FROM quarantined_keys")
    roll(filled)
    assert filled.value("SELECT below_kek FROM erased_scopes WHERE tenant_id = 'acme'") == 2
    assert statuses(filled, "acme", stream="aes-0") == ["ok"] * 3


# traffic


def test_a_tenant_that_gets_a_new_kek_under_traffic_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """New streams, new events of old streams, a rotation and a shred of a stream, while its DEKs move in small chunks."""
    monkeypatch.setattr(rekeying, "CHUNK", 5)
    world.run()
    world.control()
    sent = 0

    def some(count: int) -> None:
        nonlocal sent
        for _ in range(count):
            world.event(world.topic("in"), str(sent).encode(), tenant="acme", stream=f"aes-{sent % (60 + sent // 10)}")
            sent += 1
        world.flush()

    some(200)
    world.event(world.topic("in"), b"gone", tenant="acme", stream="gone")
    world.settle()
    world.carry_out("shred", stream_of("acme", "gone"))
    move = rekeys.rewrap

    async def busily(connection: Any, kek: Any, deks: Any) -> int:
        some(10)
        if sent % 50 == 0:
            await asyncio.to_thread(world.carry_out, "rotate", Scope.of_tenant("acme"))
        return await move(connection, kek, deks)

    monkeypatch.setattr(rekeys, "rewrap", busily)
    roll(world)
    confirm_and_destroy(world)
    some(50)
    world.settle()
    values = [event["value"] for event in world.events("acme") if event["stream_id"] != "gone"]
    assert sorted(values) == sorted(str(n).encode() for n in range(sent))
    live = world.sql("SELECT kek_version, wrapped IS NULL AS gone FROM tenant_keys WHERE tenant_id = 'acme' ORDER BY 1")
    assert [(row["kek_version"], row["gone"]) for row in live] == [(1, True), (2, False)]
    assert world.value("SELECT count(*) FROM encryption_keys WHERE key_material IS NOT NULL AND kek_version < 2") == 0


def test_a_key_row_that_was_altered_keeps_its_tenants_old_key_and_the_epoch(filled: World) -> None:
    """The roller destroys nothing that it could not move; all others move."""
    filled.control()
    filled.carry_out("shred", stream_of("acme", "aes-1"))
    filled.sql("UPDATE encryption_keys SET key_material = set_byte(key_material, 20, 1 - get_byte(key_material, 20) & 1) WHERE tenant_id = 'acme'")
    filled.sql("UPDATE tenant_keys SET wrapped = set_byte(wrapped, 20, 1 - get_byte(wrapped, 20) & 1) WHERE tenant_id = 'globex'")
    (old,) = states(filled)
    with pytest.raises(Unavailable, match="not empty yet"):
        roll(filled)
    with pytest.raises(Unavailable, match="not empty yet"):
        confirm_and_destroy(filled)
    assert states(filled)[old] == "retiring"
    assert filled.value("SELECT count(*) FROM tenant_keys WHERE wrapped IS NOT NULL AND kms_key_version = $1", old) == 2
    assert statuses(filled, "initech") == ["ok"] * 6


# what a shred waits for


def test_a_shred_is_irrecoverable_when_every_version_that_ever_wrapped_its_key_is_destroyed(filled: World) -> None:
    """The last one alone is not enough: a backup from between has the wrap under the one before."""
    filled.control()
    roll(filled)
    receipt = filled.carry_out("shred", Scope.of_tenant("acme"))
    assert irrecoverable(filled, receipt) == (None, "next seal epoch")
    roll(filled)
    first, second, _ = states(filled)
    filled.json("keys", "confirm-backup", "--epoch", second)
    assert (states(filled)[first], states(filled)[second]) == ("retired", "destroyed")
    assert irrecoverable(filled, receipt) == (None, "keystore backup to be confirmed")
    confirm_and_destroy(filled)
    assert irrecoverable(filled, receipt)[1] is None
    assert statuses(filled, "globex") == ["ok"] * 6


def test_a_restored_database_is_not_rolled_before_the_ledger_was_replayed(filled: World, make_database: Callable[[], str]) -> None:
    """Else what was shredded after the backup would be moved to the next version."""
    taken = backup(filled.dsn)
    filled.control()
    filled.carry_out("shred", Scope.of_tenant("acme"))
    restored = make_database()
    restore(restored, taken)
    said = filled.cli("keys", "roll-epoch", environment={"SIDECAR_POSTGRES__DSN": restored})
    assert said.returncode == 1
    assert b"ledger replay" in said.stderr


def test_a_control_plane_whose_clock_is_behind_claims_no_end_for_a_young_tenant_key(filled: World) -> None:
    """By its clock the tenant's key was made after the shred: that is no reason to take the shred for irrecoverable."""
    filled.control()
    receipt = filled.carry_out("shred", Scope.of_tenant("acme"))
    filled.sql("UPDATE tenant_keys SET created_at = now() WHERE tenant_id = 'acme'")
    filled.sql("UPDATE commands SET finished_at = clock_timestamp() WHERE op = 'shred'")
    assert irrecoverable(filled, receipt) == (None, "next seal epoch")


def test_a_roll_amid_the_shred_of_a_large_class_does_not_pass_for_its_end(filled: World, make_database: Callable[[], str]) -> None:
    """Behind the fence and before its keys are gone they are moved to the tenant's new KEK with all others."""
    aes = Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes")
    died = kit.start_control(filled.config, failpoint="shred:closed", broken="from sidecar import shredding\nshredding.MANY_KEYS = 1\n").wait_ready()
    command_id, raw = kit.command(filled.settings, "shred", aes)
    kit.send(filled.settings, raw, key="acme")
    assert died.wait_dead() == -9
    roll(filled)
    between = make_database()
    restore(between, backup(filled.dsn))
    with kit.control(filled.config):
        receipt = filled.receipt(str(command_id))
        assert receipt["status"] == "inaccessible"
        confirm_and_destroy(filled)
        assert {tenant for tenant, _, _ in opened_by_anybody(filled, between)} == set(TENANTS)  # what irrecoverable is not
        assert irrecoverable(filled, receipt) == (None, "next seal epoch")
        roll(filled)
        confirm_and_destroy(filled)
        assert irrecoverable(filled, receipt)[1] is None
        assert opened_by_anybody(filled, between) == set()


def test_a_shred_of_before_a_readmission_waits_for_the_keys_of_its_own_generation(filled: World) -> None:
    filled.control()
    filled.carry_out("shred", stream_of("acme", "aes-0"))
    roll(filled)
    confirm_and_destroy(filled)
    receipt = filled.carry_out("shred", stream_of("acme", "aes-1"))
    filled.carry_out("shred", Scope.of_tenant("acme"))
    filled.carry_out("readmit", Scope.of_tenant("acme"))
    filled.event(filled.topic("in"), b"new", tenant="acme", stream="aes-new")
    filled.settle()
    filled.carry_out("shred", stream_of("acme", "aes-new"))
    assert irrecoverable(filled, receipt) == (None, "next seal epoch")
    roll(filled)
    assert irrecoverable(filled, receipt) == (None, "keystore backup to be confirmed")
    confirm_and_destroy(filled)
    assert irrecoverable(filled, receipt)[1] is None


def test_a_destruction_that_was_cut_short_counts_from_when_it_was_done(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the KMS has on record of it may be from when it began."""
    roll(filled)

    def cut_short(slot: Any, key_version: str) -> None:
        _write_new(slot.record, orjson.dumps({"key_version": key_version, "destroyed_at": datetime.now(UTC).isoformat()}))
        raise OSError(28, "no space left")

    monkeypatch.setattr(_Slot, "destroy", cut_short)
    with pytest.raises(Unavailable):
        confirm_and_destroy(filled)
    monkeypatch.undo()
    begun = filled.value("SELECT clock_timestamp()")
    sealing(filled, lambda s: s.follow_up())
    (destroyed, since) = filled.sql("SELECT state, irrecoverable_at FROM seal_epochs ORDER BY created_at")[0]
    assert destroyed == "destroyed"
    assert since > begun
