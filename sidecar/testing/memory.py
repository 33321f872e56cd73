"""A store in memory, for tests and examples: what it promises is what `PostgresEventStore` promises (tests/contract/test_event_store.py)."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar
from uuid import uuid4

from sidecar.core.errors import MalformedRecord, WrongVersion
from sidecar.core.model import UNCLASSIFIED, Erased, Event, identifier, tenant_id
from sidecar.core.store import DEFAULT_TENANT, Aggregated, Appended, Cursor, Expected, ExpectedVersion, NewEvent, StreamRead, Unreadable, encode
from sidecar.core.view import library_attributes, parse_attributes
from sidecar.postgres.event_store import aggregate

State = TypeVar("State")
_Stream = tuple[str, str]


@dataclass(slots=True)
class MemorySession:
    """Appends of one session, not yet anybody else's."""

    staged: list[Event] = field(default_factory=list)


class MemoryEventStore:
    """One event loop's. Global order is the order of the commits."""

    def __init__(self) -> None:
        self._streams: dict[_Stream, list[Event]] = {}
        self._all: list[Event] = []

    @asynccontextmanager
    async def session(self) -> AsyncIterator[MemorySession]:
        session = MemorySession()
        yield session
        self._commit(session.staged)

    async def append_to_stream(
        self,
        stream: str,
        events: Sequence[NewEvent],
        *,
        tenant: str = DEFAULT_TENANT,
        stream_class: str | None = None,
        expected_version: ExpectedVersion = Expected.ANY,
        session: MemorySession | None = None,
    ) -> Appended:
        if not events:
            raise MalformedRecord("an append needs events")
        identifier(stream.encode("utf-8", "replace"), "stream id", "bad_stream")
        before = self._of(tenant_id(tenant), stream, session)
        head = len(before)
        _check(expected_version, head)
        named = before[0].stream_class if before else stream_class or UNCLASSIFIED
        made = [_event(event, tenant, stream, named, head + n) for n, event in enumerate(events, start=1)]
        if session is None:
            self._commit(made)
        else:
            session.staged += made
        return Appended(first=head + 1, last=head + len(made), created=not head)

    async def read_stream(
        self,
        stream: str,
        *,
        tenant: str = DEFAULT_TENANT,
        from_position: int = 1,
        to_position: int | None = None,
        max_count: int | None = None,
        session: MemorySession | None = None,
    ) -> StreamRead:
        events = self._of(tenant, stream, session)
        wanted = [e for e in events if e.position >= from_position and (to_position is None or e.position <= to_position)]
        return StreamRead(events=wanted[:max_count], version=len(events))

    async def aggregate_stream(
        self,
        stream: str,
        evolve: Callable[[State, Event], State],
        initial: State,
        *,
        tenant: str = DEFAULT_TENANT,
        session: MemorySession | None = None,
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
        found: list[tuple[Cursor, Event | Erased | Unreadable]] = []
        for number, event in enumerate(self._all[after.position :], start=after.position + 1):
            if (tenant is None or event.tenant == tenant) and (classes is None or event.stream_class in classes):
                found.append((Cursor(0, number), event))
        return found[:limit]

    def _of(self, tenant: str, stream: str, session: MemorySession | None) -> list[Event]:
        own = [e for e in session.staged if (e.tenant, e.stream) == (tenant, stream)] if session else []
        return self._streams.get((tenant, stream), []) + own

    def _commit(self, events: Sequence[Event]) -> None:
        heads: dict[_Stream, int] = {}
        for event in events:
            at = event.tenant, event.stream
            heads[at] = heads.get(at, len(self._streams.get(at, ()))) + 1
            if event.position != heads[at]:
                raise WrongVersion("another session was faster")
        for event in events:
            self._streams.setdefault((event.tenant, event.stream), []).append(event)
            self._all.append(event)


def _check(expected: ExpectedVersion, head: int) -> None:
    met = {Expected.ANY: True, Expected.NO_STREAM: head == 0, Expected.STREAM_EXISTS: head > 0}
    if not (met[expected] if isinstance(expected, Expected) else expected == head):
        raise WrongVersion(f"the stream is at {head}")


def _event(event: NewEvent, tenant: str, stream: str, stream_class: str, position: int) -> Event:
    now = datetime.now(UTC)
    value, content = encode(event.data)
    message_id, at = event.id or str(uuid4()), event.occurred_at or now
    identifier(message_id.encode("utf-8", "replace"), "event id")
    identifier(event.type.encode("utf-8", "replace"), "event type")
    carried = parse_attributes(library_attributes(int(at.timestamp() * 1000), event.metadata, content, value is None, event.subject))
    return Event(
        tenant=tenant, stream=stream, position=position, message_id=message_id, type=event.type, stream_class=stream_class,
        value=value, key=None, timestamp_ms=carried.timestamp_ms, headers=(), source=None, schema_version=event.schema_version,
        occurred_at=at, metadata=carried.metadata, content=content, subject=carried.subject,
    )  # fmt: skip
