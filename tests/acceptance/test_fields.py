"""Promise: where policy names fields, only these are encrypted, in the pipeline and in the library alike; a shred, a rotation and a view know no difference."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from sidecar import Event, NewEvent, open_library
from sidecar.core.model import Scope, ScopeKind
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.test_reencryption import worker
from tests.acceptance.world import World

FIELDS = ["/email", "/items/*/to"]
POLICIES = {
    "install": [
        {"class": "Aes", "fields": FIELDS},
        {"class": "ChaCha", "fields": FIELDS, "key_scope": "subject", "algorithm": "ChaCha20-Poly1305"},
        {"class": "PerClass", "fields": FIELDS, "key_scope": "class"},
    ]
}
RAW = b' {"email" : "jane@example.org", "plan":"pro", "n": 1.50, "items":[{"to":"Jane","q":1},{"q":2}]} '
"""Spaces, a number's spelling, an order of names: what a JSON library would lose."""


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world(policies=POLICIES)


def of_stream(name: str) -> Scope:
    return Scope(tenant="acme", kind=ScopeKind.STREAM, id=name)


def plaintext(world: World, words: tuple[str, ...] = ("jane@example.org", "Jane")) -> list[str]:
    """Which words stand anywhere in the database's tables."""
    text = ""
    for table in ("messages", "dead_letters", "streams", "audit_log", "receipts"):
        text += "\n".join(row[0] for row in world.sql(f"SELECT t::text FROM {table} t"))
    return [word for word in words if word.encode().hex() in text or word in text]


async def through_the_library(world: World, stream: str) -> list[Any]:
    """Append one event, and read all."""
    async with open_library(world.settings, writer="library-test") as library:
        await library.store.append_to_stream(stream, [NewEvent(type="T", data=RAW)], tenant="acme")
        return [event.value for event in (await library.store.read_stream(stream, tenant="acme")).events if isinstance(event, Event)]


def test_the_sidecar_seals_fields_and_its_views_and_the_library_give_them_back_to_the_byte(world: World) -> None:
    world.run()
    jane = ("ce_subjectid", b"jane")
    sent = {"aes-1": RAW, "aes-2": b'{"plan":"free"}', "chacha-1": RAW, "class-1": RAW}
    for stream, value in sent.items():
        world.event(world.topic("in"), value, stream=stream, headers=[jane])
    world.event(world.topic("in"), None, stream="aes-1")
    bad = (b"no JSON: jane@example.org", b'{"email":"jane@example.org","email":1}', b'{"items":"Jane"}', b'["jane@example.org"]', b"")
    for value in bad:
        world.event(world.topic("in"), value, stream="aes-1", headers=[jane])
    world.event(world.topic("in"), RAW, stream="aes-1")
    world.settle()
    assert sorted(world.dead_letters().values()) == ["bad_document"] * len(bad)
    rows = world.sql("SELECT * FROM messages ORDER BY stream_id, stream_position")
    assert [(row["stream_id"], row["stream_position"]) for row in rows] == [("aes-1", n) for n in (1, 2, 3)] + [(s, 1) for s in list(sent)[1:]]
    document = json.loads(rows[0]["data"])
    assert (document["email"][:4], document["items"][0]["to"][:4]) == ("ks1.", "ks1.")
    assert (document["plan"], document["n"], document["items"][1]) == ("pro", 1.5, {"q": 2})
    found = "SELECT stream_id FROM messages WHERE convert_from(data, 'UTF8')::jsonb @> '{\"plan\": \"pro\"}' ORDER BY 1"
    assert [row[0] for row in world.sql(found)] == ["aes-1", "aes-1", "chacha-1", "class-1"]
    assert plaintext(world) == []
    assert plaintext(world, ("pro", "1.50")) == ["pro", "1.50"], "control: what policy does not name is found"

    viewed = [(dict(m.headers())["ce_streamid"].decode(), m.value()) for m in world.records(world.topic("view"))]
    assert sorted(viewed, key=str) == sorted([*sent.items(), ("aes-1", None), ("aes-1", RAW)], key=str)
    assert {(e["stream_id"], e["value"]) for e in world.events("acme")} == {*sent.items(), ("aes-1", None)}
    assert asyncio.run(through_the_library(world, "aes-1")) == [RAW, None, RAW, RAW]
    assert [e["value"] for e in world.events("acme", stream="aes-1")] == [RAW, None, RAW, RAW], (
        "what the library wrote reads as what the sidecar wrote"
    )
    assert [e["stream_id"] for e in world.events("acme", subject="jane")] == ["chacha-1"]
    forms = {(json.loads(row["data"]).keys() == document.keys(), len(row["data"])) for row in rows if row["stream_id"] in ("aes-1",) and row["data"]}
    assert forms == {(True, len(rows[0]["data"]))}, "the same form, whoever wrote it"
    assert key_history_faults(world) == []


def test_a_shred_makes_the_event_unreadable_and_says_what_stays_in_clear(world: World) -> None:
    world.run()
    world.control()
    for stream in ("aes-1", "aes-2", "chacha-1"):
        for _ in range(2):
            world.event(world.topic("in"), RAW, stream=stream, headers=[("ce_subjectid", b"jane")])
    world.event(world.topic("in"), None, stream="aes-1")
    world.settle()
    preview = world.carry_out("shred", of_stream("aes-1"), options={"dry_run": True})
    assert preview["events"] == {"unreadable": 3, "plain_remaining": 0, "clear_remainders": 2, "exact": True}
    receipt = world.carry_out("shred", of_stream("aes-1"))
    assert receipt["events"] == {"unreadable": 3, "plain_remaining": 0, "clear_remainders": 2}
    assert {e["status"] for e in world.events("acme", stream="aes-1")} == {"erased"}
    person = world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane"))
    assert (person["events"]["unreadable"], person["events"]["clear_remainders"]) == (2, 2)
    assert world.value("SELECT count(*) FROM messages WHERE data IS NOT NULL AND stream_id <> 'aes-2'") == 4, "as the receipts say"

    cleared = world.carry_out("shred", of_stream("aes-2"), options={"include_plain": True})
    assert cleared["events"] == {"unreadable": 2, "plain_remaining": 0, "plain_deleted": 0, "remainders_deleted": 2}
    assert world.value("SELECT count(*) FROM messages WHERE data IS NOT NULL AND stream_id = 'aes-2'") == 0
    assert [(e["stream_id"], e["status"]) for e in world.events("acme", stream="aes-2")] == [("aes-2", "erased")] * 2
    assert plaintext(world) == []


def test_fields_are_sealed_anew_in_their_place_and_their_keys_are_needed_until_then(world: World) -> None:
    world.run()
    world.control()
    for stream in ("aes-1", "class-1"):
        for _ in range(3):
            world.event(world.topic("in"), RAW, stream=stream)
    world.settle()
    acme = Scope.of_tenant("acme")
    assert world.carry_out("rotate", acme)["status"] == "done"
    before = [bytes(row[0]) for row in world.sql("SELECT data FROM messages ORDER BY stream_id, stream_position")]
    clean = world.json("keys", "clean-up", "--older-than", "0d")
    assert [row for row in clean if row["outcome"] == "destroyed"] == [], "the versions are needed"
    worker(world)
    receipt = world.carry_out("reencrypt", acme, final=("done", "rejected", "failed"))
    assert receipt["events"] == {"resealed": 6, "left": 0, "chunks": 1}
    after = [bytes(row[0]) for row in world.sql("SELECT data FROM messages ORDER BY stream_id, stream_position")]
    assert [len(data) for data in after] == [len(data) for data in before]
    assert not set(after) & set(before)
    assert {e["value"] for e in world.events("acme")} == {RAW}
    assert key_history_faults(world) == []
    clean = world.json("keys", "clean-up", "--older-than", "0d")
    assert len([row for row in clean if row["outcome"] == "destroyed"]) == 2
    assert {e["value"] for e in world.events("acme")} == {RAW}
