"""Bytes that were altered, cut, moved, relabelled or planted never open; and the checks that say so have been seen red."""

from collections.abc import Callable
from dataclasses import fields, replace
from uuid import UUID

import pytest

from sidecar.core import envelope
from sidecar.core.aead import Suite, lp, u32, u64
from sidecar.core.envelope import HEADER_BYTES, OVERHEAD_BYTES, PREFIX_BYTES
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope, RecordError, SidecarError, UnknownKey, UnsupportedEnvelope
from sidecar.core.keys import WRAPPED_DEK_BYTES, Kek, KeyName
from sidecar.core.model import Scope, ScopeKind
from tests.unit.samples import DEK, KEY_ID, RELABELLED, ROW, SCOPE_KINDS, SUITES, Row, header, read, seal

KEYRING = {(KEY_ID, 1): DEK}
SECRET = b"the plaintext that nobody may see"


def outcome(sealed: bytes, row: Row = ROW) -> type[Exception] | bytes:
    try:
        return read(sealed, row, KEYRING)
    except SidecarError as error:
        assert SECRET.decode() not in str(error)
        return type(error)


def expected_at(offset: int) -> set[type[Exception]]:
    """What a reader may say about a changed byte at this place of the header."""
    if offset < 2:
        return {MalformedEnvelope}
    if offset == 2:
        return {UnsupportedEnvelope}
    if offset in (3, 4):  # another known suite or scope is authenticated, an unknown one refused
        return {UnsupportedEnvelope, AuthenticationFailed}
    return {UnknownKey} if offset < PREFIX_BYTES else {AuthenticationFailed}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("kind", SCOPE_KINDS)
def test_every_other_value_of_every_header_byte_is_refused(suite: Suite, kind: ScopeKind) -> None:
    sealed = seal(header(suite, kind), ROW, SECRET)
    for at in range(HEADER_BYTES):
        seen = {outcome(sealed[:at] + bytes([value]) + sealed[at + 1 :]) for value in range(256) if value != sealed[at]}
        assert seen <= expected_at(at), f"byte {at}"
        if at == 3:
            assert seen == expected_at(3), "a known suite must reach the tag, an unknown one must not"


@pytest.mark.parametrize("suite", SUITES)
def test_every_bit_of_ciphertext_and_tag_is_authenticated(suite: Suite) -> None:
    sealed = seal(header(suite), ROW, SECRET)
    for at in range(HEADER_BYTES, len(sealed)):
        for bit in range(8):
            assert outcome(sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]) is AuthenticationFailed, f"byte {at} bit {bit}"


@pytest.mark.parametrize("suite", SUITES)
def test_truncation_at_every_length_is_refused(suite: Suite) -> None:
    sealed = seal(header(suite), ROW, SECRET)
    for length in range(len(sealed)):
        assert outcome(sealed[:length]) is (MalformedEnvelope if length < OVERHEAD_BYTES else AuthenticationFailed), f"length {length}"
        rest = sealed[length:]
        # random bytes may begin like an envelope once in 65,536 times; then it is another one, and does not open either
        refused = (UnsupportedEnvelope, AuthenticationFailed) if rest.startswith(b"KS") else (MalformedEnvelope,)
        assert length == 0 or outcome(rest) in refused, f"without its first {length} bytes"
    assert outcome(sealed + b"\0") is AuthenticationFailed


@pytest.mark.parametrize("planted", [b"", b"{}", b'{"name":"Jane"}', b"KS", b"\0" * 100, b"KS\x01" + b"\0" * 60, b"ks1.S1M"])
def test_plaintext_planted_in_an_encrypted_stream_never_reads_as_an_event(planted: bytes) -> None:
    assert outcome(planted) in (MalformedEnvelope, UnsupportedEnvelope)


# ---- moved and relabelled ---------------------------------------------------------------------------------------------


def aad_without(*missing: str) -> Callable[[Row, bytes], bytes]:
    """A broken product: associated data from which some part is missing."""

    def build(row: Row, prefix: bytes) -> bytes:
        parts: dict[str, bytes] = {
            "tenant": lp(row.tenant.encode()),
            "stream": lp(row.stream.encode()),
            "position": u64(row.position),
            "message_id": lp(row.message_id.encode()),
            "type": lp(row.type.encode()),
            "schema_version": u32(row.schema_version),
            "field": lp(row.field.encode()),
        }
        return b"".join(part for name, part in parts.items() if name not in missing) + prefix

    return build


def aad_without_lengths(row: Row, prefix: bytes) -> bytes:
    texts = (row.tenant, row.stream, str(row.position), row.message_id, row.type, str(row.schema_version), row.field)
    return "".join(texts).encode() + prefix


def survivors(suite: Suite, build: Callable[[Row, bytes], bytes]) -> set[str]:
    """Which relabellings of one sealed event open unnoticed: the checker. With the product's associated data: none."""
    head = header(suite, ScopeKind.TENANT)  # a key that many streams share, so that nothing but the associated data tells them apart
    prefix = head.prefix()
    cipher = suite.cipher(DEK)
    sealed = envelope.seal(cipher, prefix, build(ROW, prefix), SECRET)
    opened = set()
    for name, row in RELABELLED.items():
        try:
            assert envelope.open_envelope(cipher, sealed, build(row, prefix)) == SECRET
        except AuthenticationFailed:
            continue
        opened.add(name)
    return opened


def test_relabellings_cover_every_part_of_a_row() -> None:
    assert {field.name for field in fields(Row)} <= RELABELLED.keys()


@pytest.mark.parametrize("suite", SUITES)
def test_event_moved_to_another_row_does_not_open(suite: Suite) -> None:
    assert survivors(suite, Row.aad) == set()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("missing", [field.name for field in fields(Row)])
def test_control_a_part_left_out_of_the_associated_data_is_noticed(suite: Suite, missing: str) -> None:
    assert survivors(suite, aad_without(missing)) == {missing}


@pytest.mark.parametrize("suite", SUITES)
def test_control_empty_associated_data_is_noticed(suite: Suite) -> None:
    assert survivors(suite, lambda row, prefix: b"") == set(RELABELLED)


@pytest.mark.parametrize("suite", SUITES)
def test_control_parts_without_their_lengths_are_noticed(suite: Suite) -> None:
    assert survivors(suite, aad_without_lengths) == {"a letter moved from message id to type", "a letter moved from stream to tenant"}


def header_survivors(authenticated: bool) -> set[int]:
    """Header bytes (of those that choose no other key) that can be changed unnoticed."""
    head = header()
    prefix = head.prefix()

    def aad(of: bytes) -> bytes:
        return ROW.aad(of if authenticated else b"")

    sealed = envelope.seal(head.suite.cipher(DEK), prefix, aad(prefix), SECRET)
    opened = set()
    for at in range(PREFIX_BYTES):
        changed = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        try:
            envelope.open_envelope(head.suite.cipher(DEK), changed, aad(changed[:PREFIX_BYTES]))
        except AuthenticationFailed:
            continue
        opened.add(at)
    return opened


def test_header_is_authenticated_and_the_control_without_is_red() -> None:
    assert header_survivors(authenticated=True) == set()
    assert header_survivors(authenticated=False) == set(range(PREFIX_BYTES))


def test_envelope_of_one_event_does_not_open_in_place_of_another_under_the_same_key() -> None:
    rows = [replace(ROW, position=n, message_id=f"m-{n}") for n in range(1, 20)]
    sealed = [seal(header(), row, b"%d" % row.position) for row in rows]
    opened = [(i, j) for i, row in enumerate(rows) for j, bytes_ in enumerate(sealed) if outcome(bytes_, row) is not AuthenticationFailed]
    assert opened == [(n, n) for n in range(19)]


def test_spliced_halves_of_two_envelopes_do_not_open() -> None:
    left, right = seal(header(), ROW, SECRET), seal(header(), ROW, SECRET)
    for at in range(PREFIX_BYTES + 1, len(left)):
        spliced = left[:at] + right[at:]
        assert spliced in (left, right) or outcome(spliced) is AuthenticationFailed  # one byte alone may be the same in both


# ---- wraps ------------------------------------------------------------------------------------------------------------

NAME = KeyName(scope=Scope(tenant="acme", kind=ScopeKind.STREAM, id="s"), key_id=KEY_ID, version=1, generation=1)
RENAMED = {
    "tenant": replace(NAME, scope=replace(NAME.scope, tenant="globex")),
    "scope kind": replace(NAME, scope=replace(NAME.scope, kind=ScopeKind.CLASS)),
    "scope id": replace(NAME, scope=replace(NAME.scope, id="t")),
    "key id": replace(NAME, key_id=UUID(int=7)),
    "version": replace(NAME, version=2),
    "generation": replace(NAME, generation=2),
}
WRAP_PARTS = list(RENAMED)


def kek(fill: int = 1) -> Kek:
    return Kek("acme", 1, 1, bytearray([fill]) * 32)


def unwrap_outcome(wrapped: bytes, name: KeyName, committed: bytes, by: Kek) -> str:
    try:
        by.unwrap(wrapped, name, committed)
    except AuthenticationFailed:
        return "refused"
    return "opened"


def test_wrap_opens_whole_and_every_altered_bit_is_refused() -> None:
    wrapped, committed = kek().wrap(DEK, NAME, bytes(12))
    assert len(wrapped) == WRAPPED_DEK_BYTES
    assert unwrap_outcome(wrapped, NAME, committed, kek()) == "opened"
    for at in range(len(wrapped)):
        for bit in range(8):
            assert unwrap_outcome(wrapped[:at] + bytes([wrapped[at] ^ 1 << bit]) + wrapped[at + 1 :], NAME, committed, kek()) == "refused"
    for length in range(len(wrapped)):
        assert unwrap_outcome(wrapped[:length], NAME, committed, kek()) == "refused"
    assert unwrap_outcome(wrapped + b"\0", NAME, committed, kek()) == "refused"
    assert unwrap_outcome(wrapped, NAME, committed, kek(2)) == "refused"
    for at in range(32):
        assert unwrap_outcome(wrapped, NAME, committed[:at] + bytes([committed[at] ^ 1]) + committed[at + 1 :], kek()) == "refused"


def wrap_survivors() -> set[str]:
    """Which swaps of a wrap between rows go unnoticed."""
    wrapped, committed = kek().wrap(DEK, NAME, bytes(12))
    return {what for what, name in RENAMED.items() if unwrap_outcome(wrapped, name, committed, kek()) == "opened"}


def test_wrap_moved_to_another_key_scope_tenant_version_or_generation_is_refused() -> None:
    assert wrap_survivors() == set()


@pytest.mark.parametrize("part", range(len(WRAP_PARTS)), ids=WRAP_PARTS)
def test_control_a_part_left_out_of_the_wraps_label_is_noticed(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KeyName._wrap_parts
    monkeypatch.setattr(KeyName, "_wrap_parts", lambda name: tuple(p for n, p in enumerate(whole(name)) if n != part))
    # id and version stand in the commitment as well, a second wall
    assert wrap_survivors() == ({WRAP_PARTS[part]} - {"key id", "version"})


def test_wrong_key_in_a_valid_wrap_does_not_match_the_rows_commitment() -> None:
    """Whoever holds the KEK cannot slip another DEK under a recorded commitment."""
    _, committed = kek().wrap(DEK, NAME, bytes(12))
    other, _ = kek().wrap(bytes(32), NAME, bytes(12))
    assert unwrap_outcome(other, NAME, committed, kek()) == "refused"


OTHERS: list[tuple[str, int, int]] = [("globex", 1, 1), ("acme", 2, 1), ("acme", 1, 2)]


@pytest.mark.parametrize("other", OTHERS)
def test_kek_payload_of_another_tenant_generation_or_version_is_refused(other: tuple[str, int, int]) -> None:
    with pytest.raises(AuthenticationFailed):
        Kek.from_payload(kek().payload(), *other)


@pytest.mark.parametrize("other", OTHERS)
def test_control_kek_payload_without_its_context_is_noticed(other: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.core.keys.kek_context", lambda *_: b"")
    assert Kek.from_payload(kek().payload(), *other)


def test_kek_payload_cut_at_any_length_is_refused() -> None:
    payload = kek().payload()
    for length in range(len(payload)):
        with pytest.raises(AuthenticationFailed):
            Kek.from_payload(payload[:length], "acme", 1, 1)
    with pytest.raises(AuthenticationFailed):
        Kek.from_payload(payload + b"\0", "acme", 1, 1)


def test_failures_of_bytes_are_record_errors_so_they_become_dead_letters_not_crashes() -> None:
    assert all(issubclass(error, RecordError) for error in (MalformedEnvelope, UnsupportedEnvelope, AuthenticationFailed))
