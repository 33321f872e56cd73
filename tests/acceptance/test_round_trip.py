"""Promise: what is published comes back to the byte, from the store and in the view, under every suite and key scope."""

from collections import Counter, defaultdict
from collections.abc import Callable

from sidecar.core.envelope import parse_header
from sidecar.core.model import ScopeKind
from tests.acceptance.world import World

SUITES = {"aes": "AES-256-GCM", "chacha": "ChaCha20-Poly1305", "siv": "AES-256-GCM-SIV"}


def every_suite_and_scope() -> dict[str, object]:
    classes = [{"class": f"{suite}.{scope}", "when": {"stream": f"{suite}.{scope}.*"}} for suite in SUITES for scope in ("stream", "class", "tenant")]
    policies = [
        {"class": c["class"], "algorithm": SUITES[str(c["class"]).split(".")[0]], "key_scope": str(c["class"]).split(".")[1]} for c in classes
    ]
    return {"classes": [*classes, {"class": "CartData", "when": {"stream": "cart.*"}}], "policies": {"install": policies}}


def test_every_suite_and_scope_reads_as_published_from_the_store_and_in_the_view(make_world: Callable[..., World]) -> None:
    world = make_world(**every_suite_and_scope())
    names = [f"{suite}.{scope}" for suite in SUITES for scope in ("stream", "class", "tenant")] + ["cart"]
    sent: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for tenant in ("acme", "globex"):
        for name in names:
            for stream in (f"{name}.1", f"{name}.2"):
                for n in range(3):
                    value = f'{{"canary": "{tenant} {stream} {n}"}}'.encode()
                    sent[tenant, stream].append((world.event(world.topic("in"), value, tenant=tenant, stream=stream), value))
    world.run()
    world.settle()

    stored: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for tenant in ("acme", "globex"):
        rows = world.events(tenant)
        assert {row["status"] for row in rows} == {"ok"}
        for row in sorted(rows, key=lambda r: (r["stream_id"], r["position"])):
            stored[tenant, row["stream_id"]].append((row["message_id"], row["value"]))
            assert row["position"] == len(stored[tenant, row["stream_id"]])
    assert stored == sent

    viewed: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for message in world.records(world.topic("view")):
        headers = dict(message.headers())
        at = (headers["ce_tenantid"].decode(), headers["ce_streamid"].decode())
        viewed[at].append((headers["ce_id"].decode(), message.value()))
        assert message.key() == f"{at[0]}/{at[1]}/{len(viewed[at])}".encode()
    assert viewed == sent

    kinds: Counter[tuple[str, str, str]] = Counter()
    keys: dict[tuple[str, str, str], set[object]] = defaultdict(set)
    for row in world.sql("SELECT tenant_id, stream_id, data, data_encrypted FROM messages"):
        suite, scope = row["stream_id"].split(".")[:2]
        if suite == "cart":
            assert row["data_encrypted"] is None
            assert bytes(row["data"]) in {value for _, value in sent[row["tenant_id"], row["stream_id"]]}
            continue
        header = parse_header(bytes(row["data_encrypted"]))
        assert (header.suite.label, header.scope_kind) == (SUITES[suite], ScopeKind(scope))
        kinds[row["tenant_id"], suite, scope] += 1
        keys[row["tenant_id"], suite, scope].add(header.key_id)
    assert set(kinds.values()) == {6}
    assert len(kinds) == 18
    # one key per stream, one per class, and one per tenant, whatever the suite
    assert {at: len(of) for at, of in keys.items() if at[2] == "stream"} == {at: 2 for at in keys if at[2] == "stream"}
    assert {at: len(of) for at, of in keys.items() if at[2] == "class"} == {at: 1 for at in keys if at[2] == "class"}
    for tenant in ("acme", "globex"):
        assert len(set().union(*(of for at, of in keys.items() if at[0] == tenant and at[2] == "tenant"))) == 1
    every = [key for tenant in ("acme", "globex") for key in set().union(*(of for at, of in keys.items() if at[0] == tenant))]
    assert len(every) == len(set(every)) == 2 * (6 + 3 + 1)


def test_the_first_batch_of_a_new_stream_with_100_events_has_positions_1_to_100_under_one_key(world: World) -> None:
    ids = [world.event(world.topic("in"), b"%d" % n, stream="aes-new", partition=0) for n in range(100)]
    world.run()
    world.settle()
    rows = world.events("acme", stream="aes-new")
    assert [(row["position"], row["message_id"], row["value"]) for row in rows] == [(n + 1, ids[n], b"%d" % n) for n in range(100)]
    assert [m.value() for m in world.records(world.topic("view"))] == [b"%d" % n for n in range(100)]
    keys = world.json("keys", "list", "--tenant", "acme")
    assert [(k["scope_kind"], k["scope_id"], k["key_version"], k["state"], k["uses"]) for k in keys] == [("stream", "aes-new", 1, "active", 100)]
    created = world.sql("SELECT details FROM audit_log WHERE action = 'create_keys'")
    assert sum(len(row["details"]["keys"]) for row in created) == 1


def test_a_thousand_new_streams_in_one_batch_get_a_key_each_in_one_audit_row(world: World) -> None:
    for n in range(1000):
        world.event(world.topic("in"), b"first of %d" % n, stream=f"aes-{n}", partition=0)
    world.flush()  # all of it is there before the first fetch
    world.run()
    world.settle()
    rows = world.events("acme")
    assert {(row["stream_id"], row["position"], row["value"]) for row in rows} == {(f"aes-{n}", 1, b"first of %d" % n) for n in range(1000)}
    assert world.value("SELECT count(DISTINCT key_id) FROM encryption_keys WHERE is_active") == 1000
    assert world.value("SELECT count(*) FROM stream_key_history WHERE used_from_position = 1") == 1000
    named = [row["details"]["keys"] for row in world.sql("SELECT details FROM audit_log WHERE action = 'create_keys'")]
    assert sum(map(len, named)) == 1000
    assert max(map(len, named)) > 100  # batches, not a row per key
    page = world.json("keys", "list", "--tenant", "acme", "--limit", "600")
    rest = world.json("keys", "list", "--tenant", "acme", "--limit", "600", "--after", f"{page[-1]['key_id']}/{page[-1]['key_version']}")
    assert (len(page), len(rest), len({key["key_id"] for key in page + rest})) == (600, 400, 1000)
    assert all(entry["ok"] for entry in world.json("audit", "verify"))
