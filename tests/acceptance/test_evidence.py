"""Promise: a shred can be shown to a third party. A certificate says what happened, verifies with a public key alone, and not after any change."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import orjson
import pytest

from sidecar.core import certificate
from sidecar.core.audit import tenant_ref
from sidecar.core.certificate import commitment
from sidecar.core.dsse import key_id
from sidecar.core.model import Scope, ScopeKind
from sidecar.signing import create_signing_key, load_public_key, public_path
from sidecar.testing import control_plane as kit
from tests.acceptance.world import World, until

JANE = Scope(tenant="acme", kind=ScopeKind.STREAM, id="jane@acme.example")


def issued(world: World, receipt: dict[str, Any], status: str = "inaccessible") -> dict[str, Any]:
    """The certificate of a command, as it is on record."""

    def found() -> dict[str, Any] | None:
        rows = world.json("evidence", "list", "--command", receipt["command_id"])
        return next((row for row in rows if row["status"] == status), None)

    return until(found, f"the certificate {status} of {receipt['command_id']}")


def public_key(world: World) -> Path:
    path = world.settings.control.signing_key
    assert path is not None
    return public_path(path)


def written(world: World, receipt: dict[str, Any], folder: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    """-> the file of the command's newest certificate, what `evidence get` said."""
    file = folder / f"{uuid4()}.json"
    return file, world.json("evidence", "get", receipt["command_id"], "--output", str(file), *more)


def offline(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line as an auditor has it: no configuration, no database, no broker."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
    command = [sys.executable, "-m", "sidecar", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder, check=False)


def payload(file: Path, key: Path) -> dict[str, Any]:
    public = load_public_key(key)
    return certificate.verify(file.read_bytes(), {key_id(public): public})


def validate(document: dict[str, Any], name: str) -> None:
    """Against the published schema."""
    schema = json.loads((Path(__file__).parents[2] / "schemas" / "messages" / f"{name}.v1.json").read_text())
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


@pytest.fixture
def shredded(world: World) -> tuple[World, dict[str, Any]]:
    """A stream with 20 encrypted events, shredded while both planes run; other streams and another tenant beside it."""
    for n in range(20):
        world.event(world.topic("in"), b'{"n": %d}' % n, stream=JANE.id, partition=0)
        world.event(world.topic("in"), b"{}", stream="aes-other", partition=1)
        world.event(world.topic("in"), b"{}", tenant="globex", stream="aes-theirs", partition=1)
    world.run()
    world.control()
    world.settle()
    receipt = world.carry_out("shred", JANE, ticket="GDPR-1234")
    assert receipt["status"] == "inaccessible"
    return world, receipt


def test_certificate_says_what_the_receipt_says_and_what_was_tried(shredded: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    world, receipt = shredded
    issued(world, receipt)
    file, said = written(world, receipt, tmp_path, "--with-salt")
    found = payload(file, public_key(world))

    assert (found["status"], found["certificate_id"]) == ("inaccessible", said["certificate_id"])
    assert found["inaccessible_at"] == receipt["inaccessible_at"]
    assert found["destroyed"]["keys"] == receipt["keys"]["count"] == 1
    fingerprints = world.value("SELECT fingerprints FROM erased_scopes")
    assert found["destroyed"]["fingerprints_sha256"] == receipt["keys"]["fingerprints_sha256"]
    assert len(fingerprints) == 1
    assert found["events"] == {"unreadable": 20, "plain_remaining": 0, "plain_deleted": 0}
    assert (found["sampled"]["attempted"], found["sampled"]["failed"]) == (20, 20)
    assert found["barrier"] == receipt["barrier"] and found["instances"] == receipt["instances"] != []
    row = world.sql(
        "SELECT hash, action, tenant_ref FROM audit_log WHERE writer = $1 AND seq = $2", receipt["audit"]["writer"], receipt["audit"]["seq"]
    )
    assert found["audit"] == receipt["audit"] | {"hash": row[0]["hash"].hex()}
    assert (row[0]["action"], row[0]["tenant_ref"]) == ("stream.shred", tenant_ref("acme"))
    assert (found["command"]["requested_by"], found["command"]["ticket"]) == ("test@example.org", "GDPR-1234")
    assert "no proof about copies" in found["statement"]
    assert [row["action"] for row in world.sql("SELECT action FROM audit_log WHERE action = 'certificate.issue'")] == ["certificate.issue"]

    text = file.read_text() + json.dumps(found)
    assert not any(name in text for name in ("acme", "jane", said["salt"])), "it names nobody, and the salt is elsewhere"
    assert commitment(JANE, bytes.fromhex(said["salt"])) == found["scope"]["commitment"]
    assert said["scope"] == "tenant=acme,kind=stream,id=jane@acme.example"


def test_real_messages_are_as_their_schemas_say(shredded: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    world, receipt = shredded
    for op, scope in (("rotate", JANE), ("shred", Scope.of_tenant("nobody")), ("shred", Scope.of_tenant("globex"))):
        world.carry_out(op, scope)
    validate(json.loads(kit.command(world.settings, "shred", JANE, ticket="T")[1]), "command")
    receipts = [json.loads(message.value()) for message in world.records(world.settings.control.receipts)]
    assert {r["status"] for r in receipts} >= {"accepted", "inaccessible", "rejected", "done"}
    for body in receipts:
        validate(body, "receipt")
    issued(world, receipt)
    file, _ = written(world, receipt, tmp_path)
    found = payload(file, public_key(world))
    validate(found, "certificate")
    for document, name in ((found | {"status": "gone"}, "certificate"), (receipts[0] | {"status": "gone"}, "receipt"), ({"op": "shred"}, "command")):
        with pytest.raises(jsonschema.ValidationError):
            validate(document, name)


def test_certificate_verifies_offline_with_a_public_key_alone(shredded: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    world, receipt = shredded
    issued(world, receipt)
    file, said = written(world, receipt, tmp_path, "--with-salt")
    key = public_key(world)
    away = tmp_path / "away"
    away.mkdir()
    of = ("--scope", said["scope"], "--salt", said["salt"])

    found = offline(away, "-o", "table", "evidence", "verify", str(file), "--key", str(key), *of)
    assert found.returncode == 0, found.stderr
    assert "verified: signed with the key" in found.stderr and "no proof about copies" in found.stderr
    assert "it is about stream jane@acme.example of tenant acme" in found.stdout
    assert "decryption was tried on 20 of them and failed on 20" in found.stdout

    found = offline(away, "evidence", "verify", str(file), "--key", str(key))
    assert (found.returncode, json.loads(found.stdout)["scope_verified"]) == (0, False), "without the salt it says that nobody's name was checked"

    stranger = public_path(tmp_path / "stranger")
    create_signing_key(tmp_path / "stranger")
    for words in (
        ("--key", str(stranger)),
        ("--key", str(key), "--scope", "tenant=acme,kind=stream,id=john@acme.example", "--salt", said["salt"]),
        ("--key", str(key), "--scope", "tenant=globex,kind=stream,id=jane@acme.example", "--salt", said["salt"]),
        ("--key", str(key), "--scope", said["scope"], "--salt", "00" * 32),
    ):
        found = offline(away, "evidence", "verify", str(file), *words)
        assert (found.returncode, json.loads(found.stdout)["verified"]) == (1, False), words
        assert "does not verify" in found.stderr
    raw = file.read_bytes()
    file.write_bytes(raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:])
    assert offline(away, "evidence", "verify", str(file), "--key", str(key)).returncode == 1
    assert offline(away, "evidence", "verify", str(file), "--key", str(key), "--scope", "acme", "--salt", "00").returncode == 1
    assert offline(away, "evidence", "verify", str(tmp_path / "none"), "--key", str(key)).returncode == 2
    assert offline(away, "evidence", "verify", str(file)).returncode == 2


def test_tenants_certificate_counts_keys_below_and_plain_events_that_remain(world: World, tmp_path: Path) -> None:
    for n in range(5):
        world.event(world.topic("in"), b"{}", stream=f"aes-{n}")
        world.event(world.topic("in"), b"{}", stream="cart-1")
    world.run()
    world.control()
    world.settle()
    receipt = world.carry_out("shred", Scope.of_tenant("acme"))
    issued(world, receipt)
    file, said = written(world, receipt, tmp_path, "--with-salt")
    found = payload(file, public_key(world))
    assert found["events"] == {"unreadable": 5, "plain_remaining": 5, "plain_deleted": 0}
    assert (found["destroyed"]["keys"], found["destroyed"]["data_keys_below"]) == (1, 5)
    assert (found["sampled"]["attempted"], found["sampled"]["failed"]) == (5, 5)
    assert (found["scope"]["kind"], said["scope"]) == ("tenant", "tenant=acme,kind=tenant")
    assert commitment(Scope.of_tenant("acme"), bytes.fromhex(said["salt"])) == found["scope"]["commitment"]


def test_command_that_was_only_tried_out_and_one_that_was_refused_get_no_certificate(world: World) -> None:
    world.event(world.topic("in"), b"{}", stream="aes-1")
    world.run()
    world.control()
    world.settle()
    assert world.carry_out("shred", Scope.of_tenant("acme"), options={"dry_run": True})["status"] == "done"
    assert world.carry_out("shred", Scope.of_tenant("nobody"))["status"] == "rejected"
    assert world.carry_out("rotate", Scope.of_tenant("acme"))["status"] == "done"
    issued(world, world.carry_out("shred", Scope.of_tenant("acme")))
    assert len(world.json("evidence", "list")) == 1
    assert world.json("evidence", "list", "--tenant", "globex") == []
    assert len(world.json("evidence", "list", "--tenant", "acme")) == 1
    assert world.cli("evidence", "get", str(uuid4())).returncode == 1
    assert world.cli("evidence", "get", world.json("evidence", "list")[0]["command_id"], "--with-salt").returncode == 2


def test_kms_that_is_away_is_no_failed_decryption_and_the_certificate_waits_for_it(make_world: Callable[..., World], tmp_path: Path) -> None:
    """Of a stream's shred the tenant's key lives on, so trying to open the stream asks the KMS."""
    world = make_world()
    for n in range(3):
        world.event(world.topic("in"), b"{}", stream=f"aes-{n}")
    plane = world.run()
    world.settle()
    assert plane.stop() == 0
    control = world.control()
    key_file = Path(world.settings.kms.uri.removeprefix("file:"))
    away = {path: path.rename(path.with_name(f"{path.name}.away")) for path in key_file.parent.glob(f"{key_file.name}*")}
    receipt = world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"))
    assert receipt["status"] == "inaccessible"
    until(lambda: "no certificate yet" in control.text(), "the control plane to try")
    assert world.json("evidence", "list") == []
    for path, moved in away.items():
        moved.rename(path)
    control.kill()  # what comes back is worked off from what is on record
    world.control()
    issued(world, receipt)
    file, _ = written(world, receipt, tmp_path)
    assert payload(file, public_key(world))["sampled"]["attempted"] == 1


def test_an_event_that_cannot_be_read_for_another_reason_is_named_and_not_counted_as_erased(world: World, tmp_path: Path) -> None:
    for _ in range(4):
        world.event(world.topic("in"), b"{}", stream=JANE.id)
    world.run()
    world.settle()
    world.sql("UPDATE messages SET data_encrypted = '\\x00'::bytea || substring(data_encrypted FROM 2) WHERE stream_position = 2")
    control = world.control()
    receipt = world.carry_out("shred", JANE)
    issued(world, receipt)
    file, _ = written(world, receipt, tmp_path)
    found = payload(file, public_key(world))
    validate(found, "certificate")
    assert {name: found["sampled"][name] for name in ("attempted", "failed", "not_opened")} == {
        "attempted": 4,
        "failed": 3,
        "not_opened": {"MalformedEnvelope": 1},
    }
    assert "1 could not be read for another reason than the shred (1 MalformedEnvelope)" in "\n".join(certificate.in_words(found))
    assert "cannot be read" in control.text(), "somebody has to look at it"


def test_no_certificate_while_an_event_of_the_scope_can_be_opened(world: World) -> None:
    """Control of the sample: a key that survived its shred."""
    world.event(world.topic("in"), b"{}", stream="aes-1")
    world.run()
    world.settle()
    [key] = world.sql("SELECT * FROM encryption_keys WHERE scope_kind = 'stream'")
    survives = f"""CREATE FUNCTION survive() RETURNS TRIGGER LANGUAGE plpgsql AS $$ BEGIN
      NEW.key_material := '\\x{key["key_material"].hex()}'; NEW.is_destroyed := false; NEW.is_active := true; RETURN NEW; END $$"""
    world.sql(survives)
    world.sql("CREATE TRIGGER survive BEFORE UPDATE ON encryption_keys FOR EACH ROW EXECUTE FUNCTION survive()")
    control = world.control()
    receipt = world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-1"))
    assert receipt["status"] == "inaccessible", "the broken shred reports what it believes"
    until(lambda: "could be opened" in control.text(), "the sample to be opened")
    assert world.json("evidence", "list") == []


def test_certificate_complete_comes_only_when_nothing_is_outstanding(shredded: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    """The receipt `complete` is written here by hand, once falsely and once truly: the certificate looks for itself."""
    world, receipt = shredded
    first = issued(world, receipt)
    command_id = receipt["command_id"]
    world.sql("DELETE FROM residue WHERE command_id = $1::text::uuid", command_id)
    world.sql(
        "INSERT INTO residue (command_id, kind, place, next_at) VALUES ($1::text::uuid, 'backup', 'nightly', now() + interval '1 hour')", command_id
    )
    body = receipt | {"receipt_id": str(uuid4()), "status": "complete", "irrecoverable_at": receipt["inaccessible_at"], "irrecoverable_reason": None}
    statement = (
        "INSERT INTO receipts (receipt_id, command_id, status, body, published_at) VALUES ($1::text::uuid, $2::text::uuid, 'complete', $3, now())"
    )
    world.sql(statement, body["receipt_id"], command_id, body)
    until(lambda: "something is outstanding" in world.planes[-1].text(), "the certificate to be refused")
    assert [row["status"] for row in world.json("evidence", "list")] == ["inaccessible"]

    world.sql("UPDATE residue SET state = 'done', done_at = now() WHERE command_id = $1::text::uuid", command_id)
    issued(world, receipt, "complete")
    file, said = written(world, receipt, tmp_path, "--with-salt")
    found = payload(file, public_key(world))
    assert (found["status"], found["previous_certificate_id"]) == ("complete", first["certificate_id"])
    assert [(entry["where"], entry["state"]) for entry in found["residue"]] == [("nightly", "done")]
    assert commitment(JANE, bytes.fromhex(said["salt"])) == found["scope"]["commitment"], "the salt is the first one's"
    before, _ = tmp_path / "first.json", world.json("evidence", "get", first["certificate_id"], "--output", str(tmp_path / "first.json"))
    assert payload(before, public_key(world))["scope"] == found["scope"]


def test_certificate_on_stdout_is_the_one_of_the_file_to_the_byte(shredded: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    world, receipt = shredded
    row = issued(world, receipt)
    file, _ = written(world, receipt, tmp_path)
    assert world.cli("evidence", "get", row["certificate_id"]).stdout == file.read_bytes()
    assert orjson.loads(file.read_bytes())["payloadType"] == certificate.PAYLOAD_TYPE
