"""Key lifecycle, wraps, commitments, and how long key bytes live."""

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.aead import _CIPHERS, AESGCM, Suite
from sidecar.core.errors import AuthenticationFailed, ConfigurationError
from sidecar.core.keys import (
    TRANSITIONS,
    WRAPPED_DEK_BYTES,
    Dek,
    Kek,
    KeyName,
    KeyState,
    TenantState,
    UseLimits,
    commitment,
    fingerprint,
    kek_context,
)
from sidecar.core.model import Scope, ScopeKind
from tests.unit import independent_decoder as second
from tests.unit.samples import key_names, keys, nonces, tenants, u32s

ACTIVE, RETIRED, DESTROYED = KeyState.ACTIVE, KeyState.RETIRED, KeyState.DESTROYED

LIFECYCLE = [
    (ACTIVE, RETIRED, True),
    (ACTIVE, DESTROYED, True),
    (RETIRED, DESTROYED, True),
    (ACTIVE, ACTIVE, False),
    (RETIRED, RETIRED, False),
    (RETIRED, ACTIVE, False),
    (DESTROYED, ACTIVE, False),
    (DESTROYED, RETIRED, False),
    (DESTROYED, DESTROYED, False),
]


@pytest.mark.parametrize(("before", "after", "allowed"), LIFECYCLE)
def test_key_goes_only_where_the_table_lets_it(before: KeyState, after: KeyState, allowed: bool) -> None:
    assert (after in TRANSITIONS[before]) is allowed


def test_lifecycle_table_knows_every_state_and_destroyed_is_the_end() -> None:
    assert set(TRANSITIONS) == set(KeyState) == {before for before, _, _ in LIFECYCLE}
    reached = {DESTROYED}
    assert {after for state in reached for after in TRANSITIONS[state]} == set()
    assert all(DESTROYED in TRANSITIONS[state] for state in (ACTIVE, RETIRED))


def test_states_are_the_words_of_the_schema() -> None:
    assert [state.value for state in KeyState] == ["active", "retired", "destroyed"]
    assert [state.value for state in TenantState] == ["active", "shredding", "shredded"]


def kek_of(secret: bytes, name: KeyName) -> Kek:
    return Kek(name.scope.tenant, name.generation, 1, bytearray(secret))


@given(keys, keys, key_names, nonces)
def test_wrapped_dek_comes_back_and_its_cipher_opens_what_it_sealed(secret: bytes, dek: bytes, name: KeyName, nonce: bytes) -> None:
    kek = kek_of(secret, name)
    wrapped, committed = kek.wrap(dek, name, nonce)
    assert len(wrapped) == WRAPPED_DEK_BYTES == 92
    assert wrapped[:12] == nonce
    assert dek not in wrapped
    assert committed == commitment(dek, name.key_id, name.version)
    for suite in Suite:
        cipher = kek.unwrap(wrapped, name, committed).into_cipher(suite)
        assert cipher.decrypt(bytes(12), suite.cipher(dek).encrypt(bytes(12), b"x", b""), b"") == b"x"


@given(keys, keys, key_names, nonces)
def test_second_decoder_unwraps_the_same(secret: bytes, dek: bytes, name: KeyName, nonce: bytes) -> None:
    wrapped, committed = kek_of(secret, name).wrap(dek, name, nonce)
    scope = {"tenant": name.scope.tenant, "scope_kind": name.scope.kind.value, "scope_id": name.scope.id}
    assert second.unwrap_dek(secret, wrapped, {**scope, "key_id": name.key_id.hex, "version": name.version, "generation": name.generation}) == dek
    assert second.dek_commitment(dek, name.key_id.bytes, name.version) == committed
    assert second.fingerprint(committed) == fingerprint(committed)


@given(key_names, key_names, keys)
def test_each_wrapping_key_is_used_for_one_version_only(left: KeyName, right: KeyName, secret: bytes) -> None:
    wrapped, committed = kek_of(secret, left).wrap(bytes(32), left, bytes(12))
    if left != right:
        with pytest.raises(AuthenticationFailed):
            kek_of(secret, left).unwrap(wrapped, right, committed)


@given(keys, tenants, u32s, u32s)
def test_kek_comes_back_from_what_the_kms_wraps(secret: bytes, tenant: str, generation: int, version: int) -> None:
    kek = Kek(tenant, generation, version, bytearray(secret))
    again = Kek.from_payload(kek.payload(), tenant, generation, version)
    assert again.payload() == kek.payload() == secret + kek_context(tenant, generation, version)
    assert kek_context(tenant, generation, version) == second.kek_context(tenant, generation, version)
    assert again.commitment() == kek.commitment() == second.kek_commitment(secret, tenant, generation, version)


@given(keys, keys, key_names)
def test_commitments_tell_keys_ids_and_versions_apart_and_hold_no_key(left: bytes, right: bytes, name: KeyName) -> None:
    committed = commitment(left, name.key_id, name.version)
    assert (committed == commitment(right, name.key_id, name.version)) == (left == right)
    assert committed != commitment(left, name.key_id, (name.version + 1) % 2**32)
    assert committed != commitment(left, UUID(int=name.key_id.int ^ 1), name.version)
    assert left not in (committed, fingerprint(committed))


NAME = KeyName(scope=Scope(tenant="acme", kind=ScopeKind.STREAM, id="s"), key_id=UUID(int=1), version=1, generation=1)
SECRET = bytes(range(100, 132))


def test_dek_is_wiped_when_it_becomes_a_cipher_and_kek_when_it_is_destroyed() -> None:
    kek = kek_of(SECRET, NAME)
    wrapped, committed = kek.wrap(SECRET, NAME, bytes(12))
    dek = kek.unwrap(wrapped, NAME, committed)
    assert dek._secret == SECRET
    dek.into_cipher(Suite.AES_256_GCM)
    assert dek._secret == bytes(32)
    kek.destroy()
    assert kek._secret == bytes(32)


def test_a_library_that_keeps_no_copy_of_the_key_is_refused_before_anything_is_sealed_under_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:  # as cryptography's ciphers are on OpenSSL 3.0 and 3.1
        def __init__(self, key: Any) -> None:
            self._key = key

        def encrypt(self, *sealed: Any) -> bytes:
            return AESGCM(bytes(self._key)).encrypt(*sealed)

    monkeypatch.setitem(_CIPHERS, Suite.AES_256_GCM, Lazy)  # type: ignore[arg-type]
    kek = kek_of(SECRET, NAME)
    for seals in (lambda: Suite.AES_256_GCM.cipher(bytearray(SECRET)), lambda: kek.wrap(SECRET, NAME, bytes(12))):
        with pytest.raises(ConfigurationError):
            seals()


def test_keys_are_never_printed() -> None:
    kek = kek_of(SECRET, NAME)
    wrapped, committed = kek.wrap(SECRET, NAME, bytes(12))
    for shown in (repr(kek), str(kek), repr(kek.unwrap(wrapped, NAME, committed)), repr(Dek(NAME, bytearray(SECRET)))):
        assert "bytearray" not in shown
        assert SECRET.hex() not in shown
        assert repr(SECRET)[2:-1] not in shown


def test_unwrapped_bytes_do_not_outlive_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrap whose tag, or whose commitment, does not fit leaves no key in any buffer that it made."""
    made: list[bytearray] = []

    class Kept(bytearray):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

        def __getitem__(self, at: Any) -> Any:  # slices are buffers of their own
            piece: Any = super().__getitem__(at)
            return Kept(piece) if isinstance(piece, bytearray) else piece

    kek = kek_of(SECRET, NAME)
    wrapped, committed = kek.wrap(SECRET, NAME, bytes(12))
    monkeypatch.setattr("sidecar.core.keys.bytearray", Kept, raising=False)
    for altered, against in ((wrapped[:-1] + bytes([wrapped[-1] ^ 1]), committed), (wrapped, bytes(32))):
        with pytest.raises(AuthenticationFailed):
            kek.unwrap(altered, NAME, against)
    assert len(made) >= 3
    assert all(SECRET not in bytes(buffer) for buffer in made)


@given(st.sampled_from(list(ScopeKind)), st.integers(1, 1000), st.integers(1, 200), st.integers(0, 2000))
def test_a_block_of_uses_never_passes_the_soft_limit_and_a_streams_key_takes_all_of_it(kind: ScopeKind, soft: int, block: int, uses: int) -> None:
    limits = UseLimits(soft=soft, hard=2 * soft, block=block)
    more = limits.next_block(kind, uses)
    assert more == 0 if uses >= soft else 0 < more <= soft - uses
    if kind is ScopeKind.STREAM:
        assert more == max(soft - uses, 0)
    elif kind is not ScopeKind.SUBJECT:
        assert more <= block
