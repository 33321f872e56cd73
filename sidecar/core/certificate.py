"""The certificate of a shred: what was made unreadable, when, and what is left of it, signed (docs/evidence.md has the fields).

It names no tenant and no person: `scope.commitment` is SHA-256(LP(salt, tenant, kind, id)), and who was given the salt can show of what it is.
Canonical JSON in a DSSE envelope of which there is one way to write it, so a certificate in which one byte was changed does not verify.
"""

from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar.core import dsse
from sidecar.core.aead import lp
from sidecar.core.audit import canonical
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope
from sidecar.core.model import Scope

PAYLOAD_TYPE: Final = "application/vnd.sidecar.certificate.v1+json"
SALT_BYTES: Final = 32
STATEMENT: Final = (
    "This is the record of the sidecar that holds the keys and the event store named here. It says what that sidecar did, found and left to do, and "
    "whoever has its public key can check that nothing in it was changed since. It is no proof about copies that others made of the data, or of the "
    "keys, before: of those it names the ones that it knows, as residue."
)
FIELDS: Final = frozenset(
    {
        "certificate_id",
        "previous_certificate_id",
        "status",
        "statement",
        "issued_at",
        "issuer",
        "software",
        "command",
        "scope",
        "inaccessible_at",
        "irrecoverable_at",
        "irrecoverable_reason",
        "destroyed",
        "events",
        "sampled",
        "barrier",
        "instances",
        "residue",
        "audit",
        "note",
    }
)


def commitment(scope: Scope, salt: bytes) -> str:
    return sha256(lp(salt, scope.tenant.encode(), scope.kind.encode(), scope.id.encode())).hexdigest()


def sign(document: Mapping[str, Any], signer: dsse.Signer) -> bytes:
    """The certificate, as it is kept and handed out."""
    if document.keys() != FIELDS:
        raise ValueError(f"not the fields of a certificate: {sorted(document.keys() ^ FIELDS)}")
    return dsse.sign(PAYLOAD_TYPE, canonical(document), [signer]).to_bytes()


def verify(raw: bytes, keys: Mapping[str, Ed25519PublicKey]) -> dict[str, Any]:
    """What a certificate says, if one of the keys signed just that. Raises MalformedEnvelope, AuthenticationFailed."""
    payload = dsse.verified(raw, PAYLOAD_TYPE, keys)
    try:
        document = orjson.loads(payload)
    except ValueError:
        raise MalformedEnvelope("the certificate is no JSON") from None
    if not isinstance(document, dict) or document.keys() != FIELDS or canonical(document) != payload:
        raise MalformedEnvelope("this is no certificate of a form that this release knows")
    return document


def check_scope(document: Mapping[str, Any], scope: Scope, salt: bytes) -> None:
    """That the certificate is about this scope. Raises AuthenticationFailed."""
    if not compare_digest(document["scope"]["commitment"], commitment(scope, salt)):
        raise AuthenticationFailed("the certificate is not about this scope, or the salt is another certificate's")


def in_words(document: Mapping[str, Any]) -> list[str]:
    """What a person reads of a certificate that was verified."""
    events, sampled, destroyed = document["events"], document["sampled"], document["destroyed"]
    until = f", which are set aside until {destroyed['set_aside_until']} and then destroyed" if destroyed["set_aside_until"] else ""
    others = ", ".join(f"{n} {reason}" for reason, n in sorted(sampled["not_opened"].items()))
    broken = f"; {sum(sampled['not_opened'].values())} could not be read for another reason than the shred ({others})" if others else ""
    left = [entry for entry in document["residue"] if entry["state"] != "done"]
    remain = "plain ones do not say whose they are" if events["plain_remaining"] is None else f"{events['plain_remaining']} plain ones remain"
    said = [
        f"status: {document['status']}; a {document['scope']['kind']} of deployment {document['issuer']['deployment']}",
        f"inaccessible since {document['inaccessible_at']}",
        f"irrecoverable since {document['irrecoverable_at']}"
        if document["irrecoverable_at"]
        else f"not irrecoverable yet: {document['irrecoverable_reason']}",
        f"keys: {destroyed['keys']}{until}; SHA-256 over their fingerprints {destroyed['fingerprints_sha256']}",
        f"events: {events['unreadable']} unreadable, {remain}, {events['plain_deleted']} plain ones were deleted",
        *[f"of {n} of the unreadable, the fields that policy does not name are still in clear" for n in [events.get("clear_remainders")] if n],
        f"decryption was tried on {sampled['attempted']} of them and failed on {sampled['failed']}{broken}",
        f"left to do: {len(left)} of {len(document['residue'])} places" if left else "left to do: nothing",
    ]
    said += [f"  {entry['where']}: " + (f"until {entry['until']}" if entry["until"] else "no end is known") for entry in left]
    by = document["command"]
    ticket = f", ticket {by['ticket']}" if by["ticket"] else ""
    return [*said, f"asked for by {by['requested_by']}{ticket}; issued at {document['issued_at']}"]
