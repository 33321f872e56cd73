"""Promise: events are found by an encrypted field's value; of a shredded scope nothing is found from the receipt on, and its rows are removed."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from sidecar import NewEvent, open_library
from sidecar.blind_index import BlindIndex
from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.ledger import LedgerTopic
from sidecar.keys import KeyManagement
from sidecar.kms import open_for
from sidecar.ledger import LedgerGate
from sidecar.postgres.connection import open_pool
from tests.acceptance.test_reencryption import worker
from tests.acceptance.world import World, blocking, until

POLICIES = {
    "install": [
        {"class": "Aes", "fields": ["/email"], "blind_index": ["/email"]},
        {"class": "ChaCha", "fields": ["/email"], "blind_index": ["/email"], "key_scope": "subject", "algorithm": "ChaCha20-Poly1305"},
        {"class": "PerClass", "fields": ["/email"], "blind_index": ["/email"], "key_scope": "class"},
    ]
}
JANE = "jane@example.org"
FINAL = ("done", "rejected", "failed")
EVERYWHERE = [("aes-1", 1), ("aes-1", 2), ("aes-2", 1), ("chacha-1", 1), ("class-1", 1)]


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world(policies=POLICIES)


def send(world: World, stream: str, email: str = JANE, who: str = "jane", tenant: str = "acme") -> None:
    world.event(world.topic("in"), json.dumps({"email": email}).encode(), stream=stream, tenant=tenant, headers=[("ce_subjectid", who.encode())])


def found(world: World, value: str = JANE, tenant: str = "acme") -> list[tuple[str, int]]:
    """What `sidecar events find` says, without the cost of a process."""

    async def find() -> list[tuple[str, int]]:
        pool = await open_pool(world.settings.postgres.for_role("reader"), application_name="a test")
        try:
            gate = LedgerGate(LedgerTopic(world.settings), world.settings.deployment)
            index = BlindIndex(pool, KeyManagement(open_for(world.settings.kms, "reader")), gate)
            return [(event.stream, event.position) for event in await index.find_by_field(tenant, "/email", value)]
        finally:
            await pool.close()

    return blocking(find)


def rows(world: World, tenant: str = "acme") -> list[tuple[str, int]]:
    return [tuple(row) for row in world.sql("SELECT stream_id, stream_position FROM blind_index WHERE tenant_id = $1 ORDER BY 1, 2", tenant)]


def shred(world: World, scope: Scope) -> dict[str, Any]:
    receipt = world.carry_out("shred", scope)
    assert receipt["status"] == "inaccessible"
    planned = {entry["where"]: entry["state"] for entry in receipt["residue"]}
    assert planned["blind index"] == "pending", "`complete` waits for it"
    return receipt


def removed(world: World, receipt: dict[str, Any]) -> bool:
    query = "SELECT details FROM residue WHERE command_id = $1::text::uuid AND place = 'blind index' AND state = 'done'"
    return bool(world.sql(query, receipt["command_id"]))


def test_what_was_shredded_is_not_found_from_the_receipt_on_and_its_rows_are_removed(world: World) -> None:
    world.run()
    world.control()
    for stream, _ in EVERYWHERE:
        send(world, stream)
    for stream in ("aes-1", "chacha-1"):
        send(world, stream, email="joan@example.org", who="joan")
    send(world, "aes-1", tenant="globex")
    world.settle()
    said = world.json("events", "find", "--tenant", "acme", "--field", "/email", "--value", JANE)
    assert [(row["stream_id"], row["position"]) for row in said] == found(world) == EVERYWHERE
    assert found(world, "joan@example.org") == [("aes-1", 3), ("chacha-1", 2)]
    assert world.cli("-o", "json", "events", "find", "--tenant", "acme", "--field", "/plan", "--value", "x").returncode == 2

    left = set(EVERYWHERE) | {("aes-1", 3), ("chacha-1", 2)}
    for kind, name, gone in (
        (ScopeKind.SUBJECT, "jane", {("chacha-1", 1)}),
        (ScopeKind.STREAM, "aes-1", {("aes-1", 1), ("aes-1", 2), ("aes-1", 3)}),
        (ScopeKind.CLASS, "PerClass", {("class-1", 1)}),
    ):
        shred(world, Scope(tenant="acme", kind=kind, id=name))
        left -= gone
        assert found(world) == sorted(left & set(EVERYWHERE))
        until(lambda left=left: len(rows(world)) <= len(left), f"the rows of {kind} {name} to be removed")
        assert rows(world) == sorted(left)
    receipt = shred(world, Scope.of_tenant("acme"))
    assert found(world) == []
    until(lambda: removed(world, receipt), "the tenant's rows to be removed")
    assert (rows(world), rows(world, "globex"), found(world, tenant="globex")) == ([], [("aes-1", 1)], [("aes-1", 1)])


def test_events_that_are_converted_and_sealed_anew_are_found_too(world: World) -> None:
    """Plain ones of a class that policy encrypts by now, and others from before the field was indexed."""

    async def fill() -> None:
        async with open_library(world.settings, writer="library-test") as library:
            changes = {"encrypt": False, "fields": [], "blind_index": []}
            await library.policies.update_policy("*/Aes", changes, actor="ann", reason="a test")
            await library.store.append_to_stream("aes-1", [NewEvent(type="T", data={"email": JANE, "plan": "pro"})], tenant="acme")
            await library.store.append_to_stream("aes-1", [NewEvent(type="T", data=b"no JSON"), NewEvent(type="T", data=None)], tenant="acme")
            await library.policies.update_policy("*/Aes", {"encrypt": True, "fields": ["/email"]}, actor="ann", reason="a test")
            await library.store.append_to_stream("aes-2", [NewEvent(type="T", data={"email": JANE})], tenant="acme")
            changes = {"encrypt": True, "fields": ["/email"], "blind_index": ["/email"]}
            await library.policies.update_policy("*/Aes", changes, actor="ann", reason="a test")

    world.run().stop()
    asyncio.run(fill())
    before = [(event["position"], event["value"]) for event in world.events("acme")]
    world.control()
    worker(world)
    said = world.json("streams", "encrypt", "--tenant", "acme", "--class", "Aes", "--reason", "a test", "--wait", "100")
    assert (said["status"], said["events"]["resealed"]) == ("done", 3)
    forms = [
        tuple(row)
        for row in world.sql("SELECT data IS NOT NULL, data_encrypted IS NOT NULL FROM messages WHERE stream_id = 'aes-1' ORDER BY stream_position")
    ]
    assert forms == [(True, True), (False, True), (False, True)], "what is no document is sealed whole"
    assert JANE.encode() not in world.value("SELECT data FROM messages WHERE stream_id = 'aes-1' AND stream_position = 1")
    assert [(event["position"], event["value"]) for event in world.events("acme")] == before
    assert found(world) == [("aes-1", 1)]
    assert world.carry_out("rotate", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-2"))["status"] == "done"
    for options in ({}, {"into": "aes-3"}):
        said = world.carry_out("reencrypt", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-2"), final=FINAL, options=options)
        assert (said["status"], said["events"]["resealed"]) == ("done", 1)
    assert found(world) == [("aes-1", 1), ("aes-2", 1), ("aes-3", 1)]
    assert {event["value"] for event in world.events("acme", stream="aes-3")} == {b'{"email":"jane@example.org"}'}
