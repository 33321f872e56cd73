"""Certificates of shreds: issued when the receipt stands, and once more when nothing is left to do.

A timer of the control plane's. It keeps nothing that a restart would miss: a receipt without a certificate gets one.
"""

import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID

from sidecar import telemetry
from sidecar.core.audit import canonical
from sidecar.core.certificate import SALT_BYTES, STATEMENT, commitment, sign
from sidecar.core.command import receipt_id, rfc3339
from sidecar.core.dsse import Signer
from sidecar.core.errors import SidecarError, Unavailable
from sidecar.core.model import Erased, Event, Scope
from sidecar.event_store import EventStore
from sidecar.ports import Clock
from sidecar.postgres import audit, evidence, scopes
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.evidence import Due, Record
from sidecar.settings import Settings
from sidecar.steps import WRITER

SAMPLE: Final = 32
"""Events of the scope that are tried to be opened."""
LATER: Final = timedelta(seconds=30)


class SampleOpened(SidecarError):
    """An event of a shredded scope could be opened: this is no erasure, and no certificate is issued."""


class SampleInvalid(Unavailable):
    """The sample is not there any more, which shows nothing."""


class Evidence:
    """Issues what is due. One control process at a time."""

    def __init__(self, settings: Settings, pool: Pool, signer: Signer, store: EventStore, clock: Clock) -> None:
        self._settings, self._pool, self._signer, self._store, self._clock = settings, pool, signer, store, clock
        self._since: datetime | None = None
        self._not_before: dict[UUID, datetime] = {}

    async def issue(self, let_pass: Callable[[], Awaitable[None]]) -> None:
        """A certificate for each receipt that has none; before each, `let_pass`. One that cannot be issued yet holds up no other."""
        async with transaction(self._pool) as connection:
            newest = await evidence.newest_receipt(connection)
            found = await evidence.due(connection, self._since)
        for due in found:
            if self._not_before.get(due.command_id, self._clock.now()) > self._clock.now():
                continue
            await let_pass()
            try:
                await self._certify(due)
                self._not_before.pop(due.command_id, None)
            except SidecarError as error:
                self._not_before[due.command_id] = self._clock.now() + LATER
                level = telemetry.log.error if isinstance(error, SampleOpened) else telemetry.log.warning
                level("no certificate yet", extra={"action": "certify", "command_id": due.command_id, "status": due.status, "error": error})
            except Exception as error:  # a defect of ours must not end the process that carries out shreds
                self._not_before[due.command_id] = self._clock.now() + LATER
                telemetry.log.error("no certificate", extra={"action": "certify", "command_id": due.command_id}, exc_info=error)
        if not found:
            self._since = newest

    async def _certify(self, due: Due) -> None:
        async with transaction(self._pool) as connection:
            record = await evidence.record(connection, due)
            outstanding = await evidence.outstanding(connection, due.command_id)
            events = await self._events(connection, due, record.command.scope)
        if due.status == "complete" and (outstanding or due.receipt["irrecoverable_at"] is None):
            raise Unavailable("a receipt says complete, and something is outstanding all the same")
        sampled = await self._sampled(record.command.scope, due.stood_at)
        salt = record.salt or secrets.token_bytes(SALT_BYTES)
        identity = receipt_id("certificate", due.command_id, due.status)
        now = self._clock.now()
        raw = sign(self._document(due, record, identity, now, salt) | {"events": events, "sampled": sampled}, self._signer)
        async with transaction(self._pool) as connection:
            if await evidence.insert(connection, identity, due.command_id, due.status, raw, salt):
                details = {
                    "command_id": str(due.command_id),
                    "certificate_id": str(identity),
                    "status": due.status,
                    "sha256": sha256(raw).hexdigest(),
                }
                tenant = record.command.scope.tenant
                await audit.append(connection, writer=WRITER, at=now, action="certificate.issue", actor=WRITER, tenant=tenant, details=details)
        telemetry.log.info("certificate", extra={"action": "certify", "command_id": due.command_id, "status": due.status})

    def _document(self, due: Due, record: Record, identity: UUID, now: datetime, salt: bytes) -> dict[str, Any]:
        """All but what was counted and tried."""
        command, receipt = record.command, due.receipt
        return {
            "certificate_id": str(identity),
            "previous_certificate_id": str(record.previous) if record.previous else None,
            "status": due.status,
            "statement": STATEMENT,
            "issued_at": rfc3339(now),
            "issuer": {"deployment": self._settings.deployment, "key_id": self._signer.key_id},
            "software": {"name": "sidecar", "version": version("sidecar"), "configuration_sha256": configuration_sha256(self._settings)},
            "command": {
                "command_id": str(command.command_id),
                "op": command.op,
                "requested_by": command.requested_by,
                "ticket": command.ticket,
                "issuer": record.issuer,
                "payload_sha256": record.payload_sha256.hex(),
                "accepted_at": receipt["accepted_at"],
            },
            "scope": {"kind": command.scope.kind.value, "commitment": commitment(command.scope, salt)},
            "inaccessible_at": receipt["inaccessible_at"],
            "irrecoverable_at": receipt["irrecoverable_at"],
            "irrecoverable_reason": receipt["irrecoverable_reason"],
            "destroyed": {
                "keys": receipt["keys"]["count"],
                "fingerprints_sha256": receipt["keys"]["fingerprints_sha256"],
                "data_keys_below": receipt["keys"].get("deks_below"),
                "set_aside_until": rfc3339(record.set_aside_until) if record.set_aside_until else None,
            },
            "barrier": receipt["barrier"],
            "instances": receipt["instances"],
            "residue": [{name: row.on_receipt()[name] for name in ("kind", "where", "state", "until", "done_at")} for row in record.residue],
            "audit": receipt["audit"] | {"hash": record.audit_hash.hex() if record.audit_hash else None},
            "note": receipt.get("note"),
        }

    async def _events(self, connection: Any, due: Due, scope: Scope) -> dict[str, Any]:
        """As on the receipt; counted now where the receipt did not wait for it."""
        told = due.receipt["events"]
        if told["unreadable"] is None:
            told = told | scopes.events_on_receipt(*await scopes.count_events(connection, scope, due.stood_at))
        partly = {name: told[name] for name in ("clear_remainders", "remainders_deleted") if name in told}
        return {"unreadable": told["unreadable"], "plain_remaining": told["plain_remaining"], "plain_deleted": told.get("plain_deleted", 0)} | partly

    async def _sampled(self, scope: Scope, stood_at: datetime) -> dict[str, Any]:
        """Try to open some of the scope's events, as any reader would. Raises SampleOpened, SampleInvalid, or what is unavailable.

        An event that cannot be read for another reason than that it is erased (altered bytes) is no failed decryption: it is named beside them.
        """
        async with transaction(self._pool) as connection:
            chosen = await evidence.sample(connection, scope, stood_at, SAMPLE)
        failed, not_opened = 0, Counter[str]()
        for stream, position in chosen:
            for row, held in await self._store.read(scope.tenant, stream=stream, from_position=position, limit=1):
                if row["stream_position"] != position:
                    raise SampleInvalid("an event of the sample is gone")
                if isinstance(held, Event):
                    raise SampleOpened
                if isinstance(held, Erased):
                    failed += 1
                else:
                    not_opened[type(held).__name__] += 1
        if failed + not_opened.total() != len(chosen):
            raise SampleInvalid("an event of the sample is gone")
        if not_opened:
            telemetry.log.error(
                "events of a shredded scope are not erased, but cannot be read", extra={"action": "certify", "reasons": dict(not_opened)}
            )
        return {"attempted": len(chosen), "failed": failed, "not_opened": dict(not_opened), "at": rfc3339(self._clock.now())}


def configuration_sha256(settings: Settings) -> str:
    """Of the settings as canonical JSON, without what holds secrets: DSNs, passwords, and what stands behind `?` in the KMS URI."""
    uris = {"uri", "uri_data", "uri_control", "uri_reader"}
    document = settings.model_dump(mode="json", exclude={"postgres": True, "kafka": {"security": {"password"}}, "kms": uris})
    return sha256(canonical(document | {"kms_uri": settings.kms.uri.partition("?")[0]})).hexdigest()
