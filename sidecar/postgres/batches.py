"""The guard session and the one transaction of a batch.

The advisory locks live in this session and outlive the transaction: they are released when the batch's views are committed
in Kafka, or when the session ends.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sidecar.core.audit import tenant_ref
from sidecar.core.errors import StoreUnavailable
from sidecar.core.keys import UseLimits
from sidecar.core.streams import Fresh
from sidecar.postgres import audit, blind_index, fresh
from sidecar.postgres.connection import Connection, connect, refuse_transaction_pooling
from sidecar.postgres.errors import mapped
from sidecar.postgres.leases import Lease

_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_COPY_END = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
_POSITION = struct.Struct(">iq").pack
_LENGTH = struct.Struct(">i").pack
_SOURCE = struct.Struct(">iiiiiqi?").pack
_PG_EPOCH_US = 946_684_800_000_000
COLUMNS = [
    "tenant_id",
    "stream_id",
    "stream_position",
    "message_id",
    "message_type",
    "occurred_at",
    "data",
    "data_encrypted",
    "metadata",
    "source_id",
    "source_partition",
    "source_offset",
    "is_tombstone",
]
_FIELDS = struct.pack(">h", len(COLUMNS))


class MessageRows:
    """Rows of `messages` in COPY's binary format, built in one pass. Arguments `*_lp` carry their length, u32 big-endian.

    Both `plain` and `sealed`: a document of which fields are sealed.
    """

    __slots__ = ("_parts", "count")

    def __init__(self) -> None:
        self._parts = [_COPY_HEADER]
        self.count = 0

    def add(
        self,
        tenant_lp: bytes,
        stream_lp: bytes,
        position: int,
        message_id_lp: bytes,
        type_lp: bytes,
        occurred_us: int,
        plain: bytes | None,
        metadata: bytes | None,
        sealed: bytes | None,
        source_id: int,
        partition: int,
        offset: int,
        tombstone: bool,
    ) -> None:
        if sealed is not None:
            body = (
                (_NULL, _LENGTH(len(sealed)), sealed, _NULL) if plain is None else (_LENGTH(len(plain)), plain, _LENGTH(len(sealed)), sealed, _NULL)
            )
        else:
            data = (_NULL,) if plain is None else (_LENGTH(len(plain)), plain)
            meta = metadata or b"{}"
            body = (*data, _NULL, _LENGTH(len(meta) + 1), b"\x01", meta)  # JSONB's binary form: version 1, then text
        head = (_FIELDS, tenant_lp, stream_lp, _POSITION(8, position), message_id_lp, type_lp, _POSITION(8, occurred_us - _PG_EPOCH_US))
        self._parts.extend((*head, *body, _SOURCE(4, source_id, 4, partition, 8, offset, 1, tombstone)))
        self.count += 1

    def payload(self) -> bytes:
        return b"".join((*self._parts, _COPY_END))


@dataclass(frozen=True, slots=True)
class LeaseMove:
    """A partition's cursor as remembered, and where this batch takes it."""

    source_id: int
    partition: int
    epoch: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record that is no event. Its value is kept only sealed: without a key for it, its digest alone."""

    source_id: int
    partition: int
    offset: int
    reason: str
    tenant: str | None
    value_sha256: bytes
    value_encrypted: bytes | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record of which nothing is kept: its scope was erased, or policy refuses it."""

    source_id: int
    partition: int
    offset: int
    tenant: str
    reason: str


@dataclass(slots=True)
class StoreBatch:
    """All that one transaction writes."""

    stripes: list[int]
    leases: list[LeaseMove]
    tenants: list[str]
    fresh: Fresh
    rows: MessageRows
    dead_letters: list[DeadLetter] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    flush: list[tuple[str, str, int]] = field(default_factory=list)
    """tenant, stream, position: hints of heads, of this batch and not of one that is sealed ahead."""
    index: list[blind_index.Row] = field(default_factory=list)


TenantStates = dict[str, tuple[str, int, int]]
"""tenant → state, generation, epoch, as they stand under the guard."""


class GuardSession:
    """The data plane's own connection: guard locks, leases, the batch's transaction. Raises Fenced, Conflict, StoreUnavailable."""

    def __init__(self, dsn: str, instance_id: str, transactional_id: str, limits: UseLimits | None = None) -> None:
        self._dsn, self._instance_id, self._transactional_id = dsn, instance_id, transactional_id
        self._limits = limits or UseLimits()
        self._connection: Connection | None = None
        self.pid = 0

    @property
    def connection(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            raise StoreUnavailable("Postgres: the guard session is closed")
        return self._connection

    async def open(self) -> None:
        """A new session, on record as this instance's; call it only after the producer was reopened."""
        await self.close()
        connection = await connect(self._dsn, application_name=f"sidecar run {self._instance_id}", command_timeout=120)
        await refuse_transaction_pooling(connection)
        with mapped():
            await connection.execute("SET synchronous_commit = on")
            self.pid = connection.get_server_pid()
            await connection.execute(
                """INSERT INTO instances (instance_id, transactional_id, guard_pid, guard_started, state, heartbeat_at)
                   SELECT $1, $2, pid, backend_start, 'running', now() FROM pg_stat_activity WHERE pid = pg_backend_pid()
                   ON CONFLICT (instance_id) DO UPDATE SET transactional_id = excluded.transactional_id, guard_pid = excluded.guard_pid,
                     guard_started = excluded.guard_started, state = 'running', heartbeat_at = now()""",
                self._instance_id,
                self._transactional_id,
            )
        self._connection = connection

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def stop(self) -> None:
        """A graceful end: nothing is open in Kafka any more, and nobody needs to fence this instance."""
        with mapped():
            await self.connection.execute(
                "UPDATE instances SET state = 'stopped' WHERE instance_id = $1 AND guard_pid = $2", self._instance_id, self.pid
            )
        await self.close()

    async def write(self, batch: StoreBatch, verify: Callable[[TenantStates, int], None], now: datetime) -> None:
        """Guard, lease and tenant state in one call, `verify` them, then all of the batch; committed when it returns."""
        connection = self.connection
        with mapped():
            async with connection.transaction():
                verify(*await self._begin(connection, batch))
                await fresh.insert(connection, batch.fresh, self._limits, now)
                if batch.rows.count:
                    await connection.copy_to_table("messages", source=_chunks(batch.rows.payload()), format="binary", columns=COLUMNS)
                if batch.index:
                    await connection.copy_records_to_table("blind_index", records=batch.index, columns=list(blind_index.COLUMNS))
                await self._insert_outcomes(connection, batch, now)
                await self._audit(connection, batch, now)

    async def _begin(self, connection: Connection, batch: StoreBatch) -> tuple[TenantStates, int]:
        moves = batch.leases
        rows = await connection.fetch(
            "SELECT * FROM begin_batch($1, $2, $3, $4, $5, $6, $7)",
            batch.stripes,
            [m.source_id for m in moves],
            [m.partition for m in moves],
            [m.epoch for m in moves],
            [m.start for m in moves],
            [m.end for m in moves],
            batch.tenants,
        )
        policy_version = next(row["epoch"] for row in rows if row["tenant_id"] is None)
        return {r["tenant_id"]: (r["state"], r["generation"], r["epoch"]) for r in rows if r["tenant_id"] is not None}, policy_version

    async def _insert_outcomes(self, connection: Connection, batch: StoreBatch, now: datetime) -> None:
        if batch.dead_letters:
            await connection.executemany(
                """INSERT INTO dead_letters (source_id, partition, "offset", reason, tenant_id, value_sha256, value_encrypted)
                   VALUES ($1,$2,$3,$4,$5,$6,$7)""",
                [(d.source_id, d.partition, d.offset, d.reason, d.tenant, d.value_sha256, d.value_encrypted) for d in batch.dead_letters],
            )
        if batch.refusals:
            await connection.copy_records_to_table(
                "refusals",
                records=[(r.source_id, r.partition, r.offset, r.tenant, r.reason) for r in batch.refusals],
                columns=["source_id", "partition", "offset", "tenant_id", "reason"],
            )
        if batch.flush:
            await connection.execute(
                """UPDATE streams s SET position = x.p FROM unnest($1::text[], $2::text[], $3::bigint[]) x(t, n, p)
                   WHERE s.tenant_id = x.t AND s.stream_id = x.n AND s.position < x.p""",
                [t for t, _, _ in batch.flush],
                [s for _, s, _ in batch.flush],
                [p for _, _, p in batch.flush],
            )

    async def _audit(self, connection: Connection, batch: StoreBatch, now: datetime) -> None:
        """One row for the keys a batch made, one for what it refused."""
        await fresh.audited(connection, batch.fresh, writer=self._instance_id, now=now)
        if batch.refusals:
            counts: dict[tuple[str, str], int] = {}
            for refusal in batch.refusals:
                at = (tenant_ref(refusal.tenant).hex(), refusal.reason)
                counts[at] = counts.get(at, 0) + 1
            listed = [{"tenant_ref": ref, "reason": reason, "records": n} for (ref, reason), n in sorted(counts.items())]
            await self._append(connection, now, "refuse_records", {"refused": listed})

    async def _append(self, connection: Connection, now: datetime, action: str, details: dict[str, Any]) -> None:
        await audit.append(connection, writer=self._instance_id, at=now, action=action, actor=self._instance_id, tenant=None, details=details)

    async def note_view_too_large(self, origins: Sequence[tuple[Lease, int, str]]) -> None:
        """Stored events that have no view record, because the view's topic does not take it."""
        with mapped():
            await self.connection.executemany(
                """INSERT INTO dead_letters (source_id, partition, "offset", reason, tenant_id) VALUES ($1, $2, $3, 'view_too_large', $4)
                   ON CONFLICT DO NOTHING""",
                [(lease.source_id, lease.partition, offset, tenant) for lease, offset, tenant in origins],
            )

    async def release(self, stripes: Sequence[int]) -> None:
        """Give back the batch's own locks; the session's others are untouched."""
        if stripes:
            with mapped():
                await self.connection.fetchval("SELECT count(pg_advisory_unlock_shared(1, s)) FROM unnest($1::int[]) s", list(stripes))


async def _chunks(payload: bytes) -> Any:
    yield payload
