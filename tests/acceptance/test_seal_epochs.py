"""Seal epochs: rolled from the command line and by the timer, with a backup to confirm, and with tenants that get a new KEK."""

import json
from collections.abc import Callable

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.testing import control_plane as kit
from tests.acceptance.rolls import confirm_and_destroy, roll, states, statuses, wrapped_by
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
