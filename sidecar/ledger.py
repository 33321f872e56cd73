"""The ledger: each shred, hold, release and readmission, signed, on a topic of its own, where a restore of the database cannot take it back.

Ledger      the control plane's: an entry is written in the transaction of its act, and is on the topic before the act's receipt
LedgerGate  everybody's: a database that lacks entries, or that is not the server it was, is not served (ledger_replay.py mends that)
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import orjson

from sidecar import telemetry
from sidecar.core import dsse
from sidecar.core.audit import scope_ref, tenant_ref
from sidecar.core.command import Command, receipt_id
from sidecar.core.dsse import Signer
from sidecar.core.errors import ConfigurationError, LedgerBehind, MalformedEnvelope
from sidecar.core.ledger import PAYLOAD_TYPE, Act, Entry, SourceEnd
from sidecar.kafka.ledger import LedgerRecord, LedgerTopic, Log
from sidecar.postgres import ledger
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.ledger import Server

MEND = "run `sidecar ledger replay`"


class Ledger:
    """One per control process."""

    def __init__(self, pool: Pool, topic: LedgerTopic, signer: Signer, deployment: str) -> None:
        self._pool, self._topic, self._signer, self._deployment = pool, topic, signer, deployment
        self._publishing = asyncio.Lock()

    async def enter(
        self, connection: Connection, command: Command, act: Act, *, at: datetime, generation: int, sources: Sequence[SourceEnd] = (),
        keys_sha256: str | None = None, undoes: UUID | None = None, kept_until: datetime | None = None,
    ) -> None:  # fmt: skip
        """An entry, in the transaction of the act: under the tenant's lock, so that of one tenant they stand in the order of the acts."""
        scope = command.scope
        entry = Entry(
            entry_id=receipt_id(command.command_id, "ledger", act, *([undoes] if undoes else [])),
            command_id=command.command_id,
            deployment=self._deployment,
            act=act,
            at=at,
            tenant_ref=tenant_ref(scope.tenant),
            kind=scope.kind,
            scope_ref=scope_ref(scope),
            generation=generation,
            sources=tuple(sources),
            keys_sha256=keys_sha256,
            undoes=undoes,
            kept_until=kept_until,
            include_plain=act == "shred" and command.include_plain,
        )
        await ledger.enter(connection, entry, dsse.sign(PAYLOAD_TYPE, entry.to_bytes(), [self._signer]).to_bytes())

    async def publish(self) -> None:
        """Returns when every entry that was committed before the call is on the topic. Raises BrokerUnavailable: nothing is skipped."""
        async with self._publishing:
            while True:
                async with transaction(self._pool) as connection:
                    waiting = await ledger.unpublished(connection)
                if not waiting:
                    return
                await asyncio.to_thread(self._topic.publish, [(key_of(self._deployment, row.entry_id), row.envelope) for row in waiting])
                async with transaction(self._pool) as connection:
                    await ledger.mark_published(connection, [row.seq for row in waiting])


class LedgerGate:
    """Whether this database may be served. One per process that reads or writes the store.

    Asked on every new session, and by readers before each read: while the answer of Postgres is the same as when it passed, nothing older
    can have taken its place, and Kafka is not asked. `records`: this role may write the watermark down.
    """

    def __init__(self, topic: LedgerTopic, deployment: str, *, records: bool = False) -> None:
        self._topic, self._deployment, self._records = topic, deployment, records
        self._passed: Server | None = None

    async def check(self, connection: Connection) -> None:
        """Raises LedgerBehind, or BrokerUnavailable where only the topic could tell."""
        here = await ledger.server(connection)
        if here is None:
            raise LedgerBehind("this Postgres is a standby, which may lag behind a shred: name the primary")
        if here == self._passed:
            return
        known = await ledger.watermark(connection)
        if known.system_identifier is not None and (known.system_identifier, known.timeline) != (here.system_identifier, here.timeline):
            raise LedgerBehind(f"this database was restored or failed over since it was last served: {MEND}")
        if known.deployment not in (None, self._deployment):
            raise LedgerBehind(f"this database is the deployment {known.deployment}'s, whose entries in the ledger are not looked for here")
        log = await self._log()
        if known.topic_id is not None and (known.topic_id != log.topic_id or log.end < known.next_offset):
            raise LedgerBehind(f"the ledger topic {self._topic.name} is not the one that this database knows: {MEND}")
        if log.start > known.next_offset:
            raise LedgerBehind(f"the ledger topic {self._topic.name} has lost entries that this database does not have: restore the topic")
        missing = await ledger.lacking(connection, await self._ids(known.next_offset, log.end))
        if missing:
            raise LedgerBehind(f"this database is older than the ledger, {len(missing)} acts (shreds, holds, …) are not in it: {MEND}")
        if self._records:
            await ledger.remember(connection, self._deployment, log.topic_id, log.end, here)
        self._passed = here

    async def _log(self) -> Log:
        try:
            return await asyncio.to_thread(self._topic.log)
        except ConfigurationError as error:
            raise LedgerBehind(f"{error.what}: {error.mend}") from None

    async def _ids(self, start: int, end: int) -> set[UUID]:
        records = await asyncio.to_thread(self._topic.read, start, end)
        return {identity for record in records if (identity := entry_id_of(record, self._deployment)) is not None}


def key_of(deployment: str, entry_id: UUID) -> bytes:
    """A record's key: deployments may share a topic, and compaction removes nothing but an entry that stands twice."""
    return f"{deployment}/{entry_id}".encode()


def entry_id_of(record: LedgerRecord, deployment: str) -> UUID | None:
    """By the record's key; None for another deployment's. Raises LedgerBehind: what is no entry may have replaced one."""
    whose, _, identity = record.key.decode("utf-8", "replace").rpartition("/")
    try:
        if not record.value:
            raise ValueError
        found = UUID(identity)
    except ValueError:
        telemetry.log.error("no entry of the ledger", extra={"action": "ledger", "offset": record.offset})
        raise LedgerBehind(f"the record at offset {record.offset} of the ledger topic is no entry of it") from None
    return found if whose == deployment else None


def parse_envelope(raw: bytes) -> dsse.Signed:
    """Raises MalformedEnvelope."""
    try:
        signed = dsse.parse(orjson.loads(raw))
    except (orjson.JSONDecodeError, TypeError, AttributeError):
        raise MalformedEnvelope("this is no DSSE envelope") from None
    if signed.payload_type != PAYLOAD_TYPE:
        raise MalformedEnvelope("this is no entry of a ledger")
    return signed
