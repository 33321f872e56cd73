"""`sidecar ledger replay`: a database that was restored, or failed over, learns from the ledger topic what it lacks; then it may be served.

Every entry is read and its signature checked before anything is changed. Each is applied in a transaction of its own, under the tenant's guard,
with its audit row: a replay that is killed is begun again. What the topic lacks and the database has is published again.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar import grace, telemetry
from sidecar.core import dsse
from sidecar.core.audit import scope_ref
from sidecar.core.errors import CommandRejected, ConfigurationError, LedgerBehind, MalformedEnvelope, StoreUnavailable
from sidecar.core.ledger import Entry, parse_entry
from sidecar.kafka.ledger import LedgerRecord, LedgerTopic
from sidecar.ledger import LedgerGate, entry_id_of, key_of, parse_envelope
from sidecar.ports import Clock
from sidecar.postgres import audit, guard, ledger, replays, tenants
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.settings import Settings
from sidecar.signing import load_public_key, load_signer, public_path
from sidecar.steps import WRITER, Steps, failpoint

LEAD_SECONDS: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An entry on the topic. `signed_by`: the trusted keys among its signatures; empty: it is believed by nobody."""

    offset: int
    entry: Entry
    envelope: bytes
    signed_by: list[str]


def trusted(settings: Settings, more: list[Path]) -> dict[str, Ed25519PublicKey]:
    """The control plane's own key, those of its predecessors, and what the caller names."""
    own = settings.control.signing_key
    files = [*settings.control.ledger_keys, *more, *([public_path(own)] if own and public_path(own).exists() else [])]
    keys = [load_public_key(path) for path in files]
    if own and own.exists() and not public_path(own).exists():
        keys.append(load_signer(own).public)
    return {dsse.key_id(key): key for key in keys}


def read(topic: LedgerTopic, deployment: str, keys: Mapping[str, Ed25519PublicKey]) -> list[Found]:
    """The deployment's entries, in order, each once. Blocks. Raises LedgerBehind for a record that is no entry."""
    found: dict[Any, Found] = {}
    for record in topic.read(0, topic.log().end):
        identity = entry_id_of(record, deployment)
        if identity is not None and identity not in found:
            found[identity] = _found(record, deployment, keys)
    return list(found.values())


def _found(record: LedgerRecord, deployment: str, keys: Mapping[str, Ed25519PublicKey]) -> Found:
    try:
        signed = parse_envelope(record.value)
        entry = parse_entry(signed.payload)
        if key_of(entry.deployment, entry.entry_id) != record.key:
            raise MalformedEnvelope
    except MalformedEnvelope:
        raise LedgerBehind(f"the record at offset {record.offset} of the ledger topic is no entry of it") from None
    return Found(offset=record.offset, entry=entry, envelope=record.value, signed_by=sorted(signed.valid_key_ids(keys)))


class LedgerReplay:
    """Once through the topic. `steps` gives the guard; nothing else of a control plane runs."""

    def __init__(self, settings: Settings, pool: Pool, steps: Steps, topic: LedgerTopic, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._deployment = settings.deployment
        self._pool, self._steps, self._topic, self._keys = pool, steps, topic, keys

    async def run(self, lead: Connection) -> dict[str, Any]:
        """-> what was found and done. Raises ConfigurationError for a signature that nobody vouches for: then nothing was changed."""
        applied = {"shred": 0, "hold": 0, "release": 0, "readmit": 0}
        if await self._serves(lead):
            return {"entries": 0, "applied": applied, "published_again": 0}
        await self._take_lead(lead)
        here = await ledger.server(lead)
        if here is None:
            raise StoreUnavailable("this Postgres is a standby: name the primary")
        log = await asyncio.to_thread(self._topic.log)
        known = await ledger.watermark(lead)
        if log.start > (known.next_offset if known.topic_id == log.topic_id else 0):
            raise LedgerBehind(f"the ledger topic {self._topic.name} has lost entries that this database does not have: restore the topic")
        found = await asyncio.to_thread(read, self._topic, self._deployment, self._keys)
        self._refuse_unsigned(found)
        lacking = await ledger.lacking(lead, {f.entry.entry_id for f in found})
        # A database that has the shred itself learns that it was taken back.
        gone = replays.undone(f.entry for f in found) & {f.entry.command_id for f in found if f.entry.entry_id in lacking}
        for each in found:
            if each.entry.entry_id in lacking:
                await self._apply(each, skip=each.entry.command_id in gone or each.entry.undoes in gone)
                applied[each.entry.act] += 1
                failpoint("replay:applied")
        published = await self._publish_again(lead, {f.entry.entry_id for f in found})
        facts = {"entries": len(found), "applied": applied, "published_again": published}
        async with transaction(self._pool) as connection:
            await ledger.remember(connection, self._deployment, log.topic_id, log.end, here)
            await ledger.mark_replayed(connection)
            at = self._steps.clock.now()
            await audit.append(connection, writer=WRITER, at=at, action="ledger.replayed", actor="sidecar ledger replay", tenant=None, details=facts)
        await grace.destroy_unwatched(self._steps)
        return facts

    async def _serves(self, connection: Connection) -> bool:
        """Nothing is to be done, and a control plane may be leading."""
        try:
            await LedgerGate(self._topic, self._deployment).check(connection)
        except LedgerBehind:
            return False
        return True

    async def _take_lead(self, lead: Connection) -> None:
        """A control plane that waits for this replay holds the lead for a moment now and then; one that serves keeps it."""
        for _ in range(LEAD_SECONDS * 5):
            if await guard.try_lead(lead, self._deployment) is not None:
                return
            await asyncio.sleep(0.2)
        raise ConfigurationError("a control plane leads this deployment", where="the database", mend="stop it during the replay")

    def _refuse_unsigned(self, found: list[Found]) -> None:
        for each in found:
            if not each.signed_by:
                raise ConfigurationError(
                    f"the entry at offset {each.offset} is not signed by a key that is trusted here",
                    where=f"topic {self._topic.name}",
                    mend="name the public key of the control plane that wrote it: --trust-key FILE, or control.ledger_keys",
                )

    async def _apply(self, each: Found, *, skip: bool) -> None:
        entry = each.entry
        async with transaction(self._pool) as connection:
            tenant = await replays.tenant_of(connection, entry)
            if tenant is None or skip:  # a tenant is adopted, with all its entries, when it shows its name
                await ledger.enter(connection, entry, each.envelope, published=True)
                return
        async with self._steps.under_guard(tenant) as connection:
            await tenants.lock(connection, tenant)
            scope = await replays.scope_of(connection, tenant, entry)
            details: dict[str, Any] = {"command_id": str(entry.command_id), "act": entry.act, "offset": each.offset}
            if scope is None:
                await replays.foretell(connection, entry)
            else:
                try:
                    keys = await replays.apply(connection, entry, scope)
                except CommandRejected as error:
                    raise LedgerBehind(f"the {entry.act} of command {entry.command_id} cannot be replayed: {error}") from None
                details |= keys.in_audit()
            details |= {"scope": {"kind": entry.kind.value, "ref": entry.scope_ref.hex()}, "known": scope is not None}
            at = self._steps.clock.now()
            await audit.append(
                connection, writer=WRITER, at=at, action="ledger.replay", actor="sidecar ledger replay", tenant=tenant, details=details
            )
            await ledger.enter(connection, entry, each.envelope, published=True)
        self._steps.settled(tenant)
        telemetry.log.info("replayed", extra={"action": "replay", "act": entry.act, "command_id": entry.command_id})

    async def _publish_again(self, connection: Connection, there: set[Any]) -> int:
        """The topic was lost, or an entry had not got there yet."""
        missing = [row for row in await ledger.entries(connection) if row.entry_id not in there]
        if missing:
            await asyncio.to_thread(self._topic.publish, [(key_of(self._deployment, row.entry_id), row.envelope) for row in missing])
        await ledger.mark_published(connection, [row.seq for row in missing])
        return len(missing)


async def answer_asked(pool: Pool, clock: Clock) -> None:
    """Scopes that came up for the first time since a restore: what the ledger says of them is applied, and the data plane goes on."""
    async with transaction(pool) as connection:
        asked = await replays.asked(connection)
    for scope in asked:
        async with transaction(pool) as connection:
            if await replays.answer(connection, scope):
                details = {"scope": {"kind": scope.kind.value, "ref": scope_ref(scope).hex()}}
                await audit.append(
                    connection, writer=WRITER, at=clock.now(), action="ledger.adopt", actor=WRITER, tenant=scope.tenant, details=details
                )
