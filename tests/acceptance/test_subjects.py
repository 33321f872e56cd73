"""Promise: where policy seals by person, one command makes all that a person's events hold unreadable, in every stream and class, and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sidecar.core.envelope import parse_header
from sidecar.core.errors import BrokerUnavailable
from sidecar.core.model import Scope, ScopeKind
from sidecar.pipeline import Pipeline
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.test_shred_and_rotate_under_traffic import in_process
from tests.acceptance.world import World, until

POLICIES = {
    "install": [
        {"class": "Aes", "key_scope": "subject"},
        {"class": "ChaCha", "key_scope": "subject", "subject": "json:/user/id", "algorithm": "ChaCha20-Poly1305"},
    ]
}


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world(policies=POLICIES)


def person(name: str, tenant: str = "acme") -> Scope:
    return Scope(tenant=tenant, kind=ScopeKind.SUBJECT, id=name)


def of(world: World, who: str | None, stream: str, tenant: str = "acme", **more: Any) -> None:
    """An event about somebody, by header in the classes of AES, in the value where the policy points into it."""
    headers = () if who is None or stream.startswith("chacha") else (("ce_subjectid", who.encode()),)
    world.event(world.topic("in"), json.dumps({"user": {"id": who}}).encode(), tenant=tenant, stream=stream, headers=headers, **more)


def statuses(world: World, tenant: str = "acme", **which: Any) -> list[tuple[str, int, str]]:
    return sorted((row["stream_id"], row["position"], row["status"]) for row in world.events(tenant, **which))


def test_one_command_shreds_a_person_across_streams_and_classes(world: World) -> None:
    world.both()
    for who, stream, tenant in (
        ("jane", "aes-1", "acme"), ("john", "aes-1", "acme"), ("jane", "aes-2", "acme"), ("jane", "chacha-1", "acme"), ("john", "chacha-1", "acme"),
        ("jane", "aes-1", "acme"), ("jane", "siv-1", "acme"), ("jane", "cart-1", "acme"), ("jane", "aes-1", "globex"),
    ):  # fmt: skip
        of(world, who, stream, tenant)
    world.settle()
    keys = world.json("keys", "list", "--tenant", "acme")
    assert sorted((k["scope_kind"], k["scope_id"]) for k in keys) == [("stream", "siv-1"), ("subject", "jane"), ("subject", "john")]
    assert {parse_header(bytes(row[0])).scope_kind for row in world.sql("SELECT data_encrypted FROM messages WHERE stream_id LIKE 'aes%'")} == {
        ScopeKind.SUBJECT
    }
    assert {row["stream_id"] for row in world.events("acme", subject="jane")} == {"aes-1", "aes-2", "chacha-1"}

    preview = world.carry_out("shred", person("jane"), options={"dry_run": True})
    assert (preview["status"], preview["events"]["unreadable"], preview["keys"]["count"]) == ("done", 4, 1)
    receipt = world.carry_out("shred", person("jane"))
    assert (receipt["status"], receipt["keys"]["count"], receipt["events"]["unreadable"]) == ("inaccessible", 1, 4)
    assert receipt["events"]["plain_remaining"] is None
    assert "plain events do not say whose they are" in receipt["events"]["note"]
    assert statuses(world, subject="jane") == [("aes-1", 1, "erased"), ("aes-1", 3, "erased"), ("aes-2", 1, "erased"), ("chacha-1", 1, "erased")]
    assert [s for s in statuses(world) if s[2] != "erased"] == [("aes-1", 2, "ok"), ("cart-1", 1, "ok"), ("chacha-1", 2, "ok"), ("siv-1", 1, "ok")]
    assert statuses(world, "globex") == [("aes-1", 1, "ok")], "a tenant's person is not another tenant's"

    for who, stream in (("jane", "aes-1"), ("jane", "aes-new"), ("jane", "chacha-1"), ("john", "aes-1"), ("jane", "siv-1")):
        of(world, who, stream)
    world.settle()
    assert [(row["tenant_id"], row["reason"]) for row in world.sql("SELECT * FROM refusals")] == [("acme", "scope_erased")] * 3
    assert world.value("SELECT count(*) FROM encryption_keys WHERE scope_id = 'jane' AND tenant_id = 'acme'") == 1
    assert key_history_faults(world) == []
    trail = "".join(str(dict(row)) for row in world.sql("SELECT * FROM audit_log"))
    assert "jane" not in trail
    assert "jane" not in "".join(plane.text() for plane in world.planes)


def test_a_person_is_fenced_before_the_first_event(world: World) -> None:
    world.both()
    of(world, "john", "aes-1")
    world.settle()
    receipt = world.carry_out("shred", person("jane"))
    assert (receipt["status"], receipt["keys"]["count"], receipt["note"]) == ("inaccessible", 0, "nothing_found, fenced")
    of(world, "jane", "aes-1")
    of(world, "john", "aes-1")
    world.settle()
    assert [row["reason"] for row in world.sql("SELECT * FROM refusals")] == ["scope_erased"]
    assert statuses(world) == [("aes-1", 1, "ok"), ("aes-1", 2, "ok")]


def test_a_record_that_names_nobody_is_a_dead_letter_and_never_sealed_under_another_key(world: World) -> None:
    """Nor under the tenant's: its value is not kept. The topic goes on."""
    world.run()
    of(world, None, "aes-1")
    of(world, "", "aes-1")
    of(world, "a\x07b", "aes-1")
    of(world, None, "chacha-1")
    world.event(world.topic("in"), None, stream="chacha-1")
    of(world, "jane", "aes-1")
    world.settle()
    assert statuses(world) == [("aes-1", 1, "ok")]
    assert sorted(world.dead_letters().values()) == ["malformed"] * 5
    assert world.value("SELECT count(*) FROM dead_letters WHERE value_encrypted IS NULL AND value_sha256 IS NOT NULL") == 5
    assert world.value("SELECT count(*) FROM encryption_keys WHERE scope_kind = 'stream'") == 0


class FirstViewFails(Pipeline):
    """Stores its first batch and loses the broker before the view: the records come from the store then."""

    failed = False

    async def _project(self, work: Any) -> None:
        if work.rows.count and not self.failed:
            self.failed = True
            raise BrokerUnavailable("a test")
        await super()._project(work)


@pytest.mark.parametrize("pipeline", [Pipeline, FirstViewFails], ids=["from the source", "from the store"])
def test_the_person_stands_on_the_view_record_as_policy_found_it(world: World, pipeline: type[Pipeline]) -> None:
    with in_process(world, pipeline):
        world.event(world.topic("in"), b'{"user": {"id": "jane"}}', stream="chacha-1", headers=(("ce_subjectid", b"mallory"),))
        of(world, "john", "aes-1")
        world.event(world.topic("in"), b"{}", stream="siv-1", headers=(("ce_subjectid", b"the application's own"),))
        world.settle()
    shown = []
    for message in world.records(world.topic("view")):
        headers = message.headers()
        shown.append((dict(headers)["ce_streamid"], [value for name, value in headers if name == "ce_subjectid"]))
    assert sorted(shown) == [(b"aes-1", [b"john"]), (b"chacha-1", [b"jane"]), (b"siv-1", [b"the application's own"])]


def test_include_plain_of_a_person_is_refused_in_words(world: World) -> None:
    world.control()
    world.run()
    of(world, "jane", "aes-1")
    world.settle()
    receipt = world.carry_out("shred", person("jane"), options={"include_plain": True})
    assert (receipt["status"], receipt["error"]["code"]) == ("rejected", "include_plain_unsupported")
    assert statuses(world) == [("aes-1", 1, "ok")]


def test_a_stream_or_class_of_persons_events_is_not_shredded_and_the_persons_are_named(world: World) -> None:
    world.control()
    world.run()
    for who, stream in (("jane", "aes-1"), ("jane", "aes-2"), ("john", "aes-1")):
        of(world, who, stream)
    world.settle()
    for kind, name in ((ScopeKind.STREAM, "aes-1"), (ScopeKind.CLASS, "Aes")):
        receipt = world.carry_out("shred", Scope(tenant="acme", kind=kind, id=name))
        assert (receipt["status"], receipt["error"]["code"]) == ("rejected", "shared_key")
        assert "subject jane, subject john" in receipt["error"]["message"]
    assert {s[2] for s in statuses(world)} == {"ok"}


@pytest.mark.parametrize(
    ("scope", "rotated"),
    [
        (person("jane"), {"jane"}),
        (Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-2"), {"jane"}),
        (Scope(tenant="acme", kind=ScopeKind.CLASS, id="Aes"), {"jane", "john"}),
        (Scope.of_tenant("acme"), {"jane", "john", "mary"}),
    ],
    ids=["person", "stream", "class", "tenant"],
)
def test_a_rotation_retires_the_persons_keys_of_its_scope_and_a_shred_gets_all_versions(world: World, scope: Scope, rotated: set[str]) -> None:
    world.both()

    def everybody() -> None:
        for who, stream in (("jane", "aes-1"), ("jane", "aes-2"), ("john", "aes-1"), ("mary", "chacha-1")):
            of(world, who, stream)
        world.settle()

    everybody()
    assert world.carry_out("rotate", scope)["keys"]["count"] == len(rotated)
    everybody()
    versions = {(row[0], row[1]) for row in world.sql("SELECT scope_id, max(key_version) FROM encryption_keys GROUP BY 1")}
    assert versions == {(who, 2 if who in rotated else 1) for who in ("jane", "john", "mary")}
    assert key_history_faults(world) == []
    receipt = world.carry_out("shred", person("jane"))
    assert (receipt["keys"]["count"], receipt["events"]["unreadable"]) == (2, 4)
    assert {s[2] for s in statuses(world, subject="jane")} == {"erased"}
    assert {s[2] for s in statuses(world, subject="john")} == {"ok"}


def test_policy_list_and_explain_say_whose_key(world: World) -> None:
    world.run()
    world.settle()
    listed = {p["stream_type_class"]: (p["key_scope"], p["subject"]) for p in world.json("policy", "list")}
    assert (listed["Aes"], listed["ChaCha"]) == (("subject", "header:ce_subjectid"), ("subject", "json:/user/id"))
    file = world.folder / "event.json"
    headers = {"ce_tenantid": "acme", "ce_streamid": "chacha-1", "ce_type": "T", "ce_id": "i"}
    document = {"topic": world.topic("in"), "headers": headers, "value": {"user": {"id": "jane"}}}
    file.write_text(json.dumps(document))
    found = world.json("policy", "explain", str(file))
    assert (found["outcome"], found["key_scope"], found["subject"]) == ("encrypted", "subject", "jane")
    file.write_text(json.dumps(document | {"value": {}}))
    found = world.json("policy", "explain", str(file))
    assert found["outcome"] == "dead letter"
    assert "names no person" in found["because"][-1]


def test_published_from_the_command_line_with_a_person_and_shredded_from_it(world: World) -> None:
    world.control()
    world.run()
    words = ("publish", world.topic("in"), "--tenant", "acme", "--stream", "aes-1", "--type", "T")
    for who in ("jane", "john"):
        assert world.cli(*words, "--subject", who, stdin=b"{}").returncode == 0
    world.sent = {}
    until(lambda: len(world.events("acme")) == 2, "both events")
    assert [row["status"] for row in world.json("events", "list", "--tenant", "acme", "--subject", "jane")] == ["ok"]
    receipt = world.json("shred", "--tenant", "acme", "--subject", "jane", "--reason", "Art. 17", "--yes", "--wait", "100")
    assert (receipt["status"], receipt["scope"]) == ("inaccessible", {"tenant": "acme", "kind": "subject", "id": "jane"})
    assert [row["status"] for row in world.json("events", "list", "--tenant", "acme")] == ["erased", "ok"]
    assert world.cli("shred", "--tenant", "acme", "--subject", "jane", "--stream", "aes-1", "--reason", "r", "--yes").returncode == 2
