"""Commands as they come: what is refused, with which code, and what of it a receipt may repeat."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from sidecar.core.authority import Authority
from sidecar.core.command import Command, compose, load_json, parse, receipt, receipt_id, stored
from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope, ScopeKind

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "command_id": str(uuid4()),
        "audience": "demo",
        "op": "shred",
        "scope": {"tenant": "acme", "kind": "tenant"},
        "reason": "Art. 17 request",
        "requested_by": "dpo@example.org",
        "ticket": "GDPR-1234",
        "issued_at": "2026-11-23T12:00:00Z",
        "not_after": "2026-11-24T12:00:00Z",
        "options": {"include_plain": False, "dry_run": False},
    } | changes


def read(raw: bytes | None, *, allow_unsigned: bool = True) -> Any:
    return parse(raw, Authority(audience="demo", approvals={}, max_validity=timedelta(days=7), allow_unsigned=allow_unsigned), now=NOW)


def test_a_command_as_in_the_contract_is_understood() -> None:
    outcome = read(json.dumps(document(scope={"tenant": "acme", "kind": "stream", "id": "jane@acme.com"})).encode()).outcome
    assert isinstance(outcome, Command)
    assert outcome.scope == Scope(tenant="acme", kind=ScopeKind.STREAM, id="jane@acme.com")
    assert (outcome.op, outcome.ticket, outcome.include_plain) == ("shred", "GDPR-1234", False)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("unknown_op", {"op": "explode"}),
        ("unknown_op", {"op": "held"}),
        ("malformed", {"op": 7}),
        ("malformed", {"op": None}),
        ("wrong_audience", {"audience": "production"}),
        ("expired", {"not_after": "2026-11-23T11:59:59Z"}),
        ("expired", {"not_after": "2026-11-23T12:00:00Z"}),
        ("valid_too_long", {"not_after": "2026-11-30T12:00:01Z"}),
        ("valid_too_long", {"issued_at": None, "not_after": "9999-12-31T23:59:59Z"}),
        ("valid_too_long", {"issued_at": "0001-01-01T00:00:00+14:00"}),
        ("malformed", {"not_after": "tomorrow"}),
        ("malformed", {"reason": ""}),
        ("malformed", {"reason": "   "}),
        ("malformed", {"reason": "a\0b"}),
        ("malformed", {"reason": "x" * 1001}),
        ("malformed", {"reason": "\ud800"}),
        ("malformed", {"requested_by": "\ud800"}),
        ("malformed", {"ticket": "\x1b[31m"}),
        ("malformed", {"command_id": "7d0c"}),
        ("malformed", {"command_id": 7}),
        ("malformed", {"scope": "acme"}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "planet"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream", "id": "a\0"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream", "id": "x" * 256}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "tenant", "id": "other"}}),
        ("unknown_tenant", {"scope": {"tenant": "../etc", "kind": "tenant"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "subject", "id": ""}}),
        ("malformed", {"options": {"into": "a stream of no stream"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream", "id": "x"}, "options": {"into": "x"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream", "id": "x"}, "options": {"into": "a\0"}}),
        ("malformed", {"scope": {"tenant": "acme", "kind": "stream", "id": "x"}, "options": {"into": "y", "split": True}}),
        ("malformed", {"options": {"grace": "31d"}}),
        ("malformed", {"options": {"grace": "soon"}}),
        ("malformed", {"options": {"grace": 7}}),
        ("malformed", {"options": {"hold_id": "none"}}),
        ("malformed", {"options": {"include_plane": True}}),
        ("malformed", {"options": {"older_than": "2026-01-01T00:00:00Z"}}),
        ("malformed", {"only_if": "something that this release does not know"}),
    ],
)
def test_what_is_wrong_gives_its_code(code: str, changes: dict[str, Any]) -> None:
    incoming = read(json.dumps(document(**changes)).encode())
    assert isinstance(incoming.outcome, CommandRejected)
    assert incoming.outcome.code == code
    # Whatever stood in it, the receipt can be written: as JSON, in UTF-8, into a JSONB column.
    body = receipt(uuid4(), command_id=incoming.command_id, op=incoming.op, scope=incoming.scope, status="rejected", error=incoming.outcome)
    assert b"\\u0000" not in json.dumps(body, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "raw",
    [
        None,
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"op": "rotate", "op": "shred"}',
        b'{"a": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw)[:30],
)
def test_what_is_no_json_object_has_no_command_id(raw: bytes | None) -> None:
    incoming = read(raw)
    assert isinstance(incoming.outcome, CommandRejected)
    assert incoming.outcome.code == "malformed"
    assert (incoming.command_id, incoming.op, incoming.scope) == (None, None, None)


def test_a_name_that_stands_twice_is_refused() -> None:
    """Two readers could take it for two different commands."""
    raw = json.dumps(document()).encode().replace(b'"op": "shred"', b'"op": "rotate", "op": "shred"')
    assert read(raw).outcome.code == "malformed"


def test_unsigned_needs_permission() -> None:
    assert read(json.dumps(document()).encode(), allow_unsigned=False).outcome.code == "unsigned"


def test_a_rejection_never_repeats_what_is_long_or_not_printable() -> None:
    incoming = read(json.dumps(document(op="x" * 51, scope={"tenant": "a\nb", "kind": "tenant", "id": ["deep"]})).encode())
    assert (incoming.op, incoming.scope) == (None, {"kind": "tenant"})


def test_an_accepted_command_is_read_again_after_its_expiry() -> None:
    raw = compose(
        command_id=uuid4(), audience="demo", op="rotate", scope=Scope(tenant="acme", kind=ScopeKind.CLASS, id="C"), reason="r", requested_by="timer",
        ticket=None, issued_at=NOW, not_after=NOW - timedelta(days=1), options={"older_than": NOW.isoformat()},
    )  # fmt: skip
    assert read(raw).outcome.code == "expired"
    assert stored(raw).older_than == NOW


def test_a_repeated_step_makes_the_same_receipt_again() -> None:
    command_id = uuid4()
    assert receipt_id(command_id, "accepted") == receipt_id(command_id, "accepted") != receipt_id(command_id, "inaccessible")


def test_what_two_readers_could_read_differently_is_refused() -> None:
    with pytest.raises(CommandRejected):
        load_json(b'{"scope": {"tenant": "a", "tenant": "b"}}')
