"""Commands in, receipts out (contract: messages.md): parse, check, and build bodies. Nobody is trusted to send well-formed text.

A command is signed (DSSE) or, where that is allowed, stands there as it is. What decides whether a command came before is the digest of
its payload, not of the record: the same payload with one more signature is the same command, so an approval that is added to a command
that was refused for want of it is no reuse of its id.

What stands in a rejected command is echoed on its receipt only where it is short, printable and of the right type.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal, NoReturn, get_args
from uuid import UUID, uuid5

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sidecar.core import dsse
from sidecar.core.aead import Suite
from sidecar.core.authority import Authority
from sidecar.core.dsse import Signed
from sidecar.core.errors import CommandRejected, MalformedEnvelope, MalformedRecord, UnsupportedEnvelope
from sidecar.core.model import Scope, ScopeKind, duration_ms, identifier, tenant_id

NAMESPACE = UUID("6f0c3f52-8b1e-5d0a-9a55-0a4b6c1e7d21")
"""Of all ids that are derived and not drawn, so that a repeated step makes the same one again."""

Op = Literal["shred", "rotate", "hold", "release", "readmit", "reencrypt"]
PAYLOAD_TYPE = "application/vnd.sidecar.command.v1+json"
OPS: tuple[str, ...] = get_args(Op)
MAX_TEXT = 1000
MAX_GRACE_MS = 30 * 86_400_000

Status = Literal["rejected", "accepted", "done", "inaccessible", "complete", "failed"]
NOT_ALLOWED = ("unsigned", "bad_signature", "unknown_issuer", "not_permitted", "approvals_missing", "legal_hold")
"""Codes of errors on receipts that say: you may not, or not now."""


def final_statuses(op: str) -> tuple[str, ...]:
    """Behind which nobody who waits for a receipt waits on: a shred's residue goes on in the background."""
    return ("inaccessible", "complete", "done", "rejected", "failed") if op == "shred" else ("done", "rejected", "failed")


class _Strict(BaseModel):
    """A name that this release does not know is refused: it may have been meant to narrow the command."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class _ScopeV1(_Strict):
    tenant: str
    kind: Literal["tenant", "stream", "class", "subject"]
    id: str | None = None


class _OptionsV1(_Strict):
    include_plain: bool = False
    dry_run: bool = False
    older_than: datetime | None = None
    grace: str | None = None
    split: bool = False
    hold_id: UUID | None = None
    restore: bool = False
    plain: bool = False
    into: str | None = None
    algorithm: str | None = None
    key_version: int | None = Field(default=None, ge=1, lt=2**31)


class _CommandV1(_Strict):
    command_id: UUID
    audience: str
    op: str
    scope: _ScopeV1
    reason: str = Field(max_length=MAX_TEXT)
    requested_by: str = Field(max_length=MAX_TEXT)
    ticket: str | None = Field(default=None, max_length=MAX_TEXT)
    issued_at: datetime | None = None
    not_after: datetime
    options: _OptionsV1 = _OptionsV1()


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is to be done to which scope, checked.

    `older_than` is the rotation timer's: only keys made before it. `grace_seconds` of a shred delays what is irreversible, never what makes
    data inaccessible; None: the command says nothing, the configuration decides. `split` of a re-encryption: the scope's streams get keys of their own.
    `plain` of a re-encryption: plain events too, where policy encrypts. `into`: the stream's events are copied into a new one of that name.
    `suite`, `key_version` of a re-encryption: only events that are sealed so, and no plain ones.
    `hold_id` of a release: just this hold; None: all holds on the scope. `restore` of a readmission: with the old keys, within the shred's grace.
    """

    command_id: UUID
    op: str
    scope: Scope
    reason: str
    requested_by: str
    ticket: str | None = None
    issued_at: datetime | None = None
    include_plain: bool = False
    dry_run: bool = False
    older_than: datetime | None = None
    grace_seconds: float | None = None
    split: bool = False
    hold_id: UUID | None = None
    restore: bool = False
    plain: bool = False
    into: str | None = None
    suite: Suite | None = None
    key_version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A control record, read as far as it could be read; `outcome` says whether it is a command.

    `issuers` vouch for it. `vouched`: they may command it, or unsigned commands are allowed; if False, nothing in it is worth remembering.
    """

    command_id: UUID | None
    op: str | None
    scope: dict[str, str] | None
    digest: bytes
    issuers: tuple[str, ...] = ()
    vouched: bool = False
    outcome: Command | CommandRejected


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def load_json(raw: bytes | None) -> dict[str, Any]:
    """The object that the bytes are. Refuses what two readers could read differently: duplicate names, NaN."""
    try:
        document = json.loads((raw or b"").decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise CommandRejected("malformed", "the record's value is no JSON object") from None
    if not isinstance(document, dict):
        raise CommandRejected("malformed", "the record's value is no JSON object")
    return document


def _short(value: Any, limit: int = 255) -> str | None:
    return value if isinstance(value, str) and len(value) <= limit and value.isprintable() else None


def _echo_scope(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    return {name: text for name in ("tenant", "kind", "id") if (text := _short(value.get(name))) is not None} or None


def _id_of(value: Any) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


def parse(raw: bytes | None, authority: Authority, *, now: datetime) -> Incoming:
    """Never raises. The first thing that is wrong gives the code. Whether tenant and stream exist is for the store to say."""
    document: dict[str, Any] = {}
    payload = raw or b""
    issuers: tuple[str, ...] = ()
    vouched = False
    try:
        signed, payload = opened(raw)
        outcome: Command | CommandRejected
        if signed is not None and signed.payload_type != PAYLOAD_TYPE:
            raise CommandRejected("malformed", f"the payload is no {PAYLOAD_TYPE}")
        document = load_json(payload)
        signers = authority.signers(signed)
        body = _validated(document)
        outcome = _command(body)
        issuers, vouched = authority.permit(signers, outcome.op, outcome.scope.tenant), True
        _check_here_and_now(body, authority, now)
    except CommandRejected as rejected:
        outcome = rejected
    return Incoming(
        command_id=_id_of(document.get("command_id")), op=_short(document.get("op"), 50), scope=_echo_scope(document.get("scope")),
        digest=sha256(payload).digest(), issuers=issuers, vouched=vouched, outcome=outcome,
    )  # fmt: skip


def opened(raw: bytes | None) -> tuple[Signed | None, bytes]:
    """-> the envelope (None: unsigned), the payload; neither is believed yet. Raises CommandRejected."""
    document = load_json(raw)
    if not document.keys() >= dsse.FIELDS:
        return None, raw or b""
    try:
        signed = dsse.parse(document)
    except MalformedEnvelope:
        raise CommandRejected("malformed", "the record's value is no DSSE envelope") from None
    return signed, signed.payload


def _check_here_and_now(body: _CommandV1, authority: Authority, now: datetime) -> None:
    if body.audience != authority.audience:
        raise CommandRejected("wrong_audience", f"the command is not for the deployment {authority.audience}")
    until = _aware(body.not_after)
    if until <= now:
        raise CommandRejected("expired", "not_after has passed")
    if until - (_aware(body.issued_at) if body.issued_at else now) > authority.max_validity:
        raise CommandRejected("valid_too_long", "from issued_at to not_after is longer than control.max_validity")
    if body.options.older_than is not None:
        raise CommandRejected("malformed", "options.older_than is the rotation timer's own")


def stored(raw: bytes) -> Command:
    """A command that was accepted before, from its record; neither its signatures nor its expiry are looked at again."""
    return _command(_validated(load_json(opened(raw)[1])))


def check(payload: bytes) -> Command:
    """A command that somebody is about to sign or send. Raises CommandRejected for what is none."""
    return _command(_validated(load_json(payload)))


def _validated(document: dict[str, Any]) -> _CommandV1:
    op = document.get("op")
    if isinstance(op, str) and op not in OPS:
        raise CommandRejected("unknown_op", f"op is none of {', '.join(OPS)}")
    try:
        return _CommandV1.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(_short(str(part), 50) or "?" for part in first["loc"])
        raise CommandRejected("malformed", f"{where}: {first['type'].replace('_', ' ')}") from None


def _command(body: _CommandV1) -> Command:
    for name in ("reason", "requested_by", "ticket"):
        text = getattr(body, name)
        if text is not None and not (text.strip() and text.replace("\n", " ").replace("\t", " ").isprintable()):
            raise CommandRejected("malformed", f"{name}: 1 to {MAX_TEXT} printable characters")
    scope = _scope(body.scope)
    if body.options.include_plain and scope.kind is ScopeKind.SUBJECT:
        raise CommandRejected("include_plain_unsupported", "plain events do not say whose they are: shred their streams, or their class")
    return Command(
        command_id=body.command_id,
        op=body.op,
        scope=scope,
        reason=body.reason,
        requested_by=body.requested_by,
        ticket=body.ticket,
        issued_at=body.issued_at and _aware(body.issued_at),
        include_plain=body.options.include_plain,
        dry_run=body.options.dry_run,
        older_than=body.options.older_than,
        grace_seconds=_grace(body.options.grace),
        split=body.options.split,
        hold_id=body.options.hold_id,
        restore=body.options.restore,
        plain=body.options.plain,
        into=_into(body.options, scope),
        suite=_suite(body.options),
        key_version=body.options.key_version,
    )


def _into(options: _OptionsV1, scope: Scope) -> str | None:
    if options.into is None:
        return None
    if scope.kind is not ScopeKind.STREAM or options.split or options.into == scope.id:
        raise CommandRejected("malformed", "options.into: of one stream, into another, and without split")
    try:
        return identifier(options.into.encode("utf-8", "replace"), "options.into")
    except MalformedRecord as error:
        raise CommandRejected("malformed", str(error)) from None


def _suite(options: _OptionsV1) -> Suite | None:
    if options.into is not None and (options.algorithm or options.key_version):
        raise CommandRejected("malformed", "options.into: of all events of a stream, whatever they are sealed with")
    try:
        return None if options.algorithm is None else Suite.from_label(options.algorithm)
    except UnsupportedEnvelope as error:
        raise CommandRejected("malformed", f"options.algorithm: {error}") from None


def _grace(text: str | None) -> float | None:
    try:
        return None if text is None else grace_seconds(text)
    except ValueError:
        raise CommandRejected("malformed", "options.grace: a duration like 24h, of 30d at most") from None


def grace_seconds(text: str) -> float:
    """ValueError for what is no duration, or longer than 30 days."""
    if (milliseconds := duration_ms(text)) > MAX_GRACE_MS:
        raise ValueError(f"{text!r} is longer than 30d")
    return milliseconds / 1000


def _scope(scope: _ScopeV1) -> Scope:
    try:
        tenant = tenant_id(scope.tenant)
    except MalformedRecord:
        # an id that no tenant can have is no tenant's
        raise CommandRejected("unknown_tenant", "there is no such tenant") from None
    kind = ScopeKind(scope.kind)
    if kind is ScopeKind.TENANT:
        if scope.id not in (None, tenant):
            raise CommandRejected("malformed", "scope.id: a tenant's scope has none")
        return Scope.of_tenant(tenant)
    try:
        return Scope(tenant=tenant, kind=kind, id=identifier((scope.id or "").encode("utf-8", "replace"), "scope.id"))
    except MalformedRecord as error:
        raise CommandRejected("malformed", str(error)) from None


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def compose(
    *, command_id: UUID, audience: str, op: str, scope: Scope, reason: str, requested_by: str, ticket: str | None, issued_at: datetime,
    not_after: datetime, options: dict[str, Any],
) -> bytes:  # fmt: skip
    """A command's payload: to be signed or, where that is allowed, to be sent as it is."""
    document = {
        "command_id": str(command_id),
        "audience": audience,
        "op": op,
        "scope": scope.to_json(),
        "reason": reason,
        "requested_by": requested_by,
        "issued_at": rfc3339(issued_at),
        "not_after": rfc3339(not_after),
        "options": options,
    }
    return json.dumps(document | ({"ticket": ticket} if ticket else {}), ensure_ascii=False).encode()


def rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def receipt_id(*parts: object) -> UUID:
    """The same parts give the same id: a step that is repeated after a crash repeats its receipt, not a second one."""
    return uuid5(NAMESPACE, "/".join(str(part) for part in parts))


def receipt(
    identity: UUID, *, command_id: UUID | None, op: str | None, scope: dict[str, str] | None, status: Status,
    error: CommandRejected | None = None, **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """A receipt's body; every field of the contract is there, null where it does not apply (yet)."""
    return {
        "receipt_id": str(identity),
        "command_id": str(command_id) if command_id else None,
        "op": op,
        "scope": scope,
        "status": status,
        "error": {"code": error.code, "message": str(error)} if error else None,
        "accepted_at": None,
        "inaccessible_at": None,
        "irrecoverable_at": None,
        "irrecoverable_reason": None,
        "keys": None,
        "events": None,
        "barrier": None,
        "instances": None,
        "residue": None,
        "audit": None,
    } | facts
