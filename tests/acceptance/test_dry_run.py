"""Promise: a dry run says what a shred would find and what would stand in its way, and changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.test_e09_a_hold_is_never_overrun import control_plane
from tests.acceptance.world import World

ACME = Scope.of_tenant("acme")
CLASS = Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes")
OF_THE_COMMAND = {"commands", "control_cursors", "receipts", "audit_log", "audit_checkpoints", "instances"}


@pytest.fixture
def filled(world: World) -> World:
    world.both()
    for n in range(4):
        for stream in ("aes-1", "aes-2", "class-1", "class-2", "cart-1"):
            world.event(world.topic("in"), b"v%d" % n, tenant="acme", stream=stream)
    world.event(world.topic("in"), b"v", tenant="globex", stream="aes-1")
    world.settle()
    return world


def content(world: World) -> dict[str, Any]:
    """Every row of every table but what a command itself leaves, by a digest: the checker."""
    tables = [
        r["relname"] for r in world.sql("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1")
    ]
    digest = "SELECT coalesce(md5(string_agg(md5(t::text), '' ORDER BY t::text)), '') FROM {} t"
    return {table: world.value(digest.format(table)) for table in tables if table not in OF_THE_COMMAND}


def dry(world: World, scope: Scope, **options: Any) -> dict[str, Any]:
    receipt = world.carry_out("shred", scope, options={"dry_run": True} | options)
    assert (receipt["status"], receipt["dry_run"]) == ("done", True)
    return receipt


def test_a_dry_run_says_what_a_shred_then_finds_and_changes_nothing(filled: World) -> None:
    before, ends = content(filled), filled.ends(filled.topic("view"))
    of_tenant, of_class = dry(filled, ACME), dry(filled, CLASS)
    dry(filled, ACME, include_plain=True)
    assert content(filled) == before
    assert filled.ends(filled.topic("view")) == ends
    assert of_tenant["keys"] == {"count": 3, "tenant_keys": 1}
    assert of_tenant["events"] == {"unreadable": 16, "plain_remaining": 4, "exact": True}
    assert of_tenant["streams"] == 5
    assert [view["topic"] for view in of_tenant["views"]] == [filled.topic("view")]
    assert (of_tenant["holds"], of_tenant["shared"], of_tenant["refused_by"]) == ([], None, [])
    assert (of_class["keys"]["count"], of_class["streams"], of_class["events"]["unreadable"]) == (2, 2, 8)
    shred = filled.carry_out("shred", CLASS)
    assert (shred["keys"]["count"], shred["events"]["unreadable"]) == (2, 8)
    assert content(filled) != before  # control: the checker sees a shred


def test_a_dry_run_names_the_holds_in_force_and_the_sharers_of_a_key(filled: World) -> None:
    hold = filled.carry_out("hold", ACME, reason="a lawsuit")
    receipt = dry(filled, Scope(tenant="acme", kind=ScopeKind.STREAM, id="class-1"))
    assert receipt["holds"] == [{"hold_id": hold["command_id"], "reason": "a lawsuit"}]
    assert "class-2" in receipt["shared"]
    assert receipt["refused_by"] == ["legal_hold", "shared_key"]
    assert dry(filled, ACME)["refused_by"] == ["legal_hold"]


def test_a_dry_run_of_an_unknown_tenant_is_rejected_and_of_an_unknown_stream_finds_nothing(filled: World) -> None:
    unknown = filled.carry_out("shred", Scope.of_tenant("nobody"), options={"dry_run": True})
    assert (unknown["status"], unknown["error"]["code"]) == ("rejected", "unknown_tenant")
    receipt = dry(filled, Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-none"))
    assert (receipt["keys"]["count"], receipt["streams"], receipt["events"]["unreadable"]) == (0, 0, 0)
    assert filled.sql("SELECT 1 FROM erased_scopes") == []


async def test_a_dry_run_names_what_refuses_a_grace(local_stack: LocalStack, database: str, tmp_path: Path, unique: Callable[[str], str]) -> None:
    async with control_plane(local_stack, database, tmp_path, unique("d")) as plane:
        await kit.seed(plane.database, "acme", {"aes-1": "Aes"})
        assert (await plane.carry_out("shred", CLASS, options={"grace": "1h"}))["status"] == "inaccessible"
        for options in ({}, {"grace": "1h"}, {"grace": "1h", "include_plain": True}):
            said = await plane.carry_out("shred", CLASS, options={"dry_run": True} | options)
            refused = await plane.carry_out("shred", CLASS, options=options) if options else None
            assert said["refused_by"][:1] == ([refused["error"]["code"]] if refused else [])
