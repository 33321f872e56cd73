"""Certificates: E.10, none verifies after one byte of it was changed; and what a certificate's scope commits to."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sidecar.core import certificate, dsse
from sidecar.core.audit import canonical
from sidecar.core.certificate import FIELDS, PAYLOAD_TYPE, STATEMENT, check_scope, commitment, in_words, verify
from sidecar.core.dsse import Signer, key_id
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope
from sidecar.core.model import Scope, ScopeKind

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
KEYS = {SIGNER.key_id: SIGNER.public}
SALT = bytes(range(100, 132))
JANE = Scope(tenant="acme", kind=ScopeKind.STREAM, id="jane@acme.example")

DOCUMENT: dict[str, Any] = {
    "certificate_id": "6c8be5b4-9a5e-5d3f-8f4e-1d1b62ef0a01",
    "previous_certificate_id": None,
    "status": "inaccessible",
    "statement": STATEMENT,
    "issued_at": "2026-11-24T12:00:02.000Z",
    "issuer": {"deployment": "demo", "key_id": SIGNER.key_id},
    "software": {"name": "sidecar", "version": "0.1.0", "configuration_sha256": "ab" * 32},
    "command": {
        "command_id": "7d0c8b3e-0b1e-4a52-9a55-0a4b6c1e7d21",
        "op": "shred",
        "requested_by": "dpo@example.org",
        "ticket": "GDPR-1234",
        "issuer": "dpo",
        "payload_sha256": "cd" * 32,
        "accepted_at": "2026-11-24T12:00:00.000Z",
    },
    "scope": {"kind": "stream", "commitment": commitment(JANE, SALT)},
    "inaccessible_at": "2026-11-24T12:00:00.100Z",
    "irrecoverable_at": None,
    "irrecoverable_reason": "next seal epoch",
    "destroyed": {"keys": 1, "fingerprints_sha256": "ef" * 32, "data_keys_below": None, "set_aside_until": None},
    "events": {"unreadable": 20, "plain_remaining": 0, "plain_deleted": 0},
    "sampled": {"attempted": 20, "failed": 20, "not_opened": {}, "at": "2026-11-24T12:00:01.000Z"},
    "barrier": {"users.decrypted": {"0": 4711}},
    "instances": [{"instance_id": "pod-0", "outcome": "released"}],
    "residue": [
        {"kind": "source", "where": "topic users", "state": "pending", "until": "2026-12-01T12:00:00.000Z", "done_at": None},
        {"kind": "wal", "where": "WAL", "state": "pending", "until": None, "done_at": None},
        {"kind": "view", "where": "topic users.decrypted", "state": "done", "until": None, "done_at": "2026-11-24T12:00:00.900Z"},
    ],
    "audit": {"writer": "control-0", "seq": 42, "hash": "01" * 32},
    "note": None,
}
RAW = certificate.sign(DOCUMENT, SIGNER)


def without_signature(raw: bytes) -> dict[str, Any]:
    """Broken: reads the envelope and believes it."""
    return dict(orjson.loads(dsse.parse(json.loads(raw)).payload))


def without_one_way_to_write_it(raw: bytes) -> dict[str, Any]:
    """Broken: checks the signature, and takes whatever decodes to what was signed."""
    signed = dsse.parse(json.loads(raw))
    if not signed.valid_key_ids(KEYS):
        raise AuthenticationFailed
    return dict(orjson.loads(signed.payload))


def flips(raw: bytes) -> list[bytes]:
    """Every byte replaced: by its neighbour (spare bits of base64), by the other case, by what is no text."""
    return [raw[:at] + bytes([byte ^ mask]) + raw[at + 1 :] for at, byte in enumerate(raw) for mask in (0x01, 0x03, 0x20, 0x80)]


def accepted(check: Callable[[bytes], Any], candidates: list[bytes]) -> int:
    count = 0
    for candidate in candidates:
        try:
            check(candidate)
        except (AuthenticationFailed, MalformedEnvelope, ValueError, RecursionError, TypeError):
            continue
        count += 1
    return count


def test_e10_certificate_with_one_byte_changed_never_verifies() -> None:
    candidates = flips(RAW)
    assert len(candidates) == 4 * len(RAW)
    assert verify(RAW, KEYS) == DOCUMENT
    assert accepted(lambda raw: verify(raw, KEYS), candidates) == 0


def test_e10_payload_with_one_byte_changed_never_verifies_whoever_wraps_it_anew() -> None:
    """The change is made inside the base64, so that the envelope is as we write it and only the signature can tell."""
    signed = dsse.parse(json.loads(RAW))
    changed = [dsse.Signed(payload_type=PAYLOAD_TYPE, payload=p, signatures=signed.signatures).to_bytes() for p in flips(signed.payload)]
    assert accepted(lambda raw: verify(raw, KEYS), changed) == 0
    assert accepted(without_signature, changed) > 1000, "control: without the signature altered payloads pass"


@pytest.mark.parametrize("broken", [without_signature, without_one_way_to_write_it])
def test_e10_control_a_verifier_that_leaves_something_out_passes_altered_bytes(broken: Callable[[bytes], Any]) -> None:
    assert accepted(broken, [RAW]) == 1
    assert accepted(broken, flips(RAW)) > 0


def rewritten(**changes: Any) -> bytes:
    envelope = json.loads(RAW) | changes
    return json.dumps(envelope, separators=(",", ":")).encode()


def variants() -> dict[str, bytes]:
    envelope = json.loads(RAW)
    [signature] = envelope["signatures"]
    padded = envelope["payload"].rstrip("=")
    other = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    return {
        "white space": json.dumps(envelope).encode(),
        "a newline at its end": RAW + b"\n",
        "bytes behind it": RAW + b"{}",
        "a byte order mark": b"\xef\xbb\xbf" + RAW,
        "another encoding": RAW.decode().encode("utf-16"),
        "an unknown field": rewritten(comment="fine"),
        "a name that stands twice": RAW.replace(b'{"payloadType"', b'{"payloadType":"x","payloadType"', 1),
        "another order": json.dumps({name: envelope[name] for name in sorted(envelope)}, separators=(",", ":")).encode(),
        "base64 for URLs": rewritten(payload=envelope["payload"].replace("+", "-").replace("/", "_") + ""),
        "base64 without padding": rewritten(payload=padded),
        "no signature": rewritten(signatures=[]),
        "the signature twice": rewritten(signatures=[signature, signature]),
        "a stranger's signature beside ours": rewritten(
            signatures=[signature, {"keyid": other.key_id, "sig": base64.b64encode(other.sign(PAYLOAD_TYPE, canonical(DOCUMENT))[1]).decode()}]
        ),
        "a signature with more in it": rewritten(signatures=[signature | {"cert": "x"}]),
        "an escaped letter": RAW.replace(b'"payload"', b'"p\\u0061yload"', 1),
        "no certificate": dsse.sign("application/vnd.sidecar.command.v1+json", canonical(DOCUMENT), [SIGNER]).to_bytes(),
        "a certificate that is not canonical": dsse.sign(PAYLOAD_TYPE, json.dumps(DOCUMENT).encode(), [SIGNER]).to_bytes(),
        "a certificate with another field": dsse.sign(PAYLOAD_TYPE, canonical(DOCUMENT | {"more": 1}), [SIGNER]).to_bytes(),
        "nothing": b"",
        "no object": b"[1]",
        "deep nesting": b"[" * 100_000,
    }


@pytest.mark.parametrize("what", [name for name, raw in variants().items() if raw != RAW])
def test_there_is_one_way_to_write_a_certificate(what: str) -> None:
    with pytest.raises((MalformedEnvelope, AuthenticationFailed)):
        verify(variants()[what], KEYS)


def test_certificate_of_another_key_or_without_any_key_does_not_verify() -> None:
    other = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    for keys in ({}, {other.key_id: other.public}, {SIGNER.key_id: other.public}):
        with pytest.raises(AuthenticationFailed):
            verify(RAW, keys)
    assert verify(RAW, {other.key_id: other.public, key_id(SIGNER.public): SIGNER.public}) == DOCUMENT


def test_scope_is_committed_to_and_not_named() -> None:
    assert b"jane" not in RAW + canonical(DOCUMENT) and b"acme" not in RAW + canonical(DOCUMENT)
    check_scope(DOCUMENT, JANE, SALT)
    for scope, salt in (
        (JANE, bytes(32)),
        (Scope(tenant="acme", kind=ScopeKind.CLASS, id=JANE.id), SALT),
        (Scope(tenant="acme", kind=ScopeKind.STREAM, id="jane@acme.exampl"), SALT),
        (Scope(tenant="acmej", kind=ScopeKind.STREAM, id="ane@acme.example"), SALT),
        (Scope.of_tenant("acme"), SALT),
    ):
        with pytest.raises(AuthenticationFailed):
            check_scope(DOCUMENT, scope, salt)


def test_sign_refuses_what_is_no_certificate() -> None:
    for document in ({}, DOCUMENT | {"more": 1}, {name: DOCUMENT[name] for name in FIELDS - {"residue"}}):
        with pytest.raises(ValueError):
            certificate.sign(document, SIGNER)


def test_words_say_what_is_left_and_until_when() -> None:
    words = "\n".join(in_words(DOCUMENT))
    assert "not irrecoverable yet: next seal epoch" in words
    assert "left to do: 2 of 3 places" in words
    assert "topic users: until 2026-12-01T12:00:00.000Z" in words and "WAL: no end is known" in words
    done = DOCUMENT | {"irrecoverable_at": "2026-12-02T00:00:00.000Z", "residue": [], "status": "complete"}
    assert "irrecoverable since 2026-12-02" in "\n".join(in_words(done)) and "left to do: nothing" in "\n".join(in_words(done))
    waits = DOCUMENT | {"destroyed": DOCUMENT["destroyed"] | {"set_aside_until": "2026-11-25T00:00:00.000Z"}}
    person = DOCUMENT | {"events": DOCUMENT["events"] | {"plain_remaining": None}}
    assert "20 unreadable, plain ones do not say whose they are, 0 plain" in "\n".join(in_words(person)), "nobody knows, so no number is said"
    assert "set aside until 2026-11-25" in "\n".join(in_words(waits)), "keys within a grace are not called destroyed"


def test_schema_takes_this_certificate_and_names_every_field() -> None:
    import jsonschema

    schema = json.loads((Path(__file__).parents[2] / "schemas" / "messages" / "certificate.v1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(DOCUMENT, schema)
    jsonschema.validate(DOCUMENT | {"events": DOCUMENT["events"] | {"plain_remaining": None}}, schema)  # a person's
    assert set(schema["properties"]) == set(schema["required"]) == FIELDS
    for change in ({"status": "done"}, {"sampled": {"attempted": 1, "failed": 0}}, {"scope": {"kind": "stream", "commitment": "acme"}}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(DOCUMENT | change, schema)
