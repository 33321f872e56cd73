"""Fields of a document: what is found, what is refused, and that what was sealed comes back to the byte or not at all."""

import json
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import envelope
from sidecar.core.aead import Suite, lp
from sidecar.core.envelope import event_aad, open_envelope, stream_aad
from sidecar.core.errors import AuthenticationFailed, MalformedRecord
from sidecar.core.fields import Bind, Fields, digest_lp, open_document, seal_document
from sidecar.core.view import unframe
from tests.unit.samples import DEK, ROW, Row, header

CIPHER = Suite.AES_256_GCM.cipher(DEK)
PREFIX = header().prefix()
ATTRIBUTES = b'{"key":null,"timestamp":1}'

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.sampled_from(["a", "b", "ks1.", "~", "/"]), inner, max_size=4),
    max_leaves=20,
)
spaces = st.sampled_from([(", ", ": "), (",", ":"), (" ,\n", "\t:  ")])


def place(row: Row = ROW) -> Bind:
    return partial(
        event_aad, stream_aad(row.tenant.encode(), row.stream.encode()), row.position, lp(row.message_id.encode()), lp(row.type.encode()), row.schema_version
    )  # fmt: skip


def sealed(value: bytes, *pointers: str, row: Row = ROW) -> tuple[bytes, bytes]:
    """-> stored document, envelope."""
    return seal_document(Fields(pointers).find(value), ATTRIBUTES, PREFIX, place(row), partial(envelope.seal, CIPHER))


def opened(stored: bytes | None, beside: bytes, row: Row = ROW) -> bytes:
    """As every reader of the store does it."""
    attributes, value = unframe(open_envelope(CIPHER, beside, place(row)(digest_lp(stored), PREFIX)))
    assert attributes == ATTRIBUTES
    return value if stored is None else open_document(stored, value, PREFIX, place(row), partial(open_envelope, CIPHER)).text.encode()


def paths(value: bytes, *pointers: str) -> dict[str, str]:
    found = Fields(pointers).find(value)
    return {at.path: found.text[at.start : at.end] for at in found.places}


@given(documents, spaces, st.sampled_from([("/a",), ("/a/b", "/b"), ("/*",), ("/*/*",), ("/0", "/a"), ("/ks1.",), ("/~0", "/~1")]))
def test_whatever_was_sealed_comes_back_to_the_byte(document: Any, spacing: tuple[str, str], pointers: tuple[str, ...]) -> None:
    value = json.dumps(document, separators=spacing, ensure_ascii=False).encode()
    try:
        found = Fields(pointers).find(value)
    except MalformedRecord:
        assert not isinstance(document, dict | list) or pointers != ("/*",), "only what can hold no field is refused"
        return
    stored, beside = sealed(value, *pointers)
    assert opened(stored, beside) == value
    clear, whole = json.loads(stored), json.loads(value)
    for at in found.places:
        *above, last = [name.replace("~1", "/").replace("~0", "~") for name in at.path[1:].split("/")]
        for name in above:
            clear, whole = (part[int(name) if isinstance(part, list) else name] for part in (clear, whole))
        at_last = int(last) if isinstance(clear, list) else last
        assert clear[at_last].startswith("ks1.")
        assert orjson.loads(json.dumps(whole[at_last])) == orjson.loads(found.text[at.start : at.end])
        clear, whole = json.loads(stored), json.loads(value)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_what_is_no_json_is_refused_and_what_is_json_is_not(text: str) -> None:
    value = b'{"a":' + text.encode() + b"}"
    try:
        json.loads(value, parse_constant=lambda _: json.loads("no"))
        valid = True
    except ValueError:
        valid = False
    try:
        Fields(("/a",)).find(value)
        taken = True
    except MalformedRecord:
        taken = False
    assert taken <= valid
    assert taken or not valid or '"' in text, "names that stand twice need a quote"


@pytest.mark.parametrize(
    ("value", "pointers", "found"),
    [
        (b'{"email":"j@x","plan":"pro"}', ("/email",), {"/email": '"j@x"'}),
        (b'{"n":1.50,"b":true,"z":null,"o":{"k":[1, 2]},"a":[ ]}', ("/n", "/b", "/z", "/o", "/a"), None),
        (b'{"items":[{"sku":1},{"sku":2,"q":3},{}]}', ("/items/*/sku",), {"/items/0/sku": "1", "/items/1/sku": "2"}),
        (b'{"items":[7,8,9]}', ("/items/1",), {"/items/1": "8"}),
        (b'[{"a":1},{"a":2}]', ("/*/a",), {"/0/a": "1", "/1/a": "2"}),
        (b'{"p":{"x":{"e":1},"y":{"e":2}}}', ("/p/*/e",), {"/p/x/e": "1", "/p/y/e": "2"}),
        (b'{"a/b":{"~":1}}', ("/a~1b/~0",), {"/a~1b/~0": "1"}),
        (b'{"":{"":1}}', ("//",), {"//": "1"}),
        (b'{"\\u0065mail":1}', ("/email",), {"/email": "1"}),
        (b'{"other":1}', ("/email",), {}),
        (b'{"a":null}', ("/a/b",), {}),
        (b"null", ("/a",), {}),
        (b'{"big":123456789012345678901234567890,"small":1e-999}', ("/big",), {"/big": "123456789012345678901234567890"}),
    ],
)
def test_pointers_find_what_is_there(value: bytes, pointers: tuple[str, ...], found: dict[str, str] | None) -> None:
    assert paths(value, *pointers) == (found if found is not None else {"/n": "1.50", "/b": "true", "/z": "null", "/o": '{"k":[1, 2]}', "/a": "[ ]"})
    assert opened(*sealed(value, *pointers)) == value


@pytest.mark.parametrize(
    "value",
    [
        b"", b" ", b"{", b'{"a":1', b'{"a":1}x', b'{"a":1,}', b'{"a" 1}', b"{a:1}", b'{"a":NaN}', b'{"x":Infinity}', b'{"a":01}', b"\xff", b'{"x":"\xff"}',
        b'{"a":"\x01"}', b"\xef\xbb\xbf{}", b"[1]", b"7", b'"a"', b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b'{"x":{"b":1,"b":1}}', b'{"x":[{"b":1,"b":1}]}',
        b'{"deep":{"at":"text"}}', b'{"deep":[1]}', b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"every":[{"\\ud800":1}]}',
    ],
)  # fmt: skip
def test_documents_whose_fields_cannot_be_told_apart_are_refused_and_not_quoted(value: bytes) -> None:
    with pytest.raises(MalformedRecord) as refused:
        Fields(("/a", "/deep/at/b", "/every/*/*")).find(value)
    assert refused.value.reason == "bad_document"
    assert str(refused.value) == "no JSON document whose fields can be sealed"
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("bad", ["", "a", "email", "/~", "/~2", "a/b", "/a" * 33])
def test_what_is_no_pointer_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"pointer|deeper"):
        Fields((bad,))


@pytest.mark.parametrize("pair", [("/a", "/a"), ("/a", "/a/b"), ("/*", "/a"), ("/a/*", "/a/b"), ("/*/x", "/a"), ("/a/*/c", "/a/b"), ("/*/x", "/y/*")])
def test_pointers_that_can_meet_are_refused(pair: tuple[str, str]) -> None:
    for one, other in (pair, pair[::-1]):
        with pytest.raises(ValueError, match="keep one of them"):
            Fields((one, other))
    Fields(("/a/b", "/a/c", "/b/*/x", "/b/*/y", "/ab"))  # control: these cannot


def swapped(stored: bytes, one: str, other: str) -> bytes:
    document = json.loads(stored)
    document[one], document[other] = document[other], document[one]
    return orjson.dumps(document)


VALUE = b'{"email":"j@xx","name":"Jane","plan":"pro"}'
TAMPERED = {
    "a changed remainder": lambda s: s.replace(b'"pro"', b'"max"'),
    "a space more": lambda s: s + b" ",
    "a field in plain text": lambda s: orjson.dumps(json.loads(s) | {"email": "j@xx"}),
    "a field removed": lambda s: orjson.dumps({k: v for k, v in json.loads(s).items() if k != "email"}),
    "two fields swapped": lambda s: swapped(s, "email", "name"),
    "the document removed": lambda s: None,
    "another event's document": lambda s: sealed(VALUE, "/email", "/name", row=Row(position=8))[0],
    "plaintext planted": lambda s: VALUE,
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_document_that_is_not_the_one_that_was_sealed_is_detected(how: str) -> None:
    stored, beside = sealed(VALUE, "/email", "/name")
    assert opened(stored, beside) == VALUE
    changed = TAMPERED[how](stored)
    assert changed != stored
    with pytest.raises(AuthenticationFailed):
        opened(changed, beside)


def test_a_document_beside_a_whole_event_is_detected() -> None:
    beside = envelope.seal(CIPHER, PREFIX, place()(digest_lp(None), PREFIX), b"\0\0\0\x1a" + ATTRIBUTES + VALUE)
    assert opened(None, beside) == VALUE
    with pytest.raises(AuthenticationFailed):
        opened(b"{}", beside)


@pytest.mark.parametrize("how", ["two fields swapped", "another event's document"])
def test_control_a_reader_that_binds_no_document_and_no_path_takes_swapped_fields_for_good(how: str) -> None:
    """Without the digest in the event's envelope and without the place in a field's, nothing above would be noticed."""
    blind: Bind = lambda _field, prefix: prefix  # noqa: E731
    stored, beside = seal_document(Fields(("/email", "/name")).find(VALUE), ATTRIBUTES, PREFIX, blind, partial(envelope.seal, CIPHER))
    other = seal_document(
        Fields(("/email", "/name")).find(VALUE.replace(b"Jane", b"Joan")), ATTRIBUTES, PREFIX, blind, partial(envelope.seal, CIPHER)
    )[0]
    changed = swapped(stored, "email", "name") if how == "two fields swapped" else other
    _, index = unframe(open_envelope(CIPHER, beside, blind(b"", PREFIX)))
    try:
        read = open_document(changed, index, PREFIX, blind, partial(open_envelope, CIPHER)).text
    except Exception as error:
        pytest.fail(f"the broken reader noticed: {error}")
    assert read.encode() != VALUE


@pytest.mark.parametrize("at", [4, 5, 21, 30, 50])
def test_a_field_under_another_header_is_detected_even_if_the_document_were_bound_anew(at: int) -> None:
    """Whoever holds the key may seal any document; a field moved into it from elsewhere does not open for its path."""
    stored, _ = sealed(VALUE, "/email", "/name")
    raw = bytearray(envelope.from_text(json.loads(stored)["email"]))
    raw[at] ^= 1
    changed = stored.replace(json.loads(stored)["email"].encode(), envelope.to_text(bytes(raw)).encode())
    index = orjson.dumps([["/email", 9]])
    with pytest.raises(AuthenticationFailed):
        open_document(changed, index, PREFIX, place(), partial(open_envelope, CIPHER))
    with pytest.raises(AuthenticationFailed):
        open_document(stored, orjson.dumps([["/name", 9]]), PREFIX, place(), partial(open_envelope, CIPHER))
    open_document(stored, index, PREFIX, place(), partial(open_envelope, CIPHER))  # control: at its own path it opens
