"""Signed commands: whose signature counts for what, how many are needed, and that nothing which was altered passes."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import dsse
from sidecar.core.authority import Authority, Issuer
from sidecar.core.command import PAYLOAD_TYPE, Command, Incoming, compose, parse, stored
from sidecar.core.dsse import Signer
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
OPS, DPO, DPO_OLD, EU, STRANGER = (Signer(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32))) for n in range(1, 6))


def listed(name: str, signer: Signer, ops: tuple[str, ...] = ("*",), tenants: tuple[str, ...] = ("*",)) -> Issuer:
    return Issuer(name=name, key=signer.public, ops=frozenset(ops), tenants=tenants)


ISSUERS = (listed("ops", OPS, ("rotate", "shred")), listed("dpo", DPO), listed("dpo", DPO_OLD), listed("eu", EU, ("shred",), ("eu-*", "acme")))


def payload(op: str = "shred", tenant: str = "acme", **changes: Any) -> bytes:
    value = compose(
        command_id=uuid4(), audience="demo", op=op, scope=Scope.of_tenant(tenant), reason="r", requested_by="dpo@example.org", ticket=None,
        issued_at=NOW, not_after=NOW + timedelta(hours=1), options={},
    )  # fmt: skip
    return json.dumps(json.loads(value) | changes).encode()


def signed(body: bytes, *signers: Signer, payload_type: str = PAYLOAD_TYPE) -> bytes:
    return dsse.sign(payload_type, body, signers).to_bytes()


def read(raw: bytes, *, approvals: dict[str, int] | None = None, allow_unsigned: bool = False) -> Incoming:
    rules = Authority(audience="demo", issuers=ISSUERS, approvals=approvals or {}, max_validity=timedelta(days=7), allow_unsigned=allow_unsigned)
    return parse(raw, rules, now=NOW)


def code(incoming: Incoming) -> str:
    return incoming.outcome.code if isinstance(incoming.outcome, CommandRejected) else "accepted"


def test_a_signed_command_of_a_listed_issuer_is_accepted_and_read_again_later() -> None:
    raw = signed(payload(), OPS)
    incoming = read(raw)
    assert isinstance(incoming.outcome, Command)
    assert (incoming.issuers, incoming.vouched) == (("ops",), True)
    assert stored(raw) == incoming.outcome


CASES = {
    "signed by nobody who is listed": (signed(payload(), STRANGER), "unknown_issuer"),
    "an op that the issuer may not command": (signed(payload("hold"), OPS), "not_permitted"),
    "a tenant that the issuer may not speak for": (signed(payload(tenant="us-1"), EU), "not_permitted"),
    "a tenant that its glob names": (signed(payload(tenant="eu-7"), EU), "accepted"),
    "a foreign signature beside a good one": (signed(payload(), STRANGER, OPS), "accepted"),
    "for another deployment": (signed(payload(audience="production"), DPO), "wrong_audience"),
    "too late": (signed(payload(not_after="2026-11-23T11:59:59Z"), DPO), "expired"),
    "valid for a year": (signed(payload(not_after="2027-11-23T12:00:00Z"), DPO), "valid_too_long"),
    "another kind of payload": (signed(payload(), DPO, payload_type="application/vnd.sidecar.ledger.v1+json"), "malformed"),
    "a name twice inside": (signed(payload().replace(b'"op":', b'"op": "rotate", "op":'), DPO), "malformed"),
    "a name twice outside": (signed(payload(), DPO).replace(b'"payload":', b'"payload":"e30=","payload":'), "malformed"),
    "no signature": (json.dumps({"payloadType": PAYLOAD_TYPE, "payload": "e30=", "signatures": []}).encode(), "malformed"),
    "bytes that are no JSON": (signed(b"\xff", DPO), "malformed"),
}


@pytest.mark.parametrize(("raw", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_signed_is_accepted_or_refused_with_its_code(raw: bytes, expected: str) -> None:
    assert code(read(raw)) == expected


def test_nothing_is_remembered_of_what_nobody_vouches_for() -> None:
    """Else a stranger could use up the ids of others' commands."""
    for raw in (signed(payload(), STRANGER), signed(payload("hold"), OPS), payload()):
        assert not read(raw).vouched
    assert read(signed(payload(audience="other"), OPS)).vouched


@given(st.data())
def test_a_changed_byte_of_the_payload_is_refused(data: st.DataObject) -> None:
    body = payload()
    document = json.loads(signed(body, DPO))
    at = data.draw(st.integers(0, len(body) - 1))
    altered = body[:at] + bytes([body[at] ^ (1 << data.draw(st.integers(0, 7)))]) + body[at + 1 :]
    document["payload"] = base64.b64encode(altered).decode()
    assert code(read(json.dumps(document).encode())) in ("bad_signature", "malformed")


@given(st.data())
def test_a_changed_byte_of_the_signature_is_refused(data: st.DataObject) -> None:
    envelope = dsse.sign(PAYLOAD_TYPE, payload(), [DPO])
    ((keyid, good),) = envelope.signatures
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ (1 << data.draw(st.integers(0, 7)))]) + good[at + 1 :]
    assert code(read(dsse.Signed(payload_type=PAYLOAD_TYPE, payload=envelope.payload, signatures=((keyid, bad),)).to_bytes())) == "bad_signature"


def test_a_key_id_of_a_listed_issuer_over_another_ones_signature_is_refused() -> None:
    body = payload()
    ((_, signature),) = dsse.sign(PAYLOAD_TYPE, body, [STRANGER]).signatures
    forged = dsse.Signed(payload_type=PAYLOAD_TYPE, payload=body, signatures=((DPO.key_id, signature),))
    assert code(read(forged.to_bytes())) == "bad_signature"


APPROVALS = {
    "one of two": ((OPS,), "approvals_missing"),
    "two issuers": ((OPS, DPO), "accepted"),
    "two keys of one issuer": ((DPO, DPO_OLD), "approvals_missing"),
    "one key twice": ((OPS, OPS), "approvals_missing"),
    "the second is a stranger": ((OPS, STRANGER), "approvals_missing"),
    "three": ((OPS, DPO, EU), "accepted"),
}


@pytest.mark.parametrize(("signers", "expected"), APPROVALS.values(), ids=APPROVALS.keys())
def test_approval_counts_issuers_that_may_command_it(signers: tuple[Signer, ...], expected: str) -> None:
    assert code(read(signed(payload(), *signers), approvals={"shred": 2})) == expected


def test_approval_does_not_count_issuers_that_may_not_command_it() -> None:
    """OPS may not place holds: its signature is no second voice."""
    assert code(read(signed(payload("hold"), OPS, DPO), approvals={"hold": 2})) == "approvals_missing"
    assert code(read(signed(payload("rotate"), OPS), approvals={"shred": 2})) == "accepted", "another op asks for nothing more"


def test_approval_is_asked_of_unsigned_commands_too() -> None:
    assert code(read(payload(), approvals={"shred": 2}, allow_unsigned=True)) == "approvals_missing"
    assert code(read(payload("rotate"), approvals={"shred": 2}, allow_unsigned=True)) == "accepted"


def test_a_signature_that_does_not_hold_is_refused_where_unsigned_commands_are_allowed() -> None:
    assert code(read(signed(payload(), STRANGER), allow_unsigned=True)) == "unknown_issuer"


def test_a_signature_added_to_a_payload_leaves_it_the_same_command() -> None:
    body = payload()
    assert read(signed(body, OPS)).digest == read(signed(body, OPS, DPO)).digest == read(signed(body, DPO, OPS)).digest
    assert read(signed(payload(), OPS)).digest != read(signed(body, OPS)).digest


def test_control_an_authority_that_believes_every_signature_accepts_the_forged_ones() -> None:
    """The cases above can go red."""

    class Credulous(Authority):
        def signers(self, signed: dsse.Signed | None) -> list[Issuer]:
            return [ISSUERS[1]]

    rules = Credulous(audience="demo", issuers=ISSUERS, approvals={}, max_validity=timedelta(days=7))
    assert code(parse(signed(payload(), STRANGER), rules, now=NOW)) == "accepted"
    assert code(parse(payload(), rules, now=NOW)) == "accepted"
