"""Tokens of the blind index: the same for the same value of the same field of the same tenant, and for nothing else."""

import hmac
import json
import pickle
from decimal import Decimal
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.blind_index import IndexKey, canonical, searched, tokens
from sidecar.core.errors import MalformedRecord
from sidecar.core.fields import Fields, covers

numbers = st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.text() | st.booleans() | numbers


def spelled(value: object) -> str:
    return str(value).lower().replace("+", "") if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else json.dumps(value)


def key(byte: int = 7) -> IndexKey:
    return IndexKey(bytearray([byte]) * 32)


@given(scalars, scalars)
def test_values_have_one_spelling_exactly_if_they_are_equal(one: object, other: object) -> None:
    of_a_kind = isinstance(one, bool) == isinstance(other, bool) and isinstance(one, str) == isinstance(other, str)
    # as they are written: a float is what its digits say
    same = of_a_kind and (one == other if isinstance(one, str | bool) else Decimal(spelled(one)) == Decimal(spelled(other)))
    assert (canonical(spelled(one)) == canonical(spelled(other))) is same


@pytest.mark.parametrize(
    ("group", "equal"),
    [
        (("1", "1.0", "1e0", "10e-1", "0.1E1"), True), (("0", "-0", "0.0", "0e9"), True), (("-1", "-1.00"), True), (('"a"', '"\\u0061"'), True),
        (("1", '"1"'), False), (("1", "true"), False), (('"a"', '"A"'), False), (("1", "-1"), False), (("1", "10"), False), (('""', "0"), False),
        (("123456789012345678901234567890", "123456789012345678901234567891"), False), (("1e999", "1e998"), False),
        (("1e99999999999999999999", "10e+099999999999999999998"), True), (("1e-99999999999999999999", "1e-99999999999999999998"), False),
        (("0e99999999999999999999", "0"), True), (("1e" + "9" * 5000,) * 2, True), (("1e" + "9" * 5000, "1e-" + "9" * 5000), False),
    ],
)  # fmt: skip
def test_equality_is_of_values_not_of_spellings(group: tuple[str, ...], equal: bool) -> None:
    assert (len({canonical(text) for text in group}) == 1) is equal


@pytest.mark.parametrize("text", ["null", "{}", '{"a":1}', "[]", "[1]"])
def test_what_is_no_scalar_is_not_indexed_and_cannot_be_searched_for(text: str) -> None:
    assert canonical(text) is None
    with pytest.raises(MalformedRecord):
        searched(text)


def test_a_documents_tokens_are_of_the_fields_that_policy_indexes() -> None:
    fields = Fields(("/email", "/tags/*", "/name"), ("/email", "/tags/*"))
    found = fields.find(b'{"email":"jane","tags":["x","y","x",null,{"a":1}],"name":"Jane"}')
    of = key()
    expected = [of.token("/email", b"sjane"), of.token("/tags/*", b"sx"), of.token("/tags/*", b"sy")]
    assert list(tokens(of, found, fields.indexed)) == expected, "each once"
    assert set(tokens(key(8), found, fields.indexed)).isdisjoint(expected), "another tenant's key"
    assert of.token("/name", b"sjane") not in expected, "another field"


def test_a_token_is_what_the_format_says() -> None:
    def lp(part: bytes) -> bytes:
        return len(part).to_bytes(4, "big") + part

    secret = bytes(range(32))
    token = IndexKey(bytearray(secret)).token("/email", b"sjane@example.org")
    assert token == hmac.new(secret, lp(b"ks/blind-index/v1") + lp(b"/email") + lp(b"sjane@example.org"), sha256).digest()


def test_a_key_does_not_leave_the_process_and_is_wiped() -> None:
    of = key()
    assert "7" not in repr(of)
    with pytest.raises(TypeError):
        pickle.dumps(of)
    of.destroy()
    assert of.token("/a", b"n1e0") == key(0).token("/a", b"n1e0")


def test_only_fields_can_be_indexed() -> None:
    with pytest.raises(ValueError, match="not among the fields"):
        Fields(("/email",), ("/name",))
    assert covers("/a/*/c", "/a/0/c")
    assert not covers("/a/*/c", "/a/0/d")
    assert not covers("/a/*", "/a/0/d")
