"""The store that applications append to: `PostgresEventStore`, the sidecar's own tables.

Knows nothing of keys. An encrypted event is to it an envelope, kept as bytes and given back unopened, with the document beside it where only
fields of that are sealed. What the sidecar stored reads here, and what is appended here the sidecar can open.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast
from uuid import uuid4

from sidecar.core.errors import AuthenticationFailed, Conflict, MalformedRecord, RecordError, StreamErased
from sidecar.core.model import UNCLASSIFIED, Erased, Event, Scope, ScopeKind, identifier, tenant_id
from sidecar.core.store import (
    DEFAULT_TENANT,
    Aggregated,
    Appended,
    Cursor,
    Expected,
    ExpectedVersion,
    NewEvent,
    SealedEvent,
    StreamRead,
    Unreadable,
    as_number,
    encode,
)
from sidecar.core.view import guard_stripe, library_attributes, parse_attributes
from sidecar.postgres import blind_index, replays
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import Foretold, Overtaken, mapped

State = TypeVar("State")
ATTEMPTS: Final = 20
"""The data plane may write to the same stream: its batches take no row lock, so an append may have to be tried again."""

COLUMNS = """
SELECT m.tenant_id, m.stream_id, m.stream_position, m.message_id, m.message_type, m.schema_version, m.occurred_at, m.created_at, m.data,
  m.data_encrypted, m.metadata, m.is_tombstone, m.source_id, m.source_partition, m.source_offset, m.transaction_id, m.global_position,
  t.topic AS source_topic, s.stream_type_class, s.is_encrypted, s.encrypted_from_position, s.position AS stream_head
FROM messages m LEFT JOIN streams s ON s.tenant_id = m.tenant_id AND s.stream_id = m.stream_id
LEFT JOIN source_topics t ON t.source_id = m.source_id
"""
_OF_STREAM = COLUMNS + "WHERE m.tenant_id = $1 AND m.stream_id = $2 AND m.stream_position BETWEEN $3 AND $4 ORDER BY m.stream_position LIMIT $5"
_HEAD = """SELECT greatest(coalesce((SELECT position FROM streams WHERE tenant_id = $1 AND stream_id = $2), 0),
  coalesce((SELECT stream_position FROM messages WHERE tenant_id = $1 AND stream_id = $2 ORDER BY stream_position DESC LIMIT 1), 0))"""
# A transaction that is still open may commit rows that stand before others: nothing at or beyond the oldest of them is read yet.
_ALL = (
    COLUMNS
    + """WHERE (m.transaction_id, m.global_position) > ($1::text::xid8, $2) AND m.transaction_id < pg_snapshot_xmin(pg_current_snapshot())
  AND ($3::text IS NULL OR m.tenant_id = $3) AND ($4::text[] IS NULL OR s.stream_type_class = ANY ($4))
ORDER BY m.transaction_id, m.global_position LIMIT $5"""
)
_APPEND = "SELECT * FROM append_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
_LAST: Final = 2**63 - 1
ROW: Final = 8
"""Columns of an event in an append."""
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True, slots=True)
class Session:
    """A transaction on one connection; made by `PostgresEventStore.session`."""

    connection: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedFor:
    """As of what the events of an append were sealed: checked in its transaction, under the guard. Moved is raised if it no longer holds.

    `epoch` is the tenant's.
    """

    epoch: int
    policy_version: int


class PostgresEventStore:
    """Appends, reads and global order. Tenant and stream ids as everywhere: taken as they come, or MalformedRecord."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        async with transaction(self.pool) as connection:
            yield Session(connection)

    async def append_to_stream(
        self,
        stream: str,
        events: Sequence[NewEvent | SealedEvent],
        *,
        tenant: str = DEFAULT_TENANT,
        stream_class: str | None = None,
        expected_version: ExpectedVersion = Expected.ANY,
        session: Session | None = None,
        sealed_for: SealedFor | None = None,
        noted: bool = False,
    ) -> Appended:
        """`noted`: at the expected version the stream's record named the key version that all the events are sealed under."""
        arguments = _arguments(stream, events, tenant, stream_class, expected_version, sealed_for, noted)
        tokens = [(n, token) for n, event in enumerate(events) if isinstance(event, SealedEvent) for token in event.tokens]
        for attempt in range(ATTEMPTS):
            try:
                return await self._append(arguments, session, tokens)
            except Foretold:
                await self._ask_the_ledger(tenant, stream, stream_class or UNCLASSIFIED)
                raise
            except Conflict as conflict:
                again = type(conflict) in (Conflict, Overtaken) and session is None and arguments[4] < 0 and sealed_for is None
                if not again or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def _append(self, arguments: Sequence[Any], session: Session | None, tokens: Sequence[tuple[int, bytes]]) -> Appended:
        """`tokens`: number of the event, row of the blind index."""
        with mapped():
            async with self._reading(session) as connection:
                if session is None and not tokens:
                    row = await connection.fetchrow(_APPEND, *arguments)
                else:
                    async with connection.transaction():  # in a session a savepoint: what is refused leaves it usable
                        row = await connection.fetchrow(_APPEND, *arguments)
                        if tokens and row is not None:
                            await blind_index.insert(connection, [(arguments[1], token, arguments[2], row["first"] + n) for n, token in tokens])
        found: Any = row
        return Appended(first=found["first"], last=found["last"], created=found["created"])

    async def _ask_the_ledger(self, tenant: str, stream: str, stream_class: str) -> None:
        """In a transaction of its own: the append's is lost."""
        of = {ScopeKind.TENANT: tenant, ScopeKind.STREAM: stream, ScopeKind.CLASS: stream_class}
        async with transaction(self.pool) as connection:
            await replays.ask(connection, [Scope(tenant=tenant, kind=kind, id=id) for kind, id in of.items()])

    async def read_stream(
        self,
        stream: str,
        *,
        tenant: str = DEFAULT_TENANT,
        from_position: int = 1,
        to_position: int | None = None,
        max_count: int | None = None,
        session: Session | None = None,
    ) -> StreamRead:
        wanted = (tenant, stream, from_position, to_position if to_position is not None else _LAST, max_count)
        async with self._reading(session) as connection:
            with mapped():
                rows = await connection.fetch(_OF_STREAM, *wanted)
                version = 0 if rows else await connection.fetchval(_HEAD, tenant, stream)
                if from_position <= version and max_count != 0:
                    rows = await connection.fetch(_OF_STREAM, *wanted)  # they may have come in between: a version is never of events not seen
                if rows:
                    whole = to_position is None and max_count is None
                    version = rows[-1]["stream_position"] if whole else await connection.fetchval(_HEAD, tenant, stream)
        return StreamRead(events=[event_of(row) for row in rows], version=version)

    async def aggregate_stream(
        self, stream: str, evolve: Callable[[State, Event], State], initial: State, *, tenant: str = DEFAULT_TENANT, session: Session | None = None
    ) -> Aggregated[State]:
        return aggregate(await self.read_stream(stream, tenant=tenant, session=session), evolve, initial)

    async def read_all(
        self,
        *,
        after: Cursor = Cursor(),
        tenant: str | None = None,
        classes: Sequence[str] | None = None,
        limit: int = 500,
    ) -> Sequence[tuple[Cursor, Event | Erased | Unreadable]]:
        async with self._reading(None) as connection:
            with mapped():
                rows = await connection.fetch(_ALL, str(after.transaction), after.position, tenant, classes and list(classes), limit)
        return [(Cursor(int(row["transaction_id"]), row["global_position"]), _readable(row)) for row in rows]

    @asynccontextmanager
    async def _reading(self, session: Session | None) -> AsyncIterator[Connection]:
        if session is not None:
            yield session.connection
            return
        with mapped():
            async with self.pool.acquire() as connection:
                yield cast(Connection, connection)


def aggregate(read: StreamRead, evolve: Callable[[State, Event], State], initial: State) -> Aggregated[State]:
    """Raises StreamErased rather than compute a state from half of a stream."""
    state = initial
    for event in read.events:
        if isinstance(event, Erased):
            raise StreamErased
        state = evolve(state, event)
    return Aggregated(state=state, version=read.version)


def _arguments(
    stream: str,
    events: Sequence[NewEvent | SealedEvent],
    tenant: str,
    stream_class: str | None,
    expected: ExpectedVersion,
    sealed_for: SealedFor | None,
    noted: bool,
) -> tuple[Any, ...]:
    """Of `append_events`, in order. Raises MalformedRecord for ids that are none."""
    if not events:
        raise MalformedRecord("an append needs events")
    identifier(stream.encode("utf-8", "replace"), "stream id", "bad_stream")
    now = datetime.now(UTC)
    rows = [event[:ROW] if isinstance(event, SealedEvent) else _row(event, now) for event in events]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return (
        guard_stripe(tenant_id(tenant)), tenant, stream, stream_class or UNCLASSIFIED, as_number(expected),
        sealed_for.epoch if sealed_for else None, sealed_for.policy_version if sealed_for else None, noted, *columns,
    )  # fmt: skip


def _row(event: NewEvent, now: datetime) -> tuple[Any, ...]:
    """id, type, schema version, time, plain bytes, envelope, attributes, is a tombstone."""
    head = (event.id or str(uuid4()), event.type, event.schema_version, event.occurred_at or now)
    identifier(head[0].encode("utf-8", "replace"), "event id")
    identifier(event.type.encode("utf-8", "replace"), "event type")
    value, content = encode(event.data)
    attributes = library_attributes(int(head[3].timestamp() * 1000), event.metadata, content, value is None, event.subject)
    if _NUL.search(attributes):
        raise MalformedRecord("an event's metadata hold a NUL, which Postgres cannot keep")
    return (*head, value, None, attributes, value is None)


def _readable(row: Any) -> Event | Unreadable:
    try:
        return event_of(row)
    except RecordError as error:
        return Unreadable(tenant=row["tenant_id"], stream=row["stream_id"], position=row["stream_position"], error=error)


def event_of(row: Any) -> Event:
    """The event of a row, unopened where it is encrypted. Raises AuthenticationFailed for plaintext in an encrypted stream."""
    if row["stream_type_class"] is None:
        raise AuthenticationFailed("a row of a stream that is not on record: whether it may be plain cannot be told")
    source = (row["source_topic"], row["source_partition"], row["source_offset"]) if row["source_topic"] is not None else None
    common: dict[str, Any] = {
        "tenant": row["tenant_id"], "stream": row["stream_id"], "position": row["stream_position"], "message_id": row["message_id"],
        "type": row["message_type"], "stream_class": row["stream_type_class"], "source": source,
        "schema_version": row["schema_version"], "occurred_at": row["occurred_at"],
    }  # fmt: skip
    sealed = row["data_encrypted"]
    if sealed is not None:
        enc = {"tombstone": True} if row["is_tombstone"] else {}
        document = row["data"] if row["data"] is None else bytes(row["data"])
        return Event(**common, value=document, key=None, timestamp_ms=0, headers=(), metadata={"enc": enc}, content="json", sealed=bytes(sealed))
    if row["is_encrypted"] and row["stream_position"] >= (row["encrypted_from_position"] or 1):
        raise AuthenticationFailed("plaintext stands in an encrypted stream")
    carried = parse_attributes(row["metadata"] or {})
    value = None if row["is_tombstone"] else bytes(row["data"])
    return Event(
        **common, value=value, key=carried.key, timestamp_ms=carried.timestamp_ms, headers=carried.headers, subject=carried.subject,
        metadata=carried.metadata, content=carried.content,
    )  # fmt: skip
