"""Key lifecycle and key bytes: KEK, DEK, wrap, commitment, fingerprint.

    KMS key ─wraps→ tenant KEK ─wraps→ DEK ─expands to→ suite key (aead.py)

The lifecycle, drawn in docs from this table:

    active   may seal and open; at most one version of a scope's key
    retired  opens only; its successor is made at the scope's next write
    destroyed  neither; the bytes are gone, the fingerprint stays

    active → retired     rotate        retired → destroyed   shred, clean-up
    active → destroyed   shred         destroyed → anything  never
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any
from uuid import UUID

from sidecar.core.aead import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Cipher, Secret, Suite, derive, expand, lp, open_into, u32, wipe
from sidecar.core.blind_index import IndexKey
from sidecar.core.errors import AuthenticationFailed
from sidecar.core.model import Scope, ScopeKind

COMMITMENT_BYTES = 32
WRAPPED_DEK_BYTES = NONCE_BYTES + KEY_BYTES + COMMITMENT_BYTES + TAG_BYTES

HARD_LIMIT_USES = 2**32
"""Seals under one key version with random 96-bit nonces (NIST SP 800-38D, 8.3)."""
SOFT_LIMIT_USES = 2**28
USES_BLOCK = 2**16
SUBJECTS_PER_BLOCK = 64
"""A person's key is used seldom: its block is a class's by this."""

NAMED_AT_MOST = 1000
"""Keys in one row of the audit trail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UseLimits:
    """How often one key version may seal: `soft` has the next batch rotate it, and so has one that would go beyond `hard`.

    A stream's key is used by who holds the stream, and its count is its positions. A key that several instances share is counted in
    blocks: each is reserved in the transaction of the first batch that uses it, so that a crash loses at most what is left of one.
    Seals of batches that were not committed are not counted: 2^28 is far enough from 2^32 for them.
    """

    soft: int = SOFT_LIMIT_USES
    hard: int = HARD_LIMIT_USES
    block: int = USES_BLOCK

    def next_block(self, kind: ScopeKind, uses: int) -> int:
        """How much more of a key to set aside, of which `uses` are used or set aside already."""
        of = {ScopeKind.STREAM: self.soft, ScopeKind.SUBJECT: max(self.block // SUBJECTS_PER_BLOCK, 1)}
        return max(min(of.get(kind, self.block), self.soft - uses), 0)


class KeyState(StrEnum):
    """The lifecycle above."""

    ACTIVE = "active"
    RETIRED = "retired"
    DESTROYED = "destroyed"


TRANSITIONS: dict[KeyState, frozenset[KeyState]] = {
    KeyState.ACTIVE: frozenset({KeyState.RETIRED, KeyState.DESTROYED}),
    KeyState.RETIRED: frozenset({KeyState.DESTROYED}),
    KeyState.DESTROYED: frozenset(),
}


class TenantState(StrEnum):
    """`active → shredding → shredded`; back only by readmit, which starts a new generation."""

    ACTIVE = "active"
    SHREDDING = "shredding"
    SHREDDED = "shredded"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyName:
    """What a DEK is bound to. Every part is in the label of its wrapping key, so each wrapping key is used once."""

    scope: Scope
    key_id: UUID
    version: int
    generation: int

    def _wrap_parts(self) -> tuple[bytes, ...]:
        scope = self.scope
        return (scope.tenant.encode(), scope.kind.encode(), scope.id.encode(), self.key_id.bytes, u32(self.version), u32(self.generation))


def commitment(key: bytes | bytearray, key_id: UUID, version: int) -> bytes:
    """32 bytes that commit to the key: AES-GCM alone lets one ciphertext open under two keys."""
    return expand(key, "commit", key_id.bytes, u32(version))


def fingerprint(committed: bytes) -> bytes:
    """Names a key on receipts after it is gone."""
    return sha256(committed).digest()


@dataclass(slots=True, eq=False)
class Kek(Secret):
    """A tenant's key-encryption key, unwrapped. Owns its bytes; `destroy` wipes them."""

    tenant: str
    generation: int
    version: int
    _secret: bytearray = field(repr=False)

    def commitment(self) -> bytes:
        return expand(self._secret, "commit", self.tenant.encode(), u32(self.generation), u32(self.version))

    def payload(self) -> bytearray:
        """What the KMS wraps: the key and what it is for. The caller wipes it."""
        return self._secret + kek_context(self.tenant, self.generation, self.version)

    @classmethod
    def from_payload(cls, payload: bytes | bytearray, tenant: str, generation: int, version: int) -> "Kek":
        """Wipes the payload where that can be. Raises AuthenticationFailed if the KMS returned another tenant's, generation's or version's key."""
        with memoryview(payload) as view:
            secret, context = bytearray(view[:KEY_BYTES]), bytes(view[KEY_BYTES:])
        if isinstance(payload, bytearray):
            wipe(payload)
        if context != kek_context(tenant, generation, version):
            wipe(secret)
            raise AuthenticationFailed("a wrapped tenant key belongs to another tenant, generation or version")
        return cls(tenant, generation, version, secret)

    def wrap(self, dek: bytes | bytearray, name: KeyName, nonce: bytes) -> tuple[bytes, bytes]:
        """-> (wrapped, commitment). The nonce may be any 12 random bytes: the wrapping key is this version's own."""
        committed = commitment(dek, name.key_id, name.version)
        payload = bytearray(KEY_BYTES + COMMITMENT_BYTES)
        payload[:KEY_BYTES], payload[KEY_BYTES:] = dek, committed  # in place: a copy that is passed over is not wiped
        sealed = self._wrapping(name).encrypt(nonce, payload, b"")
        wipe(payload)
        return nonce + sealed, committed

    def _wrapping(self, name: KeyName) -> Cipher:
        return Suite.AES_256_GCM.taking(derive(self._secret, "wrap", *name._wrap_parts()))

    def unwrap(self, wrapped: bytes, name: KeyName, committed: bytes) -> "Dek":
        """Raises AuthenticationFailed if the wrap, its place or the commitment was altered."""
        if len(wrapped) != WRAPPED_DEK_BYTES:
            raise AuthenticationFailed("a wrapped key has the wrong length")
        out = bytearray(KEY_BYTES + COMMITMENT_BYTES)
        open_into(self._wrapping(name), wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], b"", out)
        secret = out[:KEY_BYTES]
        inside = bytes(out[KEY_BYTES:])
        wipe(out)
        if not inside == committed == commitment(secret, name.key_id, name.version):
            wipe(secret)
            raise AuthenticationFailed("a key does not match its commitment")
        return Dek(name, secret)

    def destroy(self) -> None:
        wipe(self._secret)


@dataclass(slots=True, eq=False)
class Dek(Secret):
    """A data-encryption key, unwrapped, until `into_cipher` turns it into a cipher and wipes it. Never printed."""

    name: KeyName
    _secret: bytearray = field(repr=False)

    def into_cipher(self, suite: Suite) -> Cipher:
        """The suite's cipher; the bytes of the DEK are wiped with that."""
        cipher = suite.cipher(self._secret)
        wipe(self._secret)
        return cipher

    def into_index_key(self) -> IndexKey:
        """The key of a blind index; the bytes of the DEK are wiped with that."""
        key = IndexKey(derive(self._secret, "blind-index"))
        wipe(self._secret)
        return key

    def wrapped_by(self, kek: Kek, nonce: bytes) -> bytes:
        """The wrap under another KEK; the bytes of the DEK are wiped with that."""
        wrapped, _ = kek.wrap(self._secret, self.name, nonce)
        wipe(self._secret)
        return wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class KekRow:
    """A row of tenant_keys."""

    tenant: str
    generation: int
    version: int
    kms_uri: str
    kms_key_version: str
    wrapped: bytes | None
    fingerprint: bytes
    dedicated: bool = False
    """Wrapped by a KMS key of this tenant alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DekRow:
    """A row of encryption_keys."""

    name: KeyName
    kek_version: int
    wrapped: bytes | None
    commitment: bytes
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Which keys were destroyed (or marked): how many, and digests over their fingerprints and names; of very many not the names themselves."""

    count: int
    fingerprints_sha256: str
    names_sha256: str
    names: list[str]
    """All of them, in order, or the first NAMED_AT_MOST."""

    @classmethod
    def of(cls, names: Iterable[str] = (), fingerprints: Iterable[bytes] = ()) -> "Keys":
        ordered = sorted(names)
        return cls(
            count=len(ordered),
            fingerprints_sha256=sha256(b"".join(sorted(fingerprints))).hexdigest(),
            names_sha256=sha256("\n".join(ordered).encode()).hexdigest(),
            names=ordered[:NAMED_AT_MOST],
        )

    def on_receipt(self) -> dict[str, Any]:
        return {"count": self.count, "fingerprints_sha256": self.fingerprints_sha256}

    def in_audit(self) -> dict[str, Any]:
        """All names, or where they are too many for one row, their count and a digest over them."""
        return {"count": self.count} | ({"keys": self.names} if self.count <= NAMED_AT_MOST else {"keys_sha256": self.names_sha256})


def kek_context(tenant: str, generation: int, version: int) -> bytes:
    """Stands inside the wrapped payload of a KEK, and is its associated data where the KMS takes any."""
    return lp(b"ks/kek/v1", tenant.encode(), u32(generation), u32(version))
