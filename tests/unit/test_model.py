"""Identifiers are taken as they come or refused, never normalised."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.errors import MalformedRecord
from sidecar.core.model import Event, Scope, ScopeKind, identifier, tenant_id
from sidecar.core.store import NewEvent
from tests.unit.samples import identifiers, tenants

BAD_TENANTS = ["", ".", "-a", "_a", "../", "a/b", "a\0", "a\n", "a b", "a" * 101, "a" * 10_000, "ａｃｍｅ", "acmé", "a%", "а", "a\u0661", " acme"]
GOOD_STREAMS = ["a_b", "a-b", "a%", "jane@acme.com", "x::y", "a b", "*", "..", "é", "ａ", "x" * 255, "日本" * 42]
BAD_STREAMS = [b"", b"\0", b"a\nb", b"\xff", b"a\x7f", b"x" * 256, "\u200b".encode(), "\u2028".encode(), "é".encode() * 128, b"\xed\xa0\x80"]


@given(tenants)
def test_good_tenant_id_is_taken_as_it_is(raw: str) -> None:
    assert tenant_id(raw) == raw


@pytest.mark.parametrize("raw", BAD_TENANTS)
def test_bad_tenant_id_is_a_dead_letter(raw: str) -> None:
    with pytest.raises(MalformedRecord) as raised:
        tenant_id(raw)
    assert raised.value.reason == "bad_tenant"


@given(st.text(max_size=110))
def test_tenant_id_comes_back_unchanged_or_not_at_all(raw: str) -> None:
    try:
        assert tenant_id(raw) == raw
    except MalformedRecord:
        return
    assert raw.isascii() and 1 <= len(raw) <= 100 and raw[0].isalnum() and "/" not in raw


@given(identifiers)
def test_printable_identifier_is_taken_as_it_comes(text: str) -> None:
    raw = text.encode()
    if len(raw) <= 255:
        assert identifier(raw, "stream id") == text


@pytest.mark.parametrize("text", GOOD_STREAMS)
def test_ordinary_stream_names_are_accepted(text: str) -> None:
    assert identifier(text.encode(), "stream id") == text


@pytest.mark.parametrize("raw", BAD_STREAMS)
def test_bad_identifier_has_the_reason_that_its_caller_gave(raw: bytes) -> None:
    with pytest.raises(MalformedRecord) as raised:
        identifier(raw, "stream id", "bad_stream")
    assert raised.value.reason == "bad_stream"


@given(st.binary(max_size=300))
def test_identifier_is_the_bytes_themselves_or_refused(raw: bytes) -> None:
    try:
        text = identifier(raw, "id")
    except MalformedRecord as error:
        assert error.reason == "malformed"
        return
    assert text.encode() == raw
    assert text.isprintable() and 0 < len(raw) <= 255


def test_two_spellings_of_one_letter_stay_two_streams() -> None:
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    assert identifier(composed.encode(), "id") != identifier(decomposed.encode(), "id")


def test_scope_as_json_names_no_id_for_a_tenant() -> None:
    assert Scope.of_tenant("acme").to_json() == {"tenant": "acme", "kind": "tenant"}
    assert Scope(tenant="acme", kind=ScopeKind.STREAM, id="s").to_json() == {"tenant": "acme", "kind": "stream", "id": "s"}


@pytest.mark.parametrize("kind", list(ScopeKind))
def test_scope_kind_comes_back_from_its_code(kind: ScopeKind) -> None:
    assert ScopeKind.from_code(kind.code) is kind
    assert ScopeKind.from_code(kind.code | 0b1100) is kind


def test_what_an_event_holds_is_not_in_its_repr() -> None:
    new = NewEvent(type="T", data={"email": "jane@example.org"}, metadata={"by": "jane"})
    event = Event(
        tenant="acme", stream="s", position=1, message_id="m", type="T", stream_class="C", value=b"jane", key=b"jane", timestamp_ms=0,
        headers=[("by", b"jane")], source=None, metadata={"by": "jane"},
    )  # fmt: skip
    assert "jane" not in f"{new!r} {event!r}"
    assert "position=1" in repr(event)
