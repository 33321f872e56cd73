"""Envelope v1: header, associated data, nonces, text form."""

import os
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import envelope
from sidecar.core.aead import Suite
from sidecar.core.envelope import HEADER_BYTES, NO_FIELD, OVERHEAD_BYTES, PREFIX_BYTES, Header, Sealer, data_aad, from_text, parse_header, to_text
from sidecar.core.errors import AuthenticationFailed, MalformedEnvelope, UnsupportedEnvelope
from sidecar.core.model import ScopeKind
from tests.unit import independent_decoder as second
from tests.unit.samples import DEK, KEY_ID, ROW, Row, envelope_headers, header, identifiers, keys, positions, read, seal, tenants, u32s

rows = st.builds(
    Row,
    tenant=tenants,
    stream=identifiers,
    position=positions,
    message_id=identifiers,
    type=identifiers,
    schema_version=u32s,
    field=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@given(envelope_headers)
def test_header_comes_back_from_its_25_bytes(head: Header) -> None:
    prefix = head.prefix()
    assert len(prefix) == PREFIX_BYTES
    assert parse_header(prefix + bytes(OVERHEAD_BYTES - PREFIX_BYTES)) == head


@given(envelope_headers)
def test_second_decoder_reads_the_same_header(head: Header) -> None:
    found = second.read_header(head.prefix() + bytes(28))
    assert found == {
        "suite": head.suite.value,
        "scope_kind": head.scope_kind.value,
        "field": head.field,
        "framed": head.framed,
        "key_id": head.key_id.hex,
        "key_version": head.key_version,
    }


@given(envelope_headers, rows, keys, st.binary(max_size=200))
def test_sealed_event_opens_at_its_own_place_and_costs_53_bytes(head: Header, row: Row, dek: bytes, plaintext: bytes) -> None:
    sealed = seal(head, row, plaintext, dek)
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES == len(plaintext) + 53
    assert read(sealed, row, {(head.key_id, head.key_version): dek}) == plaintext
    as_row = {"tenant": row.tenant, "stream": row.stream, "position": row.position, "message_id": row.message_id, "type": row.type}
    aad = second.event_aad(as_row | {"schema_version": row.schema_version, "field_path": row.field}, sealed)
    assert aad == row.aad(head.prefix())
    assert second.open_envelope(sealed, dek, aad) == plaintext


@given(rows, rows)
def test_two_rows_never_share_their_associated_data(left: Row, right: Row) -> None:
    prefix = header().prefix()
    assert (left.aad(prefix) == right.aad(prefix)) == (left == right)


@given(tenants, identifiers, tenants, identifiers)
def test_data_outside_the_store_never_shares_associated_data_with_an_event(tenant: str, stream: str, other: str, place: str) -> None:
    prefix = header().prefix()
    assert (data_aad(tenant, stream, prefix) == data_aad(other, place, prefix)) == ((tenant, stream) == (other, place))
    assert data_aad(tenant, stream, prefix) != replace(ROW, tenant=tenant, stream=stream).aad(prefix)
    assert data_aad(tenant, stream, prefix) == second.data_aad({"tenant": tenant, "stream": stream}, prefix)


def test_whole_event_has_an_empty_field_path() -> None:
    assert len(NO_FIELD) == 4
    assert not any(NO_FIELD)


# Offset in the header, bytes written there, and what a reader must say.
HEADER_FAULTS = [
    (0, b"k", MalformedEnvelope),
    (1, b"s", MalformedEnvelope),
    (2, b"\x00", UnsupportedEnvelope),
    (2, b"\x02", UnsupportedEnvelope),
    (3, b"\x00", UnsupportedEnvelope),
    (3, b"\x04", UnsupportedEnvelope),
    (3, b"\xff", UnsupportedEnvelope),
    (4, b"\x10", UnsupportedEnvelope),
    (4, b"\x88", UnsupportedEnvelope),
]


@pytest.mark.parametrize(("at", "written", "error"), HEADER_FAULTS)
def test_what_a_later_release_may_write_is_unsupported_and_never_plaintext(at: int, written: bytes, error: type[Exception]) -> None:
    sealed = seal(header(), ROW, b"plain")
    with pytest.raises(error) as raised:
        parse_header(sealed[:at] + written + sealed[at + len(written) :])
    assert type(raised.value) is error


@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_refused_or_have_a_header_that_packs_to_themselves(raw: bytes) -> None:
    try:
        head = parse_header(raw)
    except (MalformedEnvelope, UnsupportedEnvelope):
        return
    assert head.prefix() == raw[:PREFIX_BYTES]


@given(st.binary(max_size=120))
def test_arbitrary_bytes_never_open(raw: bytes) -> None:
    with pytest.raises((MalformedEnvelope, UnsupportedEnvelope, AuthenticationFailed)):
        read(b"KS\x01\x01\x08" + KEY_ID.bytes + b"\0\0\0\x01" + raw, ROW, {(KEY_ID, 1): DEK})


def test_suite_labels_come_back_and_the_plans_spelling_is_known() -> None:
    assert {suite: Suite.from_label(suite.label) for suite in Suite} == {suite: suite for suite in Suite}
    assert Suite.from_label("AES-GCM-SIV") is Suite.AES_256_GCM_SIV
    with pytest.raises(UnsupportedEnvelope, match="AES-128-GCM"):
        Suite.from_label("AES-128-GCM")


def test_the_numbers_in_stored_bytes_never_change() -> None:
    assert {suite.name: suite.value for suite in Suite} == {"AES_256_GCM": 1, "CHACHA20_POLY1305": 2, "AES_256_GCM_SIV": 3}
    assert {kind.value: kind.code for kind in ScopeKind} == {"stream": 0, "class": 1, "tenant": 2, "subject": 3}


def test_one_dek_gives_every_suite_a_key_of_its_own() -> None:
    sealed = seal(header(), ROW, b"plain")
    for suite in Suite:
        if suite is not Suite.AES_256_GCM:
            with pytest.raises(AuthenticationFailed):
                envelope.open_envelope(suite.cipher(DEK), sealed, ROW.aad(sealed[:PREFIX_BYTES]))


def test_a_batchs_nonces_are_drawn_at_once_and_each_is_given_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        drawn.append(size)
        return real(size)

    monkeypatch.setattr(os, "urandom", urandom)
    sealer, head = Sealer(500), header()
    cipher, prefix = head.suite.cipher(DEK), head.prefix()
    nonces = {sealer.seal(cipher, prefix, b"", b"")[PREFIX_BYTES:HEADER_BYTES] for _ in range(500)}
    assert drawn == [6000]
    assert len(nonces) == 500
    with pytest.raises(IndexError):
        sealer.seal(cipher, prefix, b"", b"")


def test_single_seals_draw_a_nonce_each() -> None:
    assert len({seal(header(), ROW, b"")[PREFIX_BYTES:HEADER_BYTES] for _ in range(1000)}) == 1000


@given(st.binary(max_size=300))
def test_text_form_comes_back_and_is_safe_in_a_url(raw: bytes) -> None:
    text = to_text(raw)
    assert text.startswith("ks1.")
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    assert from_text(text) == raw == second.from_text(text)


SPELLINGS = ["", "ks1", "KS1.S1M", "ks2.S1M", "ks1.S1M=", "ks1.S1N", "ks1.S 1M", "ks1.S1M\n", "ks1.+/+/", "ks1.S", "ks1.ä", "ks1.\0", "S1M"]


@pytest.mark.parametrize("text", SPELLINGS)
def test_text_that_to_text_would_not_write_is_malformed(text: str) -> None:
    with pytest.raises(MalformedEnvelope):
        from_text(text)


@given(st.text(max_size=40))
def test_from_text_accepts_one_spelling_only(body: str) -> None:
    try:
        raw = from_text("ks1." + body)
    except MalformedEnvelope:
        return
    assert to_text(raw) == "ks1." + body


def test_key_id_says_nothing_of_whose_it_is() -> None:
    assert UUID(bytes=seal(header(), ROW, b"")[5:21]) == KEY_ID
