"""Signed envelopes: DSSE v1 (github.com/secure-systems-lab/dsse) with Ed25519 (RFC 8032). Commands, ledger, certificates and checkpoints use it.

    {"payloadType": …, "payload": base64, "signatures": [{"keyid": …, "sig": base64}]}

What is signed is PAE(payloadType, payload): a payload of one type never passes for one of another. A key id is the first 16 bytes of
SHA-256 over the raw public key, in hex: it names the key, and who may do what with it stands in the configuration.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sidecar.core.aead import Secret
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope

FIELDS = frozenset({"payloadType", "payload", "signatures"})
MAX_SIGNATURES = 16
"""More are no approval, they are work for the verifier."""


def key_id(public: Ed25519PublicKey) -> str:
    return sha256(public.public_bytes_raw()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Signer(Secret):
    """A private key; `repr` shows none of it."""

    _key: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> Ed25519PublicKey:
        return self._key.public_key()

    @property
    def key_id(self) -> str:
        return key_id(self.public)

    def sign(self, payload_type: str, payload: bytes) -> tuple[str, bytes]:
        """-> key id, signature."""
        return self.key_id, self._key.sign(pae(payload_type, payload))


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """An envelope as it was read: nothing in it is believed before `valid_key_ids` named a key that is trusted."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def valid_key_ids(self, keys: Mapping[str, Ed25519PublicKey]) -> set[str]:
        """The ids of those keys that signed just this, each once however often it signed."""
        message, found = pae(self.payload_type, self.payload), set()
        for keyid, signature in self.signatures:
            key = keys.get(keyid)
            if key is not None and keyid not in found:
                try:
                    key.verify(signature, message)
                except InvalidSignature:
                    continue
                found.add(keyid)
        return found

    def to_json(self) -> dict[str, Any]:
        signatures = [{"keyid": keyid, "sig": base64.b64encode(sig).decode()} for keyid, sig in self.signatures]
        return {"payloadType": self.payload_type, "payload": base64.b64encode(self.payload).decode(), "signatures": signatures}

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_json(), separators=(",", ":")).encode()


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding, as the DSSE protocol defines it."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, signers: Iterable[Signer]) -> Signed:
    return Signed(payload_type=payload_type, payload=payload, signatures=tuple(signer.sign(payload_type, payload) for signer in signers))


def parse(document: Mapping[str, Any]) -> Signed:
    """From a JSON object. Raises MalformedEnvelope; says nothing of who signed."""
    try:
        kind, payload, signatures = document["payloadType"], document["payload"], document["signatures"]
        if document.keys() != FIELDS or not isinstance(kind, str) or not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
            raise ValueError
        pairs = tuple((_text(entry["keyid"]), base64.b64decode(_text(entry["sig"]), validate=True)) for entry in signatures)
        return Signed(payload_type=kind, payload=base64.b64decode(_text(payload), validate=True), signatures=pairs)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise MalformedEnvelope("this is no DSSE envelope") from None


def verified(raw: bytes, payload_type: str, keys: Mapping[str, Ed25519PublicKey]) -> bytes:
    """The payload of a document that one of the keys signed. Raises MalformedEnvelope, AuthenticationFailed.

    There is one way to write it: to the byte as `to_bytes` does, with one signature. So nothing in it can be changed and still verify,
    not even what no signature covers: white space, a second field of a name, spare bits of base64.
    """
    try:
        signed = parse(json.loads(raw))
    except (ValueError, RecursionError, AttributeError):
        raise MalformedEnvelope("this is no DSSE envelope") from None
    if signed.to_bytes() != raw or len(signed.signatures) != 1:
        raise MalformedEnvelope("the envelope is not written as the sidecar writes it: it was changed")
    if signed.payload_type != payload_type:
        raise MalformedEnvelope(f"the envelope holds something else than {payload_type}")
    if signed.signatures[0][0] not in keys:
        raise AuthenticationFailed("it was signed with a key that is not among the given ones")
    if not signed.valid_key_ids(keys):
        raise AuthenticationFailed("the signature does not fit: the document was changed, or never signed")
    return signed.payload


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
