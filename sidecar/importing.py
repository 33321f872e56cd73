"""Events of another table, appended to our store as an application appends them: class, policy, key, seal. Resumable, verified, the source unchanged.

    rows in the map's order → runs of one stream → append    one transaction for some rows, which also moves the checkpoint:
                                                             killed anywhere, the next run goes on; nothing is lost or there twice
    then: counts per stream, and rows at random read back from our store and compared

Positions here are gap-free from 1, whatever they are there; an event's metadata have its old one: {"imported": {"from": NAME, "position": 17}}.
A stream that has events which this import did not bring is not touched, and neither is one to which somebody else writes meanwhile.
"""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

import orjson

from sidecar.core.errors import ConfigurationError, Conflict, KeyUnavailable, MalformedRecord, RecordError, RecordRefused, Unavailable, WrongVersion
from sidecar.core.model import Erased, Event
from sidecar.core.policy import Encrypt, Refuse
from sidecar.core.store import Json, NewEvent, encode
from sidecar.crypto_store import Classify, CryptoEventStore
from sidecar.import_map import ImportMap
from sidecar.key_management import KeyManagementService
from sidecar.ports import Clock
from sidecar.postgres import audit, imports
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.event_store import Session
from sidecar.postgres.imports import Checkpoint, Source
from sidecar.steps import failpoint
from sidecar.waiting import Backoff

WRITER: Final = "import"
ATTEMPTS: Final = 8
"""At some rows, where Postgres or the KMS is away or a shred ended our session; then the run ends and another one goes on."""
TAILS: Final = 100_000
"""Streams whose end is remembered."""
COUNTED_AT_ONCE: Final = 1000

Tail = tuple[int, int | None]
"""A stream's version here, and the source's position of its last event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the source as an event of ours; `position` is the source's."""

    tenant: str
    stream: str
    stream_class: str
    position: int
    event: NewEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`refused` rows are of what is shredded, or of a class that policy refuses: they are in the audit trail."""

    imported: int
    refused: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found at the end. `faults`: for people; none means that everything that was asked for is here."""

    rows: int
    imported: int
    refused: int
    streams: int
    sampled: int
    erased: int
    faults: list[str]

    @property
    def document(self) -> dict[str, Any]:
        return {"state": "failed" if self.faults else "verified"} | asdict(self)


class Import:
    """One import, by one process at a time. Raises ConfigurationError, MalformedRecord, Conflict, Unavailable: what is stored stays, run it again."""

    def __init__(
        self, plan: ImportMap, source: Source, store: CryptoEventStore, keys: KeyManagementService, classify: Classify, pool: Pool, clock: Clock, actor: str
    ) -> None:  # fmt: skip
        self._map, self._source, self._store, self._keys, self._classify = plan, source, store, keys, classify
        self._pool, self._clock, self._actor = pool, clock, actor
        self._content = plan.events.data.as_ or ("json" if source.data_is_json else "bytes")
        self._tails: dict[tuple[str, str], Tail] = {}

    async def preview(self) -> list[dict[str, Any]]:
        """What would become of the table: a row per class and outcome. Nothing is written."""
        policies, streams, events = await self._keys.policies(), Counter[Any](), Counter[Any]()
        async for row in self._source.streams():
            stream_class = row["stream_class"] or self._classify(row["stream"] or "", row["type"] or "")
            decision = policies.decide(row["tenant"] or "", stream_class)
            streams[stream_class, decision] += 1
            events[stream_class, decision] += row["events"]
        out = []
        for (stream_class, decision), count in sorted(streams.items(), key=lambda item: item[0][0]):
            sealed = isinstance(decision, Encrypt)
            how = {"algorithm": decision.suite.label, "key_scope": decision.key_scope.value} if sealed else {"algorithm": None, "key_scope": None}
            outcome = "encrypted" if sealed else "refused" if isinstance(decision, Refuse) else "plain"
            out.append({"class": stream_class, "streams": count, "events": events[stream_class, decision], "outcome": outcome} | how)
        return out

    async def run(self) -> AsyncIterator[Progress]:
        """Until no row is behind the checkpoint. What is stored is stored when an answer comes."""
        if ambiguous := await self._source.ambiguous():
            raise ConfigurationError(
                f"the order does not tell {ambiguous} rows apart, or is NULL in them: some would be passed over", where="order",
                mend="name columns that are unique together: a global position, or stream and position",
            )  # fmt: skip
        async with transaction(self._pool) as connection:
            at = await imports.begin(connection, self._map.name, self._map.table())
        total = await self._source.count()
        yield Progress(imported=at.imported, refused=at.refused, of=total)
        while rows := await self._source.next(at.after, self._map.rows):
            at = await self._stored(at, rows)
            yield Progress(imported=at.imported, refused=at.refused, of=max(total, at.imported + at.refused))

    async def _stored(self, at: Checkpoint, found: Sequence[Any]) -> Checkpoint:
        rows = [self._row(row, at.imported + at.refused + n) for n, row in enumerate(found, start=1)]
        backoff = Backoff()
        for attempt in range(ATTEMPTS):
            try:
                return await self._store_all(at, rows, list(found[-1]["place"]))
            except Unavailable:
                if attempt == ATTEMPTS - 1:
                    raise
            await backoff.wait()
        raise AssertionError("unreachable")

    async def _store_all(self, at: Checkpoint, rows: Sequence[Row], place: Sequence[str]) -> Checkpoint:
        """One transaction: the events, the checkpoint, and the audit row of what is refused."""
        fenced = {(row.tenant, row.stream) for row in rows if not await self._prepared(row)}
        tails, refused, first = dict(self._tails) if len(self._tails) < TAILS else {}, 0, at.imported + at.refused + 1
        async with self._store.session() as session:
            await self._claim(session, at)
            for (tenant, stream), group in groupby(enumerate(rows, start=first), key=lambda numbered: (numbered[1].tenant, numbered[1].stream)):
                run = list(group)
                if (tenant, stream) in fenced:
                    refused += len(run)
                    continue
                tail = tails.get((tenant, stream)) or await self._tail(session, run[0][1], run[0][0])
                _check_order(tail, run)
                tails[tenant, stream], left = await self._append(session, tail, [row for _, row in run], run[0][0])
                refused += left
            failpoint("import:appended")
            done = Checkpoint(after=place, imported=at.imported + len(rows) - refused, refused=at.refused + refused)
            await self._advance(session, at, done, refused)
            failpoint("import:advanced")
        self._tails = tails
        failpoint("import:committed")
        return done

    async def _claim(self, session: Session, at: Checkpoint) -> None:
        await imports.claim(session.connection, self._map.name, at)

    async def _advance(self, session: Session, before: Checkpoint, now: Checkpoint, refused: int) -> None:
        await imports.advance(session.connection, self._map.name, now)
        if refused:
            details = {"import": self._map.name, "rows": refused, "from_row": before.imported + before.refused + 1}
            await audit.append(
                session.connection,
                writer=WRITER,
                at=self._clock.now(),
                action="events.import_refused",
                actor=self._actor,
                tenant=None,
                details=details,
            )

    async def _prepared(self, row: Row) -> bool:
        """Keys are made before the transaction, which would stand in their way. False: nothing of the stream is accepted."""
        try:
            _ = self._keys.in_hand(row.tenant, row.stream) or await self._keys.hold(row.tenant, row.stream, row.stream_class)
        except RecordRefused:
            return False
        return True

    async def _append(self, session: Session, tail: Tail, rows: Sequence[Row], number: int) -> tuple[Tail, int]:
        """-> the stream's end afterwards, and how many were refused: one by one where it is about single persons."""
        head = rows[0]
        try:
            done = await self._store.append_to_stream(
                head.stream,
                [row.event for row in rows],
                tenant=head.tenant,
                stream_class=head.stream_class,
                expected_version=tail[0],
                session=session,
            )
        except WrongVersion:
            raise Conflict(f"somebody else writes to the stream of row {number}: an import needs it to itself") from None
        except RecordError as error:
            raise MalformedRecord(f"{_named(number)}: {error}") from None
        except RecordRefused:
            if len(rows) == 1:
                return tail, 1
            left = 0
            for n, row in enumerate(rows):
                tail, refused = await self._append(session, tail, [row], number + n)
                left += refused
            return tail, left
        return (done.last, rows[-1].position), 0

    async def _tail(self, session: Session, row: Row, number: int) -> Tail:
        """Raises Conflict where the stream's last event is not this import's."""
        version = (await self._store.read_stream(row.stream, tenant=row.tenant, max_count=0, session=session)).version
        if version == 0:
            return 0, None
        [last] = (await self._store.read_stream(row.stream, tenant=row.tenant, from_position=version, session=session)).events
        brought = last.metadata.get("imported") if isinstance(last, Event) else None
        if not isinstance(brought, dict) or brought.get("from") != self._map.name:
            raise Conflict(
                f"the stream of row {number} has events here that this import did not bring: import it under another name, or into an empty store"
            )
        return version, brought["position"]

    def _row(self, row: Any, number: int) -> Row:
        try:
            return event_of(row, self._map.name, self._content, self._classify)
        except (ValueError, RecordError) as error:  # ValueError quotes what it cannot read
            raise MalformedRecord(f"{_named(number)}: {error if isinstance(error, RecordError) else 'a value is not of its kind'}") from None

    # afterwards

    async def verify(self, sample: int = 100) -> Verified:
        """Counts, per stream too, and rows at random: read back through the store and compared to the byte."""
        async with transaction(self._pool) as connection:
            at = await imports.begin(connection, self._map.name, self._map.table())
        rows, faults = await self._source.count(), []
        if rows != at.imported + at.refused:
            faults.append(f"the table has {rows} rows, and {at.imported + at.refused} were taken over: some came meanwhile, or behind the checkpoint")
        streams, missing = await self._counted()
        if missing > at.refused:
            faults.append(f"{missing} events of the table are not in the store, and {at.refused} were refused")
        erased, found = 0, await self._source.sample(sample)
        for record in found:
            row = event_of(record, self._map.name, self._content, self._classify)
            answer = await self._read_back(row, record["rank"], at.refused)
            erased += isinstance(answer, Erased)
            if isinstance(answer, str):
                faults.append(f"a sampled event {answer}")
        verified = Verified(
            rows=rows, imported=at.imported, refused=at.refused, streams=streams, sampled=len(found), erased=erased, faults=sorted(set(faults))
        )
        async with transaction(self._pool) as connection:
            if not faults:
                await imports.verified(connection, self._map.name)
            await audit.append(
                connection, writer=WRITER, at=self._clock.now(), action="events.import", actor=self._actor, tenant=None,
                details={"import": self._map.name} | verified.document,
            )  # fmt: skip
        return verified

    async def _counted(self) -> tuple[int, int]:
        """-> streams, and how many events of them we lack."""
        streams = missing = 0
        wanted: dict[tuple[str, str], int] = {}

        async def compare() -> int:
            async with transaction(self._pool) as connection:
                ours = await imports.counts(connection, list(wanted))
            short = sum(max(0, events - ours[stream]) for stream, events in wanted.items())
            wanted.clear()
            return short

        async for row in self._source.streams():
            wanted[row["tenant"], row["stream"]] = row["events"]
            streams += 1
            if len(wanted) == COUNTED_AT_ONCE:
                missing += await compare()
        return streams, missing + (await compare() if wanted else 0)

    async def _read_back(self, row: Row, rank: int, refused: int) -> Event | Erased | str | None:
        """The event of a row; None if it may be one of those that were refused; or what is wrong."""
        try:
            read = await self._store.read_stream(row.stream, tenant=row.tenant, from_position=max(1, rank - refused), to_position=rank)
        except (RecordError, KeyUnavailable):
            return "does not open"
        for event in reversed(read.events):
            if isinstance(event, Erased):
                if event.message_id == row.event.id:
                    return event
            elif event.message_id == row.event.id:
                return event if _same(row, event) else "is not what the table has"
        return None if refused else "is not in the store"


def event_of(row: Any, name: str, content: str, classify: Classify) -> Row:
    """Of a row of the import of that name. Raises MalformedRecord, ValueError for one that makes no event."""
    if any(row[name] is None for name in ("tenant", "stream", "type", "position")):
        raise MalformedRecord("tenant, stream, position or type is NULL")
    metadata = {} if row["metadata"] is None else orjson.loads(row["metadata"])
    if not isinstance(metadata, dict):
        raise MalformedRecord("the metadata are no JSON object")
    at = row["occurred_at"]
    if not isinstance(at, datetime | None):
        raise MalformedRecord("occurred_at is no point in time: map a column of type timestamp")
    event = NewEvent(
        type=row["type"],
        data=_data(row["data"], content),
        metadata=metadata | {"imported": {"from": name, "position": row["position"]}},
        id=row["id"] or str(uuid5(NAMESPACE_URL, f"{name}\n{row['tenant']}\n{row['stream']}\n{row['position']}")),
        schema_version=int(row["schema_version"] or 1),
        occurred_at=at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at,
        subject=row["subject"],
    )
    stream_class = row["stream_class"] or classify(row["stream"], row["type"])
    return Row(tenant=row["tenant"], stream=row["stream"], stream_class=stream_class, position=row["position"], event=event)


def _data(value: object, content: str) -> Json | bytes | None:
    """To the byte as the table gives it. Raises MalformedRecord, and ValueError for what is said to be JSON and is none."""
    if value is None:
        return None
    if not isinstance(value, str | bytes):
        raise MalformedRecord("the data are no JSON, text or bytes: map a column of such a type")
    raw = value.encode() if isinstance(value, str) else bytes(value)
    if content == "bytes":
        return raw
    orjson.loads(raw)
    return Json(raw)


def _check_order(tail: Tail, run: Sequence[tuple[int, Row]]) -> None:
    before = tail[1]
    for number, row in run:
        if before is not None and row.position <= before:
            raise MalformedRecord(
                f"{_named(number)}: its position {row.position} is not behind {before}, the one before it in its stream\n"
                "  mend:  another `order`, or a `where` that leaves out what is there twice (archived rows, other partitions)"
            )
        before = row.position


def _same(row: Row, event: Event) -> bool:
    wanted = row.event
    return (
        event.value == encode(wanted.data)[0]
        and (event.type, event.schema_version) == (wanted.type, wanted.schema_version)
        and {name: value for name, value in event.metadata.items() if name != "enc"} == wanted.metadata
        and wanted.occurred_at in (None, event.occurred_at)
    )


def _named(number: int) -> str:
    """By its number: what stands in a row may be personal."""
    return f"row {number} of the table, in the map's order (OFFSET {number - 1} LIMIT 1)"
