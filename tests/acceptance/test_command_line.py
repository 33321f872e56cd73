"""Promise: the command line speaks as `contract/cli.md` says: JSON alone on stdout, shapes and exit codes as written."""

import base64
import json
import subprocess
import sys
from uuid import UUID

from tests.acceptance.world import World

RECEIPT = {
    "receipt_id", "command_id", "op", "scope", "status", "error", "accepted_at", "inaccessible_at", "irrecoverable_at", "irrecoverable_reason",
    "keys", "events", "barrier", "instances", "residue", "audit",
}  # fmt: skip


def test_publish_store_view_rotate_shred_and_every_list_in_the_contracts_shapes(world: World) -> None:
    world.both()
    topic = world.topic("in")

    # publish, from standard input and from a file; subscribe
    said = world.cli("publish", topic, "-", "--tenant", "acme", "--stream", "aes-1", "--type", "Made", stdin=b"\0 any bytes")
    assert said.returncode == 0
    (published,) = [json.loads(line) for line in said.stdout.splitlines()]
    assert published["topic"] == topic
    file = world.folder / "event.json"
    file.write_bytes(b'{"a": 1}')
    for tenant, stream in (("acme", "aes-1"), ("acme", "cart-1"), ("globex", "aes-1")):
        assert world.cli("publish", topic, "--tenant", tenant, "--stream", stream, "--type", "Made", "--", str(file)).returncode == 0
    said = world.cli("subscribe", world.topic("view"), "--from-beginning", "--max", "4")
    shown = [json.loads(line) for line in said.stdout.splitlines()]
    assert said.returncode == 0
    assert sorted(record["value"] for record in shown) == ["\0 any bytes", '{"a": 1}', '{"a": 1}', '{"a": 1}']

    # events
    rows = world.json("events", "list", "--tenant", "acme", "--stream", "aes-1")
    contract = {"tenant_id", "stream_id", "position", "message_id", "type", "status", "value_base64", "error"}
    assert all(contract <= row.keys() for row in rows)
    assert [(r["position"], r["status"], base64.b64decode(r["value_base64"]), r["error"]) for r in rows] == [
        (1, "ok", b"\0 any bytes", None), (2, "ok", b'{"a": 1}', None),
    ]  # fmt: skip
    assert rows[0]["message_id"] == published["message_id"]
    assert [r["position"] for r in world.json("events", "list", "--tenant", "acme", "--stream", "aes-1", "--from", "2", "--limit", "1")] == [2]
    assert [r["stream_id"] for r in world.json("events", "list", "--tenant", "acme", "--class", "CartData")] == ["cart-1"]
    assert world.json("events", "list", "--tenant", "nobody") == []
    assert [r["position"] for r in world.json("events", "get", "--tenant", "acme", "--stream", "aes-1", "2")] == [2]
    assert world.cli("events", "get", "--tenant", "acme", "--stream", "aes-1", "3").returncode == 1

    # keys, and a rotation that is waited for
    (key,) = world.json("keys", "list", "--tenant", "acme")
    assert key.keys() == {"key_id", "key_version", "scope_kind", "scope_id", "state", "created_at", "uses"}
    assert (key["key_version"], key["scope_kind"], key["scope_id"], key["state"], key["uses"]) == (1, "stream", "aes-1", "active", 2)
    receipt = world.json("rotate", "--tenant", "acme", "--stream", "aes-1", "--reason", "a test", "--wait", "100")
    assert receipt.keys() >= RECEIPT
    assert (receipt["status"], receipt["scope"]) == ("done", {"tenant": "acme", "kind": "stream", "id": "aes-1"})

    # a shred: not without consent, then with
    assert world.cli("shred", "--tenant", "acme", "--reason", "a test").returncode == 2
    receipt = world.json("shred", "--tenant", "acme", "--reason", "a test", "--yes", "--wait", "100")
    assert receipt.keys() >= RECEIPT
    assert (receipt["status"], receipt["scope"], receipt["events"]) == (
        "inaccessible",
        {"tenant": "acme", "kind": "tenant"},
        {"unreadable": 2, "plain_remaining": 1},
    )
    assert receipt["irrecoverable_at"] is None
    assert set(receipt["barrier"]) == {world.topic("view")}
    assert receipt["instances"] == [{"instance_id": f"{world.name}-one", "outcome": "released"}]
    assert [(r["stream_id"], r["status"], r["value_base64"]) for r in world.json("events", "list", "--tenant", "acme") if r["stream_id"] == "aes-1"] == [
        ("aes-1", "erased", None), ("aes-1", "erased", None),
    ]  # fmt: skip
    assert {k["state"] for k in world.json("keys", "list", "--tenant", "acme")} == {"destroyed"}

    # receipts
    listed = world.json("receipts", "list", "--command", receipt["command_id"])
    assert [r["status"] for r in listed] == ["accepted", "inaccessible"]
    for identity in (receipt["receipt_id"], receipt["command_id"]):
        shown = world.json("receipts", "get", identity)
        assert shown.pop("residue")  # as it stands now: it goes on behind the receipt
        assert shown == {name: said for name, said in receipt.items() if name != "residue"}
    assert world.cli("receipts", "get", str(UUID(int=1))).returncode == 1
    assert world.cli("receipts", "get", "no id").returncode == 2

    # a command that is not waited for, one that is rejected, one that never gets its receipt
    assert world.json("rotate", "--tenant", "globex", "--reason", "a test").keys() == {"command_id"}
    rejected = world.json("rotate", "--tenant", "nobody", "--reason", "a test", "--wait", "100", code=1)
    assert (rejected["status"], rejected["error"]["code"]) == ("rejected", "unknown_tenant")
    world.planes[0].stop()
    assert world.json("rotate", "--tenant", "globex", "--reason", "a test", "--wait", "0.5", code=4)["command_id"]

    # the rest
    world.send(topic, b"v", [("ce_tenantid", b"../")])
    world.settle()
    (letter,) = world.json("dlq", "list")
    assert (letter["reason"], letter["partition"], letter["tenant_id"]) == (
        "bad_tenant",
        next(p for (t, p), _ in world.sent.items() if t == topic),
        None,
    )
    assert world.json("dlq", "show", str(letter["id"])) == letter
    tail = world.json("audit", "tail", "--limit", "100")
    assert {"writer", "seq", "at", "action", "actor", "details", "prev_hash", "hash"} <= tail[0].keys()
    assert {"create_keys", "keys.rotate", "tenant.shred"} <= {row["action"] for row in tail}
    assert all(entry["ok"] for entry in world.json("audit", "verify"))
    status = world.json("status")
    assert {"partitions", "instances", "keys_due", "pending_commands", "tenants"} <= status.keys()
    assert sum(row["lag"] for row in status["partitions"]) == 0
    assert {row["instance_id"] for row in status["instances"]} == {f"{world.name}-one"}
    assert {row["name"] for row in world.json("db", "status")} >= {"0001_initial"}

    # a row of the audit trail changed: verify says so
    world.sql("UPDATE audit_log SET actor = 'somebody else' WHERE seq = 1 AND writer = 'control-0'")
    broken = world.json("audit", "verify", code=1)
    assert [entry["writer"] for entry in broken if not entry["ok"]] == ["control-0"]


def test_usage_errors_exit_2_and_say_nothing_on_stdout(world: World) -> None:
    for words in (
        ("shred", "--tenant", "acme", "--reason", " ", "--yes"),
        ("shred", "--tenant", "../", "--reason", "r", "--yes"),
        ("shred", "--tenant", "acme", "--stream", "a", "--class", "b", "--reason", "r", "--yes"),
        ("rotate", "--tenant", "acme"),
        ("events", "list"),
        ("no-such-command",),
        ("events", "list", "--tenant", "acme", "-o", "xml"),
        ("receipts", "list", "--command", "none"),
        ("publish", "t", "/no/such/file", "--tenant", "a", "--stream", "s", "--type", "t"),
    ):
        said = world.cli(*words)
        assert said.returncode == 2, (words, said.stderr.decode())
        assert said.stdout == b"", words
        assert b"Traceback" not in said.stderr


def test_config_show_shows_no_secret(world: World) -> None:
    document = json.loads(world.config.read_text())
    document["postgres"]["dsn_reader"] = "postgresql://reader:hunter2@db/sidecar"
    document["kafka"]["security"] = {"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-256", "username": "u", "password": "hunter3"}
    world.config.write_text(json.dumps(document))
    said = world.cli("config", "show", "-o", "json")
    assert said.returncode == 0
    shown = json.loads(said.stdout)
    assert b"hunter" not in said.stdout + said.stderr
    assert shown["postgres"]["dsn_reader"].startswith("postgresql://reader")
    assert shown["deployment"] == world.name


def test_init_writes_what_runs_against_the_local_stack_and_never_overwrites(world: World) -> None:
    folder = world.folder / "fresh"
    words = ["init", str(folder), "--bootstrap-servers", world.stack.bootstrap_servers, "--dsn", world.dsn]
    said = subprocess.run([sys.executable, "-m", "sidecar", *words], capture_output=True, check=False)
    assert said.returncode == 0, said.stderr
    assert (folder / "keys" / "kek").stat().st_mode & 0o777 == 0o600
    said = subprocess.run(
        [sys.executable, "-m", "sidecar", "--config", str(folder / "sidecar.yaml"), "config", "check", "-o", "json"], capture_output=True, check=False
    )
    assert json.loads(said.stdout)["ok"] is True
    again = subprocess.run([sys.executable, "-m", "sidecar", *words], capture_output=True, check=False)
    assert again.returncode == 2


def test_probes_and_metrics_answer_on_both_planes(world: World) -> None:
    import urllib.request

    control, data = world.control(), world.run()
    world.event(world.topic("in"), b"v", stream="aes-1")
    world.settle()
    for plane in (control, data):
        url = next(line for line in plane.text().splitlines() if line.startswith("ready")).split()[1]
        answers = {path: urllib.request.urlopen(url + path, timeout=10).read().decode() for path in ("/livez", "/readyz", "/metrics")}
        assert answers["/livez"] == "ok\n"
        assert "sidecar_ready 1.0" in answers["/metrics"]
        if plane is data:
            assert 'sidecar_events_stored_total{treatment="encrypted"} 1.0' in answers["/metrics"]
        assert plane.stop() == 0
