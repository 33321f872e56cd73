"""Promises: a policy change is live, audited and explained; views show what they are configured to show, in topics with the right settings."""

import json
from collections.abc import Callable
from typing import Any

from sidecar.kafka.admin import Admin
from tests.acceptance.world import PATIENCE_SECONDS, World


def test_a_policy_change_is_live_with_the_next_events_and_audited(world: World) -> None:
    world.run()
    for stream in ("cart-1", "aes-1"):
        world.event(world.topic("in"), b"before", stream=stream)
    world.settle()
    file = world.folder / "policies.yaml"
    file.write_text(
        json.dumps(
            [
                {"class": "CartData", "tenant": "acme", "encrypt": True, "algorithm": "ChaCha20-Poly1305", "key_scope": "class"},
                {"class": "Aes", "encrypt": False},
            ]
        )
    )
    changed = world.json("policy", "apply", str(file))
    assert {(row["tenant_id"], row["stream_type_class"], row["encryption_required"]) for row in changed} == {
        ("acme", "CartData", True),
        ("*", "Aes", False),
    }
    assert world.json("policy", "apply", str(file)) == []  # again: nothing changes
    for tenant, stream in (("acme", "cart-1"), ("acme", "cart-2"), ("globex", "cart-1"), ("acme", "aes-1"), ("acme", "aes-2")):
        world.event(world.topic("in"), b"after", tenant=tenant, stream=stream)
    world.settle()
    sealed = {
        (r["tenant_id"], r["stream_id"], r["stream_position"]): r["sealed"]
        for r in world.sql("SELECT *, data_encrypted IS NOT NULL AS sealed FROM messages")
    }
    assert sealed == {
        ("acme", "cart-1", 1): False,
        ("acme", "cart-1", 2): True,  # encrypted from here on
        ("acme", "cart-2", 1): True,
        ("globex", "cart-1", 1): False,  # * is not acme
        ("acme", "aes-1", 1): True,
        ("acme", "aes-1", 2): True,  # once encrypted, encrypted for good
        ("acme", "aes-2", 1): False,
    }
    rows = world.events("acme") + world.events("globex")
    assert {row["status"] for row in rows} == {"ok"}
    assert world.value("SELECT encrypted_from_position FROM streams WHERE (tenant_id, stream_id) = ('acme', 'cart-1')") == 2
    audited = [
        row["details"]["policies"] for row in world.sql("SELECT details FROM audit_log WHERE action = 'change_policies' ORDER BY at DESC LIMIT 1")
    ]
    assert {policy["class"] for policy in audited[0]} == {"CartData", "Aes"}
    assert all(entry["ok"] for entry in world.json("audit", "verify"))


def test_the_four_default_policies_are_there(world: World) -> None:
    found = {
        r["stream_type_class"]: (r["tenant_id"], r["encryption_required"], r["key_rotation_interval_days"]) for r in world.json("policy", "list")
    }
    assert found == {
        "UserPersonalData": ("*", True, 90),
        "AuditLog": ("*", True, 365),
        "FormSubmissions": ("*", True, 180),
        "CartData": ("*", False, None),
    }


def test_explain_says_why(make_world: Callable[..., World]) -> None:
    world = make_world(
        policies={"unmatched": "refuse", "install": [{"class": "Aes", "key_scope": "class"}, {"class": "Aes", "tenant": "acme", "encrypt": False}]}
    )
    world.run()
    world.settle()

    def explain(stream: str, tenant: str, **more: Any) -> dict[str, Any]:
        headers = {"ce_tenantid": tenant, "ce_streamid": stream, "ce_type": "T", "ce_id": "i"}
        file = world.folder / "event.json"
        file.write_text(json.dumps({"topic": world.topic("in"), "headers": headers, "value": {}} | more))
        found: dict[str, Any] = world.json("policy", "explain", str(file))
        return found

    other = explain("aes-1", "globex")
    assert (other["class"], other["outcome"], other["algorithm"], other["key_scope"]) == ("Aes", "encrypted", "AES-256-GCM", "class")
    assert explain("aes-1", "acme")["outcome"] == "plain"  # the tenant's own comes before *
    assert explain("zzz", "acme")["outcome"] == "refused"
    assert explain("aes-1", "../")["outcome"] == "dead letter"
    assert explain("aes-1", "acme", topic="elsewhere")["outcome"] == "not read"


def test_unmatched_classes_are_refused_where_policy_says_so_and_no_key_is_made(make_world: Callable[..., World]) -> None:
    world = make_world(policies={"unmatched": "refuse"})
    world.event(world.topic("in"), b"v", stream="nobody-knows")
    world.event(world.topic("in"), b"v", stream="cart-1")
    world.run()
    world.settle()
    assert [(r["tenant_id"], r["reason"]) for r in world.sql("SELECT * FROM refusals")] == [("acme", "policy_refuse")]
    assert world.value("SELECT count(*) FROM encryption_keys") == 0
    assert [row["stream_id"] for row in world.events("acme")] == ["cart-1"]


def test_views_match_by_topic_class_and_tenant_and_key_by_their_mode(make_world: Callable[..., World], unique: Callable[[str], str]) -> None:
    name, second = unique("v"), unique("second")
    views = [
        {"name": "all", "topic": f"{name}.all", "partitions": 2},
        {"name": "class", "topic": f"{name}.class", "partitions": 1, "match": {"classes": ["Aes", "C*"]}, "key": "stream"},
        {"name": "tenant", "topic": f"{name}.tenant", "partitions": 1, "match": {"tenants": ["ac*"]}, "key": "source"},
        {"name": "topic", "topic": f"{name}.topic", "partitions": 1, "match": {"topics": [second]}},
        {"name": "none", "topic": f"{name}.none", "partitions": 1, "match": {"classes": ["aes"]}},
    ]
    world = make_world(views=views, extra_sources=[{"topic": second}])
    events = [("acme", "aes-1"), ("acme", "siv-1"), ("globex", "cart-1"), ("globex", "siv-1")]
    for tenant, stream in events:
        world.event(world.topic("in"), f"{tenant} {stream}".encode(), tenant=tenant, stream=stream, key=b"own key")
    world.event(second, b"second", tenant="globex", stream="other", key=None)
    world.run()
    world.settle()

    def shown(view: str) -> set[tuple[bytes | None, bytes]]:
        return {(m.key(), m.value()) for m in world.records(f"{name}.{view}")}

    every = {(f"{t}/{s}/1".encode(), f"{t} {s}".encode()) for t, s in events} | {(b"globex/other/1", b"second")}
    assert shown("all") == every
    assert shown("class") == {(b"acme/aes-1", b"acme aes-1"), (b"globex/cart-1", b"globex cart-1")}
    assert shown("tenant") == {(b"own key", b"acme aes-1"), (b"own key", b"acme siv-1")}
    assert shown("topic") == {(b"globex/other/1", b"second")}
    assert shown("none") == set()


def test_topics_plan_and_apply_create_views_with_what_erasure_needs_and_change_nothing_that_stands(
    make_world: Callable[..., World], unique: Callable[[str], str]
) -> None:
    name = unique("v")
    world = make_world(views=[{"name": "v", "topic": name, "partitions": 5, "retention": "3d", "erase_within": "30m"}])
    settings = world.settings
    topics = {name, settings.control.topic, settings.control.receipts, settings.control.ledger, settings.dead_letters.topic}
    topics |= {settings.audit.topic, settings.jobs.topic}
    assert {(row["topic"], row["action"]) for row in world.json("topics", "plan")} == {(topic, "create") for topic in topics}
    assert Admin(world.settings).describe(topics) == {}  # plan does nothing
    assert {(row["topic"], row["action"]) for row in world.json("topics", "apply")} == {(topic, "created") for topic in topics}
    assert {row["action"] for row in world.json("topics", "apply")} == {"none"}
    admin = Admin(world.settings)
    assert admin.describe([name])[name].partitions == 5
    config = admin.topic_config(name)
    assert set(config["cleanup.policy"].split(",")) == {"compact", "delete"}
    assert config["retention.ms"] == str(3 * 86_400_000)
    assert config["max.compaction.lag.ms"] == config["segment.ms"] == str(30 * 60_000)
    assert admin.topic_config(world.settings.control.receipts)["cleanup.policy"] == "delete"
    assert admin.topic_config(world.settings.control.receipts)["retention.ms"] == "-1"

    document = json.loads(world.config.read_text())
    document["views"][0] |= {"retention": "9d", "partitions": 6}
    world.config.write_text(json.dumps(document))
    (row,) = [row for row in world.json("topics", "apply") if row["topic"] == name]
    assert (row["action"], row["differs"]) == ("differs", {"retention.ms": str(3 * 86_400_000), "partitions": 5})
    assert admin.topic_config(name)["retention.ms"] == str(3 * 86_400_000)


def test_a_view_whose_topic_has_other_partitions_than_it_began_with_is_refused_at_start(world: World) -> None:
    world.run().stop()
    world.sql("UPDATE views SET partitions = 9")
    again = world.run(wait=False)
    assert again.process.wait(PATIENCE_SECONDS) == 2
    assert "view all began with 9 partitions, its topic has 3 now" in again.text()
