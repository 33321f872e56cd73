"""Published known answers, from the package `cryptography_vectors`, through our own open and through the second decoder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.aead import Cipher, expand, lp, open_into, open_sealed
from sidecar.core.errors import AuthenticationFailed
from tests.unit import independent_decoder as second
from tests.unit.samples import keys

Case = dict[str, str]
Second = Callable[[bytes, bytes, bytes, bytes], bytes]


def cases(path: str) -> Iterator[Case]:
    """`Name = hex` lines; [Name = value] lines hold for what follows; an empty line or a new count ends a case."""
    section: Case = {}
    case: Case = {}
    for line in [*Path(cryptography_vectors.__file__).parent.joinpath("ciphers", path).read_text().splitlines(), ""]:
        line = line.strip()
        if line.startswith("["):
            name, _, value = line.strip("[]").partition("=")
            section[name.strip().lower()] = value.strip()
        elif line.startswith("#"):
            continue
        elif not line:
            if "key" in case:
                yield section | case
            case = {}
        else:
            name, _, value = line.partition("=")
            case[name.strip().lower()] = value.strip()


def field(case: Case, *names: str) -> bytes:
    text = next((case[name] for name in names if name in case), "")
    return text.strip('"').encode() if text.startswith('"') else bytes.fromhex(text)


def split(case: Case) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """-> key, nonce, sealed, aad, plaintext."""
    sealed = field(case, "ct", "ciphertext") + field(case, "tag")
    return field(case, "key"), field(case, "iv", "nonce"), sealed, field(case, "aad", "ad"), field(case, "pt", "in", "plaintext")


def ours(path: str) -> list[Case]:
    """Those with our sizes: 256-bit key, 96-bit nonce, 128-bit tag."""
    found = [case for case in cases(path) if len(field(case, "key")) == 32 and len(field(case, "iv", "nonce")) == 12]
    return [case for case in found if len(field(case, "tag")) == 16]


FILES = [
    ("AES/GCM/gcmEncryptExtIV256.rsp", AESGCM, second.open_aes_gcm, 375),
    ("AES/GCM/gcmDecrypt256.rsp", AESGCM, second.open_aes_gcm, 375),
    ("ChaCha20Poly1305/boringssl.txt", ChaCha20Poly1305, second.open_chacha20_poly1305, 66),
    ("ChaCha20Poly1305/openssl.txt", ChaCha20Poly1305, second.open_chacha20_poly1305, 5),
    ("AES/GCM-SIV/openssl.txt", AESGCMSIV, second.open_aes_gcm_siv, 24),
]


@pytest.mark.parametrize(("path", "cipher", "independent", "at_least"), FILES, ids=[path.replace("/", "-") for path, *_ in FILES])
def test_known_answers_open_as_published_and_never_when_altered(path: str, cipher: type[AESGCM], independent: Second, at_least: int) -> None:
    opened = refused = 0
    for case in ours(path):
        key, nonce, sealed, aad, plaintext = split(case)
        ours_: Cipher = cipher(key)
        if "fail" in case or case.get("result") == "CIPHERFINAL_ERROR":
            with pytest.raises(AuthenticationFailed):
                open_sealed(ours_, nonce, sealed, aad)
            with pytest.raises(second.Rejected):
                independent(key, nonce, sealed, aad)
            refused += 1
            continue
        assert open_sealed(ours_, nonce, sealed, aad) == plaintext
        assert independent(key, nonce, sealed, aad) == plaintext
        out = bytearray(len(plaintext))
        open_into(ours_, nonce, sealed, aad, out)
        assert out == plaintext
        for at in (0, -1):
            altered = bytearray(sealed)
            altered[at] ^= 1
            with pytest.raises(AuthenticationFailed):
                open_sealed(ours_, nonce, bytes(altered), aad)
        with pytest.raises(AuthenticationFailed):
            open_sealed(ours_, nonce, sealed, aad + b"\0")
        opened += 1
    assert opened + refused >= at_least, "the vectors were not read"
    assert refused > 0 or "Decrypt" not in path


@given(keys, st.text(max_size=20), st.lists(st.binary(max_size=40), max_size=5))
def test_expand_is_hkdf_expand_under_our_label(key: bytes, label: str, parts: list[bytes]) -> None:
    info = lp(f"ks/v1/{label}".encode(), *parts)
    assert expand(key, label, *parts) == HKDFExpand(SHA256(), 32, info).derive(key) == second.hkdf_expand(key, label, *parts)


@given(st.lists(st.binary(max_size=8), max_size=5), st.lists(st.binary(max_size=8), max_size=5))
def test_two_lists_of_parts_never_have_the_same_length_prefixed_bytes(left: list[bytes], right: list[bytes]) -> None:
    assert (lp(*left) == lp(*right)) == (left == right)


def test_buffer_holds_nothing_after_a_failed_open() -> None:
    """The library decrypts before it checks the tag: without wiping, an altered wrap leaves the real key behind."""
    cipher = AESGCM(bytes(32))
    sealed = bytearray(cipher.encrypt(bytes(12), b"the key itself", b""))
    sealed[-1] ^= 1
    raw = bytearray(14)
    with pytest.raises(InvalidTag):
        cipher.decrypt_into(bytes(12), bytes(sealed), b"", raw)
    assert raw == b"the key itself", "control: should the library mend this, the wipe in open_into may go"
    out = bytearray(14)
    with pytest.raises(AuthenticationFailed):
        open_into(cipher, bytes(12), bytes(sealed), b"", out)
    assert out == bytes(14)
