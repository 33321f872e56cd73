"""The three AEAD suites, HKDF-Expand and length-prefixed labels: every use of a cryptographic primitive passes here.

Suites: 1 AES-256-GCM (NIST SP 800-38D), 2 ChaCha20-Poly1305 (RFC 8439), 3 AES-256-GCM-SIV (RFC 8452).
All three take 32-byte keys, 12-byte nonces and append a 16-byte tag.
"""

import hmac
import struct
from enum import IntEnum
from functools import cache
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM as AESGCM
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from sidecar.core.errors import AuthenticationFailed, ConfigurationError, UnsupportedEnvelope

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16

Cipher = AESGCM | ChaCha20Poly1305 | AESGCMSIV

u32 = struct.Struct(">I").pack
u64 = struct.Struct(">Q").pack


class Suite(IntEnum):
    """The algorithm of a stream; the number stands in the envelope, the name in policies and tables."""

    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2
    AES_256_GCM_SIV = 3

    @property
    def label(self) -> str:
        return _LABELS[self]

    @classmethod
    def from_label(cls, label: str) -> "Suite":
        """The suite of a policy's `encryption_algorithm`; the plan's spelling AES-GCM-SIV is accepted too."""
        try:
            return _BY_LABEL[label]
        except KeyError:
            raise UnsupportedEnvelope(f"unknown algorithm {label!r}; known: {', '.join(_LABELS.values())}") from None

    @classmethod
    def from_code(cls, code: int) -> "Suite":
        try:
            return _BY_CODE[code]
        except KeyError:
            raise UnsupportedEnvelope(f"unknown suite {code}") from None

    def cipher(self, dek: bytes | bytearray) -> Cipher:
        """A cipher under this suite's own key of the DEK, so that no key is ever used with two algorithms."""
        return self.taking(derive(dek, "enc", bytes([self])))

    def taking(self, key: bytearray) -> Cipher:
        """A cipher of that key itself, which is wiped. Raises ConfigurationError where the library cannot bear that."""
        cipher = _copying(_CIPHERS[self])(key)  # type: ignore[arg-type]  # into OpenSSL's context, which cleanses itself
        wipe(key)
        return cipher


_LABELS = {Suite.AES_256_GCM: "AES-256-GCM", Suite.CHACHA20_POLY1305: "ChaCha20-Poly1305", Suite.AES_256_GCM_SIV: "AES-256-GCM-SIV"}
_BY_LABEL = {label: suite for suite, label in _LABELS.items()} | {"AES-GCM-SIV": Suite.AES_256_GCM_SIV}
_BY_CODE = {int(suite): suite for suite in Suite}
_CIPHERS: dict[Suite, type[AESGCM] | type[ChaCha20Poly1305] | type[AESGCMSIV]] = {
    Suite.AES_256_GCM: AESGCM,
    Suite.CHACHA20_POLY1305: ChaCha20Poly1305,
    Suite.AES_256_GCM_SIV: AESGCMSIV,
}


@cache
def _copying(made_by: type[Cipher]) -> type[Cipher]:
    """The same class, tried once: `cryptography` on OpenSSL 3.0 and 3.1 keeps a reference to the key, so one that is wiped seals under zeros."""
    key, nonce = bytearray(range(KEY_BYTES)), bytes(NONCE_BYTES)
    cipher = made_by(key)
    wipe(key)
    if cipher.encrypt(nonce, b"", b"") != made_by(bytes(range(KEY_BYTES))).encrypt(nonce, b"", b""):
        raise ConfigurationError(
            f"this build of the cryptography package keeps no copy of the key in {made_by.__name__}",
            where="the Python package cryptography",
            mend="install its binary wheel, or build it with OpenSSL 3.2 or later",
        )
    return made_by


def lp(*parts: bytes) -> bytes:
    """Each part behind its length as u32 big-endian: no two lists of parts give the same bytes."""
    return b"".join([u32(len(part)) + part for part in parts])


def expand(key: bytes | bytearray, label: str, *parts: bytes) -> bytes:
    """32 bytes of HKDF-Expand (RFC 5869, SHA-256) under the label `ks/v1/<label>`.

    One block of output is one HMAC over the label and the byte 01. `key` is uniformly random, so no extract step.
    For what is no secret: `bytes` cannot be wiped.
    """
    return hmac.digest(key, lp(f"ks/v1/{label}".encode(), *parts) + b"\x01", "sha256")


def derive(key: bytes | bytearray, label: str, *parts: bytes) -> bytearray:
    """The same bytes as a key, in a buffer that the caller wipes."""
    out = bytearray(KEY_BYTES)
    HKDFExpand(SHA256(), KEY_BYTES, lp(f"ks/v1/{label}".encode(), *parts)).derive_into(key, out)
    return out


def open_into(cipher: Cipher, nonce: bytes, sealed: bytes, aad: bytes, out: bytearray) -> None:
    """Open into a buffer that the caller wipes; AuthenticationFailed, and nothing in the buffer, if the tag does not fit."""
    try:
        cipher.decrypt_into(nonce, sealed, aad, out)
    except InvalidTag:
        wipe(out)  # the library decrypts before it checks the tag and leaves what it wrote
        raise AuthenticationFailed from None


def open_sealed(cipher: Cipher, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext, or AuthenticationFailed; never False, never partial output."""
    if len(sealed) < TAG_BYTES:
        raise AuthenticationFailed
    try:
        return cipher.decrypt(nonce, sealed, aad)
    except InvalidTag:
        raise AuthenticationFailed from None


class Secret:
    """Holds key bytes: never pickled, copied or printed."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys do not leave the process")


def wipe(secret: bytearray) -> None:
    """Overwrite key bytes in place."""
    secret[:] = bytes(len(secret))
