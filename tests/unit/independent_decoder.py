"""A second decoder, written from docs/FORMAT.md and the design alone. It must not import sidecar.

Built from other parts than the product: AES as a raw block cipher, GHASH and POLYVAL as polynomials, ChaCha20 as a raw
stream, Poly1305 with integers, HKDF-Expand over the standard library's hmac. Slow on purpose, and right or wrong alone.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


class Rejected(Exception):
    """The bytes are not an envelope of this place and key."""


# ---- primitives -------------------------------------------------------------------------------------------------------


def length_prefixed(*parts: bytes) -> bytes:
    out = b""
    for part in parts:
        out += len(part).to_bytes(4, "big") + part
    return out


def hkdf_expand(key: bytes, label: str, *parts: bytes) -> bytes:
    info = length_prefixed(b"ks/v1/" + label.encode(), *parts)
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


def _aes_block(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=False))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def _blocks(data: bytes) -> list[bytes]:
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def _ghash(h: bytes, data: bytes) -> bytes:
    """NIST SP 800-38D, 6.4: bit 0 of the field element is the leftmost bit of the block."""
    point, y = int.from_bytes(h, "big"), 0
    for block in _blocks(data):
        x, z, v = y ^ int.from_bytes(block, "big"), 0, point
        for bit in range(127, -1, -1):
            if x >> bit & 1:
                z ^= v
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        y = z
    return y.to_bytes(16, "big")


def _polyval(h: bytes, data: bytes) -> bytes:
    """RFC 8452, 3: little-endian field over x^128 + x^127 + x^126 + x^121 + 1, dot(a, b) = a * b * x^-128."""
    modulus = 1 << 128 | 1 << 127 | 1 << 126 | 1 << 121 | 1
    point, y = int.from_bytes(h, "little"), 0
    for block in _blocks(data):
        x, product = y ^ int.from_bytes(block, "little"), 0
        for bit in range(128):
            if x >> bit & 1:
                product ^= point << bit
        for _ in range(128):  # divide by x, 128 times: Montgomery's trick keeps it exact
            if product & 1:
                product ^= modulus
            product >>= 1
        y = product
    return y.to_bytes(16, "little")


def open_aes_gcm(key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    body, tag = sealed[:-16], sealed[-16:]
    h = _aes_block(key, bytes(16))
    lengths = (8 * len(aad)).to_bytes(8, "big") + (8 * len(body)).to_bytes(8, "big")
    expected = _xor(_ghash(h, _padded(aad) + _padded(body) + lengths), _aes_block(key, nonce + b"\0\0\0\x01"))
    if len(sealed) < 16 or not hmac.compare_digest(expected, tag):
        raise Rejected("tag")
    stream = b"".join(_aes_block(key, nonce + (2 + n).to_bytes(4, "big")) for n in range(len(_blocks(body))))
    return _xor(body, stream)


def open_aes_gcm_siv(key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    derived = [_aes_block(key, n.to_bytes(4, "little") + nonce)[:8] for n in range(6)]
    mac_key, enc_key = b"".join(derived[:2]), b"".join(derived[2:])
    body, tag = sealed[:-16], sealed[-16:]
    if len(tag) < 16:
        raise Rejected("short")
    counter = tag[:15] + bytes([tag[15] | 0x80])
    first = int.from_bytes(counter[:4], "little")
    stream = b"".join(_aes_block(enc_key, ((first + n) % 2**32).to_bytes(4, "little") + counter[4:]) for n in range(len(_blocks(body))))
    plaintext = _xor(body, stream)
    lengths = (8 * len(aad)).to_bytes(8, "little") + (8 * len(plaintext)).to_bytes(8, "little")
    digest = bytearray(_polyval(mac_key, _padded(aad) + _padded(plaintext) + lengths))
    for at in range(12):
        digest[at] ^= nonce[at]
    digest[15] &= 0x7F
    if not hmac.compare_digest(_aes_block(enc_key, bytes(digest)), tag):
        raise Rejected("tag")
    return plaintext


def open_chacha20_poly1305(key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    body, tag = sealed[:-16], sealed[-16:]

    def stream(counter: int, size: int) -> bytes:
        encryptor = Cipher(algorithms.ChaCha20(key, counter.to_bytes(4, "little") + nonce), mode=None).encryptor()
        return encryptor.update(bytes(size))

    one_time = stream(0, 32)
    r = int.from_bytes(one_time[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    s = int.from_bytes(one_time[16:], "little")
    accumulator = 0
    for block in _blocks(_padded(aad) + _padded(body) + len(aad).to_bytes(8, "little") + len(body).to_bytes(8, "little")):
        accumulator = (accumulator + int.from_bytes(block + b"\x01", "little")) * r % (2**130 - 5)
    expected = ((accumulator + s) % 2**128).to_bytes(16, "little")
    if len(sealed) < 16 or not hmac.compare_digest(expected, tag):
        raise Rejected("tag")
    return _xor(body, stream(1, len(body)))


SUITES: dict[int, Callable[[bytes, bytes, bytes, bytes], bytes]] = {1: open_aes_gcm, 2: open_chacha20_poly1305, 3: open_aes_gcm_siv}
SCOPE_KINDS = ["stream", "class", "tenant", "subject"]


# ---- envelope ---------------------------------------------------------------------------------------------------------


def from_text(text: str) -> bytes:
    if not text.startswith("ks1."):
        raise Rejected("prefix")
    body = text[4:]
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))


def read_header(envelope: bytes) -> dict[str, Any]:
    if len(envelope) < 53 or envelope[0:2] != bytes.fromhex("4b53"):
        raise Rejected("no envelope")
    if envelope[2] != 1 or envelope[3] not in SUITES or envelope[4] > 15:
        raise Rejected("unknown version, suite or flag")
    return {
        "suite": envelope[3],
        "scope_kind": SCOPE_KINDS[envelope[4] & 3],
        "field": bool(envelope[4] & 4),
        "framed": bool(envelope[4] & 8),
        "key_id": envelope[5:21].hex(),
        "key_version": int.from_bytes(envelope[21:25], "big"),
    }


def event_aad(row: dict[str, Any], envelope: bytes, field: bytes | None = None) -> bytes:
    """`field`: what stands in the place of the field path, where that is no path."""
    aad: bytes = (
        length_prefixed(b"ks/event/v1", row["tenant"].encode(), row["stream"].encode())
        + row["position"].to_bytes(8, "big")
        + length_prefixed(row["message_id"].encode(), row["type"].encode())
        + row["schema_version"].to_bytes(4, "big")
        + length_prefixed(row["field_path"].encode() if field is None else field)
        + envelope[0:25]
    )
    return aad


def data_aad(row: dict[str, Any], envelope: bytes) -> bytes:
    return length_prefixed(b"ks/data/v1", row["tenant"].encode(), row["stream"].encode()) + envelope[0:25]


def open_envelope(envelope: bytes, dek: bytes, aad: bytes) -> bytes:
    suite: int = read_header(envelope)["suite"]
    return SUITES[suite](hkdf_expand(dek, "enc", bytes([suite])), envelope[25:37], envelope[37:], aad)


def open_document(stored: bytes, envelope: bytes, dek: bytes, row: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """-> attributes, the document as it was appended."""
    attributes, listed = unframe(open_envelope(envelope, dek, event_aad(row, envelope, hashlib.sha256(stored).digest())))
    out = stored
    for path, at in reversed(json.loads(listed)):  # from behind, so that the offsets stay right
        end = out.index(b'"', at + 1)
        field = from_text(out[at + 1 : end].decode())
        head = read_header(field)
        if not head["field"] or head["framed"] or head["key_id"] != read_header(envelope)["key_id"]:
            raise Rejected("no field of this event")
        out = out[:at] + open_envelope(field, dek, event_aad(row | {"field_path": path}, field)) + out[end + 1 :]
    return attributes, out


def blind_index_token(dek: bytes, pointer: str, value: bytes) -> bytes:
    return hmac.new(hkdf_expand(dek, "blind-index"), length_prefixed(b"ks/blind-index/v1", pointer.encode(), value), hashlib.sha256).digest()


def unframe(plaintext: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(plaintext[:4], "big")
    return json.loads(plaintext[4 : 4 + size]), plaintext[4 + size :]


def attribute_bytes(value: Any) -> bytes | None:
    """Strings are UTF-8; what is no UTF-8, or holds NUL, stands as {"b64": standard base64}."""
    if value is None:
        return None
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else str(value).encode()


# ---- keys -------------------------------------------------------------------------------------------------------------


def dek_commitment(dek: bytes, key_id: bytes, version: int) -> bytes:
    return hkdf_expand(dek, "commit", key_id, version.to_bytes(4, "big"))


def unwrap_dek(kek: bytes, wrapped: bytes, name: dict[str, Any]) -> bytes:
    key_id = bytes.fromhex(name["key_id"])
    version, generation = name["version"].to_bytes(4, "big"), name["generation"].to_bytes(4, "big")
    scope = (name["tenant"].encode(), name["scope_kind"].encode(), name["scope_id"].encode())
    wrapping = hkdf_expand(kek, "wrap", *scope, key_id, version, generation)
    if len(wrapped) != 12 + 32 + 32 + 16:
        raise Rejected("length")
    inside = open_aes_gcm(wrapping, wrapped[:12], wrapped[12:], b"")
    if inside[32:] != dek_commitment(inside[:32], key_id, name["version"]):
        raise Rejected("commitment")
    return inside[:32]


def kek_commitment(kek: bytes, tenant: str, generation: int, version: int) -> bytes:
    return hkdf_expand(kek, "commit", tenant.encode(), generation.to_bytes(4, "big"), version.to_bytes(4, "big"))


def kek_context(tenant: str, generation: int, version: int) -> bytes:
    return length_prefixed(b"ks/kek/v1", tenant.encode(), generation.to_bytes(4, "big"), version.to_bytes(4, "big"))


def fingerprint(commitment: bytes) -> bytes:
    return hashlib.sha256(commitment).digest()


def unwrap_by_file(key_file: bytes, wrapped: bytes, aad: bytes) -> tuple[bytes, str]:
    """-> plaintext, the key's version."""
    magic, key = key_file[:-32], key_file[-32:]
    if magic != b"sidecar-kek-v1\n":
        raise Rejected("no key file")
    version = hashlib.sha256(length_prefixed(b"ks/kms-file/v1", key)).hexdigest()[:16]
    return open_aes_gcm(hkdf_expand(key, "kms-file"), wrapped[:12], wrapped[12:], aad), version


# ---- audit ------------------------------------------------------------------------------------------------------------


def audit_hash(row: dict[str, Any], prev: bytes) -> bytes:
    details = json.dumps(row["details"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    reference = bytes.fromhex(row["tenant_ref"]) if row["tenant_ref"] else b""
    parts = [row["writer"].encode(), row["seq"].to_bytes(8, "big"), row["at"].encode(), row["action"].encode(), row["actor"].encode()]
    return hashlib.sha256(length_prefixed(b"ks/audit/v1", prev, *parts, reference, details.encode())).digest()


def tenant_ref(tenant: str) -> bytes:
    return hashlib.sha256(length_prefixed(b"ks/tenant-ref/v1", tenant.encode())).digest()[:16]
